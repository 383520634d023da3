"""Settings, database, Redis, clocks."""

from __future__ import annotations

import time
from collections.abc import Iterator

import redis
from django.conf import settings
from django.db import DatabaseError, connection
from django.db.migrations.executor import MigrationExecutor

from e2a.core.diagnosis import Finding, fail, ok, warn

SLOW_MS = 50.0
CLOCK_SECONDS = 2.0
BAD_CLOCK_SECONDS = 20.0
"""A gateway takes requests whose time is at most 30 s off."""


def key_findings() -> Iterator[Finding]:
    """What the settings themselves complain of; in production that no secret is missing."""
    ours = settings.E2A
    for check_id, message in ours.problems:
        yield fail("settings", message, f"Correct it in the environment ({check_id}).")
    if ours.problems:
        return
    if ours.production:
        yield ok("settings", "production, with every secret that it needs")
    else:
        yield warn(
            "settings",
            f"development: secrets are made in {ours.data_dir / 'keys'}",
            "For others than yourself set E2A_ENV=production, and give it its secrets.",
        )


def database_findings() -> Iterator[Finding]:
    advice = "Look at DATABASE_URL, and at that server."
    try:
        connection.ensure_connection()
        took = min(_query_ms() for _ in range(3))
        executor = MigrationExecutor(connection)
        missing = executor.migration_plan(executor.loader.graph.leaf_nodes())
    except DatabaseError as error:
        yield fail("database", f"does not answer: {error}".strip()[:300], advice)
        return
    seen = f"{connection.vendor}, {took:.1f} ms a query"
    yield ok("database", seen) if took < SLOW_MS else warn("database", seen, "It is far or overloaded.")
    if missing:
        names = ", ".join(f"{migration.app_label}.{migration.name}" for migration, _ in missing[:5])
        yield fail(
            "migrations",
            f"{len(missing)} not applied: {names}",
            "Run `manage.py migrate`, as `up` does.",
        )
    else:
        yield ok("migrations", "all applied")
    if connection.vendor == "sqlite" and settings.E2A.production:
        yield warn("database", "SQLite in production", "It serves one host. For more, use PostgreSQL.")


def _query_ms() -> float:
    began = time.perf_counter()
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        cursor.fetchone()
    return (time.perf_counter() - began) * 1000


def _redis() -> redis.Redis:
    """A client of our own: the process's keeps a dead connection for others."""
    return redis.Redis.from_url(settings.E2A.redis_url, socket_timeout=2.0, socket_connect_timeout=2.0)


def redis_findings() -> Iterator[Finding]:
    own = settings.E2A.redis_is_own
    try:
        with _redis() as client:
            client.ping()
            began = time.perf_counter()
            client.ping()
            took = (time.perf_counter() - began) * 1000
            policy = str(client.info("memory").get("maxmemory_policy", "noeviction"))
    except redis.RedisError as error:
        advice = "`manage.py up` starts one." if own else "Look at REDIS_URL, and at that server."
        yield fail("redis", f"does not answer: {error}"[:300], advice)
        return
    seen = f"{took:.1f} ms a call"
    yield ok("redis", seen) if took < SLOW_MS else warn("redis", seen, "It is far or overloaded.")
    if policy != "noeviction":
        yield warn(
            "redis", f"maxmemory-policy is {policy}", "Set noeviction: the queue must not lose messages."
        )


def clock_findings() -> Iterator[Finding]:
    """This host's clock beside Redis's and the database's."""
    seen = 0
    try:
        with _redis() as client:
            began = time.time()
            whole, millionths = client.time()
            there = whole + millionths / 1e6
            yield _clock("Redis", there - (began + time.time()) / 2)
            seen += 1
    except redis.RedisError:
        pass  # The line on Redis says so.
    if connection.vendor == "postgresql":
        try:
            began = time.time()
            with connection.cursor() as cursor:
                cursor.execute("SELECT extract(epoch FROM clock_timestamp())")
                there = float(cursor.fetchone()[0])
            yield _clock("PostgreSQL", there - (began + time.time()) / 2)
            seen += 1
        except DatabaseError:
            pass  # The line on the database says so.
    if not seen:
        yield warn("clock", "nothing to compare it with", "Bring Redis up, and run this again.")


def _clock(other: str, ahead_seconds: float) -> Finding:
    seen = f"{other} is {ahead_seconds:+.2f} s from this host"
    advice = "Set both by NTP: tokens, leases and the gateway's signatures compare times."
    if abs(ahead_seconds) > BAD_CLOCK_SECONDS:
        return fail("clock", seen, advice)
    return warn("clock", seen, advice) if abs(ahead_seconds) > CLOCK_SECONDS else ok("clock", seen)

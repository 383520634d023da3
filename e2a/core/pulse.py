"""The sign of life of beat: a periodic task that notes when it ran. Somebody asked for it, and a worker heard."""

from __future__ import annotations

import time

from django.conf import settings

from e2a.core.redis_client import redis_client

BEAT_SECONDS = 10.0
_KEPT_SECONDS = 24 * 3600


def _key() -> str:
    return f"e2a:{settings.E2A.instance}:beat-pulse"


def pulse_note() -> None:
    """Say that beat lives. Raises `redis.RedisError`."""
    redis_client().set(_key(), f"{time.time():.3f}", ex=_KEPT_SECONDS)


def pulse_age() -> float | None:
    """Seconds since beat's last sign, None when there is none of the last day. Raises `redis.RedisError`."""
    found = redis_client().get(_key())
    return None if found is None else max(0.0, time.time() - float(found))

"""Whether workers listen to every queue, and beat asks for the periodic work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import redis
from django.conf import settings
from django.db import DatabaseError

from e2a.celery import app
from e2a.core.diagnosis import Finding, fail, ok
from e2a.core.pulse import BEAT_SECONDS, pulse_age
from sandboxes.lifecycle import node_queue
from sandboxes.models import Node

ANSWER_SECONDS = 2.0
START = "Start it with `manage.py up`, or as docs/reference/commands.md says."
LATE = 6 * BEAT_SECONDS


def process_findings() -> Iterator[Finding]:
    try:
        age = pulse_age()
        listened = _queues()
    except (redis.RedisError, OSError) as error:
        yield fail("workers", f"not known, Redis does not answer: {error}"[:300], "See the line on Redis.")
        return
    for queue, what in _wanted():
        if listened.get(queue):
            yield ok(f"queue {queue}", f"heard by {', '.join(sorted(listened[queue]))}")
        else:
            yield fail(f"queue {queue}", f"nobody listens: {what}", START)
    if age is None or age > LATE:
        seen = "no sign of it" if age is None else f"last sign {age:.0f} s ago"
        yield fail("beat", seen, f"{START} It also needs a worker of the queue control.")
    else:
        yield ok("beat", f"last sign {age:.0f} s ago")


def _wanted() -> Iterator[tuple[str, str]]:
    yield "control", "no mail, nothing configured, nothing reaped"
    yield "turns", "no agent's task runs"
    yield "provision", "no cold sandbox is made"
    try:
        names = list(Node.objects.values_list("name", flat=True))
    except DatabaseError:
        names = [settings.E2A.node_name]
    for name in names:
        yield node_queue(name), "its sandboxes are removed by its sweep only"


def _queues() -> dict[str, set[str]]:
    """Which workers listen to which queue, of those that answer within 2 s."""
    # Fails at once where Celery itself would try to reach a dead broker for ever.
    with redis.Redis.from_url(
        settings.E2A.redis_url, socket_timeout=2.0, socket_connect_timeout=2.0
    ) as client:
        client.ping()
    answers: dict[str, list[dict[str, Any]]] = (
        app.control.inspect(timeout=ANSWER_SECONDS).active_queues() or {}
    )
    found: dict[str, set[str]] = {}
    for worker, queues in answers.items():
        for queue in queues:
            found.setdefault(str(queue["name"]), set()).add(worker)
    return found

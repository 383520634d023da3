"""Background work is asked for by name, after commit."""

from __future__ import annotations

import functools
from typing import Any

import structlog
from celery import current_app
from django.db import transaction

log = structlog.get_logger(__name__)


def enqueue(name: str, /, *, queue: str | None = None, **ids: int | str) -> None:
    """Ask for the task `name` once the surrounding transaction commits; a rollback asks for nothing.

    Raises `KeyError` at once for a name that no app registers. `ids` are ids only: never a secret, never a row. A
    broker that cannot be reached is logged, not raised: the row is the wish and the sweeps find it (CONTRACT: accepted
    work survives an outage of Redis). `queue` overrides the task's own queue, for `node.<name>`.
    """
    task = current_app.tasks[name]
    transaction.on_commit(functools.partial(_send, task, queue, ids))


def _send(task: Any, queue: str | None, ids: dict[str, int | str]) -> None:
    options: dict[str, Any] = {"retry": False}
    if queue is not None:
        options["queue"] = queue
    try:
        task.apply_async(kwargs=ids, **options)
    except (*task.app.connection_for_write().connection_errors, task.OperationalError, OSError) as error:
        log.warning("enqueue.broker_down", task=task.name, error=type(error).__name__, **ids)

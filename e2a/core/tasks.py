"""Core's periodic work."""

from __future__ import annotations

from celery import shared_task

from e2a.core.idempotency import records_purge


@shared_task(name="e2a.core.tasks.purge")
def purge() -> None:
    """Forget stored answers after 24 h."""
    records_purge()

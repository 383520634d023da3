"""Core's periodic work."""

from __future__ import annotations

from celery import shared_task

from e2a.core.idempotency import records_purge
from e2a.core.pulse import pulse_note


@shared_task(name="e2a.core.tasks.purge")
def purge() -> None:
    """Forget stored answers after 24 h."""
    records_purge()


@shared_task(name="e2a.core.tasks.pulse")
def pulse() -> None:
    """Note that beat asks and a worker hears, for `manage.py doctor`."""
    pulse_note()

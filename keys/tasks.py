"""Background work on API keys."""

from __future__ import annotations

from celery import shared_task

from keys import services


@shared_task(name="keys.tasks.ended_keys_tell")
def ended_keys_tell() -> None:
    """Every few seconds: close the sockets of keys whose grace time or expiry has passed."""
    services.ended_keys_tell()

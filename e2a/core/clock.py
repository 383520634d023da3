"""Time, in one form: aware UTC inside, RFC 3339 with `Z` outside."""

from __future__ import annotations

import datetime as dt

from django.utils import timezone


def now() -> dt.datetime:
    """The current time, aware, UTC."""
    return timezone.now()


def seconds(count: float) -> dt.timedelta:
    """A span of so many seconds."""
    return dt.timedelta(seconds=count)


def rfc3339(moment: dt.datetime | None) -> str | None:
    """`2026-11-24T10:00:00.123456Z`; `None` stays `None`."""
    if moment is None:
        return None
    return moment.astimezone(dt.UTC).isoformat().replace("+00:00", "Z")

"""`?after=`: where a list that grows at its end is read on."""

from __future__ import annotations

from django.http import HttpRequest

from e2a.core.errors import ValidationFailed

_LARGEST = 2**63 - 1


def after_of(request: HttpRequest) -> int:
    """`?after=`, default 0. Raises `ValidationFailed` for what is no position."""
    raw = request.GET.get("after", "0")
    if not (raw.isascii() and raw.isdigit() and len(raw) <= 19 and int(raw) <= _LARGEST):
        raise ValidationFailed.of("after", "invalid_after", "after is a whole number from 0.")
    return int(raw)

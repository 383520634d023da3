"""Cursor lists: newest first, `?limit=` and `?cursor=`, stable while rows come and go."""

from __future__ import annotations

import base64
import binascii
from typing import Any, TypeVar

from django.db import models
from django.http import HttpRequest

from e2a.core.errors import ValidationFailed

Row = TypeVar("Row", bound=models.Model)
DEFAULT_LIMIT = 20
MAX_LIMIT = 100


def limit_of(request: HttpRequest, *, default: int = DEFAULT_LIMIT, most: int = MAX_LIMIT) -> int:
    """`?limit=`, 1 to `most`. Raises `ValidationFailed` for anything else."""
    raw = request.GET.get("limit")
    if raw is None:
        return default
    if not (raw.isascii() and raw.isdigit() and len(raw) < 8 and 1 <= int(raw) <= most):
        raise ValidationFailed.of("limit", "invalid_limit", f"limit is a whole number from 1 to {most}.")
    return int(raw)


def _decode(cursor: str) -> int:
    try:
        text = base64.urlsafe_b64decode(cursor.encode() + b"=" * (-len(cursor) % 4)).decode()
        if not text.startswith("c") or not text[1:].isdigit() or len(text) > 19:
            raise ValueError(text)
        return int(text[1:])
    except (ValueError, binascii.Error, UnicodeError) as error:
        raise ValidationFailed.of("cursor", "invalid_cursor", "This cursor is not one of ours.") from error


def page(rows: models.QuerySet[Row], request: HttpRequest) -> tuple[list[Row], str | None]:
    """One page of `rows`, newest first by primary key, and the cursor of the next (`None` at the end).

    Raises `ValidationFailed` on a bad limit or cursor. One query.
    """
    limit = limit_of(request)
    cursor = request.GET.get("cursor")
    if cursor:
        rows = rows.filter(pk__lt=_decode(cursor))
    found: list[Row] = list(rows.order_by("-pk")[: limit + 1])
    if len(found) <= limit:
        return found, None
    last: Any = found[limit - 1].pk
    return found[:limit], base64.urlsafe_b64encode(f"c{last}".encode()).decode().rstrip("=")

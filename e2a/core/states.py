"""States move by compare-and-swap: one conditional UPDATE, whose count says whether we were the one who moved it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.db import models

Transitions = Mapping[str, frozenset[str]]
"""For each state, the states that it may come from."""


def sources(transitions: Transitions, to: str) -> frozenset[str]:
    """The states from which `to` may be entered. Raises `KeyError` for a state that the table does not know."""
    return transitions[to]


def advance(
    rows: models.QuerySet[Any], *, to: str, transitions: Transitions, field: str = "state", **updates: Any
) -> int:
    """Move the rows that may move to `to`, setting `updates` with it; returns how many moved.

    For one row, 0 means that somebody else got there first or that the move is not allowed. The update is one
    statement, so it is safe without a row lock on every database (SQLite ignores `select_for_update`).
    """
    return rows.filter(**{f"{field}__in": sources(transitions, to)}).update(**{field: to}, **updates)

"""How well the warm pool serves: hits, and misses with their reasons, counted from the rows when somebody asks.

A create writes its own outcome with its row (`is_warm`, `pool_miss`), so counting costs the hot path nothing.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field
from typing import Any

from django.db.models import Count

from e2a.core.clock import now
from sandboxes.models import UNREADY_STATES, PoolMiss, Sandbox, SandboxState, Template
from sandboxes.selectors import nodes_usable

DAY = dt.timedelta(days=1)
KEPT = dt.timedelta(days=30)
"""Rows older than that are gone, so nothing earlier can be counted."""


@dataclass(slots=True)
class PoolFigures:
    """One template's pool: what is there now, and what creates of a span of time found."""

    template: str
    wanted: int = 0
    parked: int = 0
    coming: int = 0
    hits: int = 0
    misses: dict[str, int] = field(default_factory=dict)

    @property
    def missed(self) -> int:
        return sum(self.misses.values())

    @property
    def hit_rate(self) -> float | None:
        """The share of creates that were warm; None when there were none."""
        asked = self.hits + self.missed
        return self.hits / asked if asked else None

    @property
    def reasons(self) -> str:
        """The misses in words, the most frequent first."""
        ordered = sorted(self.misses.items(), key=lambda item: (-item[1], item[0]))
        return "; ".join(f"{count} × {reason_in_words(reason)}" for reason, count in ordered)

    def as_dict(self) -> dict[str, Any]:
        return {
            "template": self.template,
            "wanted": self.wanted,
            "parked": self.parked,
            "coming": self.coming,
            "hits": self.hits,
            "misses": dict(sorted(self.misses.items())),
            "hit_rate": self.hit_rate,
        }


def reason_in_words(reason: str) -> str:
    """A sentence for an operator. Rows of before there were reasons have none."""
    return PoolMiss(reason).label if reason in PoolMiss.values else "nobody wrote down why"


def pool_figures(*, since: dt.timedelta = DAY) -> list[PoolFigures]:
    """The figures of each enabled template, and of any that creates asked for lately. Four queries."""
    found = {name: PoolFigures(name) for name in _templates()}
    for node in nodes_usable():
        for name, size in node.pool.items():
            if name in found:
                found[name].wanted += int(size)
    pool = (
        Sandbox.objects.filter(tenant__isnull=True)
        .values("template__name", "state")
        .annotate(many=Count("pk"))
    )
    for row in pool.filter(state__in=[*UNREADY_STATES, SandboxState.PARKED]):
        figures = found.setdefault(row["template__name"], PoolFigures(row["template__name"]))
        if row["state"] == SandboxState.PARKED:
            figures.parked += row["many"]
        else:
            figures.coming += row["many"]
    asked = Sandbox.objects.filter(tenant__isnull=False, claimed_at__gte=now() - min(since, KEPT))
    for asking in asked.values("template__name", "is_warm", "pool_miss").annotate(many=Count("pk")):
        figures = found.setdefault(asking["template__name"], PoolFigures(asking["template__name"]))
        if asking["is_warm"]:
            figures.hits += asking["many"]
        else:
            reason = asking["pool_miss"] or "unknown"
            figures.misses[reason] = figures.misses.get(reason, 0) + asking["many"]
    return sorted(found.values(), key=lambda figures: figures.template)


def pool_figures_of(template: str, *, since: dt.timedelta = DAY) -> PoolFigures:
    return next(
        (figures for figures in pool_figures(since=since) if figures.template == template),
        PoolFigures(template),
    )


def _templates() -> list[str]:
    rows = Template.objects.filter(is_enabled=True)
    return list(rows.values_list("name", flat=True))

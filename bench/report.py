"""The table: what was measured, under which conditions, against which goals. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.samples import Summary


@dataclass(frozen=True, slots=True)
class Goal:
    """A promise with a number. `measured` and `limit` are in `unit`."""

    promise: str
    measured: float
    limit: float
    unit: str
    at_least: bool = False
    """The limit is the least that is good, not the most."""

    @property
    def is_met(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads as text too. The first column is text, the others numbers."""
    lines = [list(head), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]

    def line_of(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([first, *others]) + " |"

    rule = ["-" * widths[0], *["-" * (width - 1) + ":" for width in widths[1:]]]
    return "\n".join([line_of(lines[0]), "| " + " | ".join(rule) + " |", *map(line_of, lines[1:])])


def milliseconds(value: float) -> str:
    """With as many digits as mean something."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def times_table(summaries: Mapping[str, Summary]) -> str:
    rows = [
        (name, str(found.count), *map(milliseconds, (found.p50, found.p95, found.p99)))
        for name, found in summaries.items()
    ]
    return table(("Milliseconds", "n", "p50", "p95", "p99"), rows)


def goals_table(goals: Sequence[Goal]) -> str:
    """Whether each promise was kept on this machine, in this run."""
    rows = []
    for goal in goals:
        sign = "≥" if goal.at_least else "≤"
        limit = f"{sign} {goal.limit:g} {goal.unit}"
        measured = (
            f"{goal.measured:.2f} {goal.unit}" if goal.measured < 10 else f"{goal.measured:.1f} {goal.unit}"
        )
        rows.append((goal.promise, limit, measured, "met" if goal.is_met else "NOT MET"))
    return table(("Goal", "Limit", "Measured", ""), rows)


def document(
    *,
    conditions: Mapping[str, str],
    summaries: Mapping[str, Summary],
    ratios: Mapping[str, float],
    memory: Mapping[str, tuple[float, float]],
    goals: Sequence[Goal],
    notes: Sequence[str],
) -> str:
    """The whole of RESULTS.md. `memory` is PSS and private memory in MB by process."""
    parts = [
        "# Measured",
        "Written by `.venv/bin/python -m bench`: one run, all measures in turns, so that a busy machine is unfair "
        "to all of them alike.",
        "## Conditions",
        "\n".join(f"- {name}: {value}" for name, value in conditions.items()),
        "## Goals",
        goals_table(goals),
        "## Times",
        times_table(summaries),
        "## Ratios of the medians",
        table(("", "times"), [(name, f"{value:.2f}") for name, value in ratios.items()]),
        "## Memory when idle",
        table(
            ("MB", "PSS", "private"),
            [(name, f"{pss:.1f}", f"{own:.1f}") for name, (pss, own) in memory.items()],
        ),
        "## How to read it",
        "\n".join(f"- {note}" for note in notes),
    ]
    return "\n\n".join(parts) + "\n"

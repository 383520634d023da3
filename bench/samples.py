"""Times that were taken, and what is said about them. Pure."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


def percentile(ordered: Sequence[float], share: float) -> float:
    """The nearest-rank percentile of values in ascending order: always one that was measured.

    Of fewer than 100 values, p99 is the greatest. Raises ValueError without values.
    """
    if not ordered:
        raise ValueError("no values")
    return ordered[max(1, math.ceil(share * len(ordered))) - 1]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a line of the table says of one measure. Milliseconds."""

    count: int
    p50: float
    p95: float
    p99: float


def summary(values: Sequence[float]) -> Summary:
    """Raises ValueError without values."""
    ordered = sorted(values)
    return Summary(
        len(ordered), percentile(ordered, 0.50), percentile(ordered, 0.95), percentile(ordered, 0.99)
    )


@dataclass(slots=True)
class Samples:
    """Milliseconds by measure, in the order in which measures first came up."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, measure: str, milliseconds: float) -> None:
        self.values.setdefault(measure, []).append(milliseconds)

    @contextmanager
    def timed(self, measure: str) -> Iterator[None]:
        """Time what is done inside; nothing is added when it raises."""
        began = time.perf_counter()
        yield
        self.add(measure, (time.perf_counter() - began) * 1000)

    def time_call(self, measure: str, call: Callable[[], T]) -> T:
        """What `call` returns; its time is added."""
        began = time.perf_counter()
        found = call()
        self.add(measure, (time.perf_counter() - began) * 1000)
        return found

    def summaries(self) -> dict[str, Summary]:
        return {measure: summary(values) for measure, values in self.values.items()}

    def median(self, measure: str) -> float:
        """Raises KeyError for a measure that has no value."""
        return summary(self.values[measure]).p50

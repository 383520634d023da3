"""What a node saw of its containers while they lived, so that something can be said when one died suddenly.

Memory is read on the host every few seconds, since a container's counters go with it; what the engine said of kills
and ends is kept as it comes. All of it is in the node process's memory: a node that was restarted has a curve from
its start on, and the kernel's own peak of the whole life.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime

from e2a.core.clock import now
from sandboxes.engines.base import ContainerEvent, MemoryUse

SAMPLE_SECONDS = 5.0
POINTS = 120
"""Of one curve; when it is full, two points become one (the higher), and each then stands for twice the time."""
FORGET_SECONDS = 600.0
"""What no row was asked about for so long is forgotten: a removal has had its time."""

Key = tuple[str, int]
"""Sandbox id and generation."""


@dataclass(slots=True)
class Curve:
    """Bytes over time, in at most `POINTS` points."""

    step: float = SAMPLE_SECONDS
    points: list[tuple[float, int]] = field(default_factory=list)
    """When (seconds since the epoch) a step began, and the most of it."""

    def add(self, at: float, value: int) -> None:
        # A sample that comes a little early belongs to the next step all the same.
        if self.points and at - self.points[-1][0] < 0.75 * self.step:
            began, before = self.points[-1]
            self.points[-1] = (began, max(before, value))
            return
        self.points.append((at, value))
        if len(self.points) > POINTS:
            pairs = [self.points[index : index + 2] for index in range(0, len(self.points), 2)]
            self.points = [(pair[0][0], max(value for _, value in pair)) for pair in pairs]
            self.step *= 2


@dataclass(slots=True)
class Seen:
    """What is known of one container; None: nobody saw it."""

    curve: Curve = field(default_factory=Curve)
    peak_bytes: int | None = None
    oom_kills: int | None = None
    oom_at: datetime | None = None
    """When the kernel last killed something in it for memory, as far as the engine said so."""
    died_at: datetime | None = None
    exit_code: int | None = None
    touched: float = field(default_factory=time.monotonic)


class Witness:
    """Of all containers of one node. For any thread."""

    def __init__(self) -> None:
        self._seen: dict[Key, Seen] = {}
        self._lock = threading.Lock()

    def sampled(self, key: Key, use: MemoryUse) -> None:
        """One look at its memory."""
        with self._lock:
            seen = self._of(key)
            seen.curve.add(now().timestamp(), use.used_bytes)
            seen.peak_bytes = max(seen.peak_bytes or 0, use.peak_bytes or 0, use.used_bytes)
            if use.oom_kills is not None:
                seen.oom_kills = max(seen.oom_kills or 0, use.oom_kills)

    def told(self, event: ContainerEvent) -> None:
        """The engine said that something happened to it."""
        key = (event.sandbox_id, event.generation)
        if event.kind == "oom":
            with self._lock:
                self._of(key).oom_at = event.at
        elif event.kind == "died":
            with self._lock:
                seen = self._of(key)
                seen.died_at, seen.exit_code = event.at, event.exit_code

    def seen(self, key: Key) -> Seen | None:
        """None when nothing is known. What it returns goes on changing."""
        with self._lock:
            return self._seen.get(key)

    def forget(self, key: Key) -> None:
        with self._lock:
            self._seen.pop(key, None)

    def keep(self, living: Iterable[Key]) -> None:
        """Say which are of interest; the others are forgotten in a while."""
        moment = time.monotonic()
        with self._lock:
            for key in living:
                if (seen := self._seen.get(key)) is not None:
                    seen.touched = moment
            for key in [key for key, seen in self._seen.items() if moment - seen.touched > FORGET_SECONDS]:
                del self._seen[key]

    def _of(self, key: Key) -> Seen:
        return self._seen.setdefault(key, Seen())

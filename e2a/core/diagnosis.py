"""What a look at the machine found, and how looks are run: each by itself, each with an end.

The looks themselves are `sandboxes.diagnosis` and `e2a.diagnosis`; `manage.py doctor` shows what they found.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import structlog

log = structlog.get_logger(__name__)

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, how it is, what was seen, and what to do about it (empty when it is ok)."""

    check: str
    level: Level
    seen: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        return dict(asdict(self))


def ok(check: str, seen: str) -> Finding:
    return Finding(check, "ok", seen)


def warn(check: str, seen: str, advice: str) -> Finding:
    return Finding(check, "warn", seen, advice)


def fail(check: str, seen: str, advice: str) -> Finding:
    return Finding(check, "fail", seen, advice)


@dataclass(frozen=True, slots=True)
class Look:
    """One thing to look at. It may find several things; it has `limit_seconds` for all of them."""

    name: str
    find: Callable[[], Iterable[Finding]]
    limit_seconds: float = 10.0


def findings_of(looks: Sequence[Look]) -> list[Finding]:
    """Run all looks at the same time, and say what they found in their order. Never raises.

    One that fails or does not end in its time is a finding itself; its thread is left behind.
    """
    running = [_Running(look) for look in looks]
    for one in running:
        one.thread.start()
    return [finding for one in running for finding in one.result()]


class _Running:
    def __init__(self, look: Look) -> None:
        self.look = look
        self.found: list[Finding] = []
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run, name=f"look-{look.name}", daemon=True)

    def _run(self) -> None:
        from django.db import connections

        try:
            for finding in self.look.find():
                self.found.append(finding)
        except Exception as error:
            log.debug("diagnosis.look_failed", look=self.look.name, error=str(error), exc_info=True)
            self.error = error
        finally:
            connections.close_all()

    def result(self) -> list[Finding]:
        # Looks run at once, so whoever is asked later has had the time of the earlier ones as well.
        self.thread.join(self.look.limit_seconds)
        found = list(self.found)
        if self.thread.is_alive():
            limit = f"no answer within {self.look.limit_seconds:g} s"
            return [
                *found,
                fail(self.look.name, limit, "What it asks is overloaded or hangs; look at its own log."),
            ]
        if self.error is not None:
            seen = f"could not be looked at: {type(self.error).__name__}: {self.error}"[:300]
            return [*found, fail(self.look.name, seen, "Mend what the message names, and run this again.")]
        return found

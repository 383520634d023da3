"""How long a wait may last, and how it ends."""

from __future__ import annotations

import time

from e2a.core.errors import DeadlineExceeded

ANSWER_SECONDS = 10.0
"""For a call whose answer is at hand: all but streams."""
CONNECT_SECONDS = 2.0
"""For the gateway to take a connection; it is on this host or one hop away."""
SILENCE_SECONDS = 30.0
"""For a stream without a byte. Guests send a keep-alive every 10 s."""

_GRACE_SECONDS = 30.0
_LONGEST_RUN_SECONDS = 7200.0


class Deadline:
    """A point in time. `seconds` None: none of its own, only silence ends the wait."""

    def __init__(self, what: str, seconds: float | None) -> None:
        self.what = what
        self.seconds = seconds
        self._ends_at = None if seconds is None else time.monotonic() + seconds

    def remaining(self, at_most: float) -> float:
        """Seconds that may be waited now. Raises DeadlineExceeded when none are left."""
        if self._ends_at is None or self.seconds is None:
            return at_most
        left = self._ends_at - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(self.what, self.seconds)
        return min(left, at_most)


def run_deadline(timeout_seconds: float | None, deadline_seconds: float | None) -> float:
    """How long `run` waits for a process with that time limit. Without any, as long as a sandbox may live."""
    if deadline_seconds is not None:
        return deadline_seconds
    return _LONGEST_RUN_SECONDS if timeout_seconds is None else timeout_seconds + _GRACE_SECONDS

"""A process's output and end, gathered from frames into one bounded result."""

from __future__ import annotations

import time

from sandboxes.guest_client.frames import Exit, Frame, Gap, Output
from sandboxes.guest_client.shapes import Completed

KEPT_BYTES = 1024 * 1024


class Collected:
    """Keeps the first `max_bytes` of each stream and counts the rest."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept = {"stdout": bytearray(), "stderr": bytearray()}
        self._counted = {"stdout": 0, "stderr": 0}
        self._has_gap = False
        self._began_at = time.monotonic()

    def add(self, frame: Frame) -> Completed | None:
        """The result once `frame` is the exit."""
        if isinstance(frame, Output):
            kept = self._kept[frame.stream]
            kept += frame.data[: self._max_bytes - len(kept)]
            self._counted[frame.stream] += len(frame.data)
        elif isinstance(frame, Gap):
            self._has_gap = True
        else:
            return self._completed(frame)
        return None

    def _completed(self, end: Exit) -> Completed:
        process = end.process
        stdout, stderr = bytes(self._kept["stdout"]), bytes(self._kept["stderr"])
        counted = self._counted
        return Completed(
            exit_code=process.exit_code,
            signal=process.signal,
            stdout=stdout,
            stderr=stderr,
            stdout_bytes=counted["stdout"],
            stderr_bytes=counted["stderr"],
            truncated=self._has_gap or counted["stdout"] > len(stdout) or counted["stderr"] > len(stderr),
            duration_ms=round((time.monotonic() - self._began_at) * 1000),
            oom=process.oom,
            timed_out=process.timed_out,
        )

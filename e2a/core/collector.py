"""Python's garbage collector in a process that serves."""

from __future__ import annotations

import gc


def collector_settle() -> None:
    """What is loaded now stays: the collector need not look at it again, nor come round after each few requests. Call
    once, when all is imported: a round over everything costs tens of milliseconds."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(25_000, 20, 20)

"""Make and remove many sandboxes on Docker, and see that nothing stays: `.venv/bin/python -m bench.soak --count 1000`.

Starts a stack of its own in a temporary folder. Each sandbox is made by the API; most are used once they run, every
fourth is destroyed while it is still being made. At the end every container, folder, mount and loop device of the
installation must be gone, and the memory and open files of its processes must not have grown with the count.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.memory import megabytes, parents, with_descendants
from bench.product import Caller, Watcher, check
from tests.live import LiveStack, wait_for
from tests.sandboxes.leftovers import left_over, volumes

PARALLEL = 4
KEYS_A_MAKER = 2
"""A key may call 600 times a minute; a sandbox takes three calls."""
READY_SECONDS = 110.0
GONE_SECONDS = 180.0


@dataclass(slots=True)
class Soak:
    """What the makers share."""

    stack: LiveStack
    watcher: Watcher
    callers: list[list[Caller]]
    numbers: Iterator[int]
    made: int = 0
    used: int = 0
    cut_short: int = 0
    errors: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def work(self, maker: int) -> None:
        """Make and remove one after the other until the numbers end, or somebody failed."""
        calls = itertools.cycle(self.callers[maker])
        for number in self.numbers:
            if self.errors:
                return
            try:
                self._one(number, next(calls))
            except Exception as error:
                self.errors.append(f"sandbox {number}: {type(error).__name__}: {error}"[:500])
                return

    def _one(self, number: int, caller: Caller) -> None:
        made = caller.call("POST", "/v1/sandboxes", {}, wants=201)
        where = f"/v1/sandboxes/{made['vm_id']}"
        is_used = number % 4 != 3
        if is_used:
            wait_for(
                lambda: self._state(made["vm_id"]) == "running",
                what=f"{made['vm_id']} runs",
                seconds=READY_SECONDS,
            )
            done = caller.call("POST", f"{where}/exec", {"command": f"echo {number}"}, wants=200)
            check(done["stdout"] == f"{number}\n", done)
        caller.call("DELETE", where, wants=200)
        with self.lock:
            self.made += 1
            self.used += is_used
            self.cut_short += not is_used

    def _state(self, sandbox_id: str) -> str:
        ((state,),) = self.watcher.rows("SELECT state FROM sandboxes_sandbox WHERE public_id = ?", sandbox_id)
        return str(state)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a soak saw. `left_over` empty is what it is about."""

    made: int
    used: int
    seconds: float
    left_over: list[str]
    new_volumes: list[str]
    reasons: dict[str, int]
    megabytes_before: float
    megabytes_after: float
    files_before: int
    files_after: int

    def lines(self) -> list[str]:
        return [
            f"{self.made} sandboxes made and removed in {self.seconds:.0f} s "
            f"({self.made / self.seconds:.1f} a second), "
            f"{self.used} of them used, {self.made - self.used} destroyed at once",
            "ended because: "
            + ", ".join(f"{reason} {count}" for reason, count in sorted(self.reasons.items())),
            f"left over: {len(self.left_over)} containers, folders, mounts, loops; {len(self.new_volumes)} volumes",
            f"the product's processes: {self.megabytes_before:.0f} → {self.megabytes_after:.0f} MB PSS, "
            f"{self.files_before} → {self.files_after} open files",
            *self.left_over[:20],
        ]


def soak(folder: Path, *, count: int, pool_size: int = 2) -> Outcome:
    """Make and remove `count` sandboxes. Raises WrongAnswer or AssertionError when one went wrong."""
    volumes_before = volumes()
    with LiveStack(folder, environment={"E2A_POOL": f"standard={pool_size}"}) as stack:
        watcher = Watcher(stack.data_dir / "db.sqlite3", pool_size)
        watcher.wait_settled()
        work = Soak(stack, watcher, _callers(stack), _Shared(count))
        memory, files = _processes(stack)
        began = time.monotonic()
        threads = [threading.Thread(target=work.work, args=(maker,)) for maker in range(PARALLEL)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(10 / PARALLEL)
            say(f"{work.made} of {count}, {time.monotonic() - began:.0f} s")
        check(not work.errors, work.errors)
        query = "SELECT count(*) FROM sandboxes_sandbox WHERE tenant_id IS NOT NULL AND state != 'destroyed'"
        wait_for(lambda: watcher.rows(query) == [(0,)], what="all destroyed", seconds=GONE_SECONDS, every=0.2)
        took = time.monotonic() - began
        watcher.wait_settled()  # What the pool is making now is not left over.
        memory_after, files_after = _processes(stack)
        reasons = dict(
            watcher.rows(
                "SELECT death_reason, count(*) FROM sandboxes_sandbox WHERE tenant_id IS NOT NULL GROUP BY death_reason"
            )
        )
        instance = (stack.data_dir / "instance").read_text().strip()
        parked = {
            str(row[0])
            for row in watcher.rows("SELECT public_id FROM sandboxes_sandbox WHERE state != 'destroyed'")
        }
        left = [
            item
            for item in left_over(instance, stack.data_dir / "sandboxes")
            if not _is_parked(item, parked, watcher)
        ]
    return Outcome(
        work.made,
        work.used,
        took,
        left,
        sorted(volumes() - volumes_before),
        reasons,
        memory,
        memory_after,
        files,
        files_after,
    )


def _is_parked(item: str, parked: set[str], watcher: Watcher) -> bool:
    """Whether that belongs to the pool, which is still there."""
    held = set(watcher.parked_containers())
    return any(name in item for name in parked) or item.removeprefix("container ") in held


class _Shared:
    """An iterator that threads may share."""

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._numbers = iter(range(count))

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        with self._lock:
            return next(self._numbers)


def _callers(stack: LiveStack) -> list[list[Caller]]:
    """For each maker clients of its own, each with its own key."""
    account = stack.sign_in("soak@example.com")
    with sqlite3.connect(stack.data_dir / "db.sqlite3", timeout=30) as database:
        database.execute("UPDATE accounts_tenant SET max_live_sandboxes = 60")

    def key() -> str:
        return str(stack.request("POST", "/v1/api-keys", {}, token=account).json()["key"])

    return [[Caller(stack, key()) for _ in range(KEYS_A_MAKER)] for _ in range(PARALLEL)]


def _processes(stack: LiveStack) -> tuple[float, int]:
    """Memory (MB, PSS) and open files of all processes of the product."""
    parent_of = parents()
    pids = [one for pid in stack.children().values() for one in with_descendants(pid, parent_of)]
    return megabytes(pids)[0], sum(_open_files(pid) for pid in pids)


def _open_files(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m bench.soak"
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument(
        "--pool", type=int, default=2, help="parked ones, so that warm and cold are both seen (2)"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="e2a-soak-") as folder:
        outcome = soak(Path(folder), count=options.count, pool_size=options.pool)
    print("\n".join(outcome.lines()))
    if outcome.left_over or outcome.new_volumes:
        sys.exit(1)


if __name__ == "__main__":
    main()

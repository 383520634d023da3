"""Who descends from a process, from /proc. Only for the process engine: Docker has its cgroups for this."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (proc(5), field 22). None when there is none."""
    fields = _fields(pid)
    return int(fields[19]) if fields else None


def status_letter(pid: int) -> str | None:
    """The state letter of proc(5): R, S, T (stopped), Z (ended, not yet reaped)… None when there is none."""
    fields = _fields(pid)
    return fields[0] if fields else None


def family(pid: int) -> set[tuple[int, int]]:
    """A process, its session and all their descendants, as (pid, start ticks)."""
    parents: dict[int, int] = {}
    members: set[int] = set()
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (fields := _fields(int(entry.name))):
            number = int(entry.name)
            parents[number], ticks[number] = int(fields[1]), int(fields[19])
            if number == pid or int(fields[3]) == pid:
                members.add(number)
    grown = True
    while grown:
        born = {number for number, parent in parents.items() if parent in members} - members
        members |= born
        grown = bool(born)
    return {(number, ticks[number]) for number in members if number in ticks}


def signal_all(members: Iterable[tuple[int, int]], number: signal.Signals) -> None:
    """Send a signal to each, unless its pid is somebody else's by now."""
    for pid, ticks in members:
        if start_ticks(pid) == ticks:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def _fields(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the state letter on; its name may hold spaces and brackets."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []

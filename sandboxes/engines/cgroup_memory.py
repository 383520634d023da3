"""What the kernel counts of a container's memory, read on the host: it needs nothing of the guest, nor of Docker.

Files of cgroup version 1 and 2, where Docker's two drivers (`cgroupfs`, `systemd`) put them. About 60 µs a look.
"""

from __future__ import annotations

import re
from pathlib import Path

from sandboxes.engines.base import MemoryUse

ROOT = Path("/sys/fs/cgroup")
SOCKET_SHARE = 16
_CONTAINER_ID = re.compile(r"[0-9a-f]{12,64}")
_PLACES = (
    "memory/docker/{0}",
    "memory/system.slice/docker-{0}.scope",
    "docker/{0}",
    "system.slice/docker-{0}.scope",
)


def memory_use(container_id: str, *, root: Path = ROOT) -> MemoryUse | None:
    """None for a container that is gone, and where the kernel or the host's layout shows nothing."""
    if not _CONTAINER_ID.fullmatch(container_id):
        return None
    for place in _PLACES:
        folder = root / place.format(container_id)
        if (used := _number(folder / "memory.usage_in_bytes")) is not None:
            peak = _number(folder / "memory.max_usage_in_bytes")
            return _use(folder, used, "total_inactive_file", peak, "memory.oom_control")
        if (used := _number(folder / "memory.current")) is not None:
            peak = _number(folder / "memory.peak")  # Since Linux 5.19.
            return _use(folder, used, "inactive_file", peak, "memory.events")
    return None


def limit_sockets(container_id: str, *, root: Path = ROOT) -> bool:
    """Count the buffers of its TCP and UDP sockets, up to a sixteenth of its memory. Needs root.

    Version 2 counts them as memory by itself; version 1 does only where a limit is set, and Docker sets none.
    Whether they are counted now: False where neither holds.
    """
    if (root / "cgroup.controllers").exists():
        return True
    for place in _PLACES:
        folder = root / place.format(container_id)
        if (limit := _number(folder / "memory.limit_in_bytes")) is not None:
            try:
                (folder / "memory.kmem.tcp.limit_in_bytes").write_text(str(limit // SOCKET_SHARE))
            except OSError:
                return False
            return True
    return False


def _use(folder: Path, used: int, cache: str, peak: int | None, kills: str) -> MemoryUse:
    # Cache that can go at once is not counted as used; the kernel's own peak does count it.
    idle = _statistic(folder / "memory.stat", cache) or 0
    return MemoryUse(max(0, used - idle), peak, _statistic(folder / kills, "oom_kill"))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _statistic(path: Path, name: str) -> int | None:
    for line in _text(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return int(value)
    return None

"""The truth of the cgroup: how many were OOM-killed, how much memory is used, whether processes may still be started.

Reads version 1 and 2.
"""

import os


class MemoryCgroup:
    """The memory cgroup this process is in; every number is None (kills: 0) where the kernel does not show
    it.
    """

    def __init__(self) -> None:
        self._folder, self._version = _find("memory", "memory.oom_control", "memory.events")
        self._kills_fd = -1
        if self._version:
            name = "memory.events" if self._version == 2 else "memory.oom_control"
            self._kills_fd = os.open(f"{self._folder}/{name}", os.O_RDONLY | os.O_CLOEXEC)

    def oom_kills(self) -> int:
        """Return how often the kernel killed a process of this cgroup for memory since it was made (about 5
        µs).
        """
        if self._kills_fd < 0:
            return 0
        try:
            text = os.pread(self._kills_fd, 4096, 0)
        except OSError:
            return 0
        for line in text.splitlines():
            name, _, value = line.partition(b" ")
            if name == b"oom_kill":
                return int(value)
        return 0

    def usage(self) -> dict[str, int | None]:
        """Return memory_bytes (page cache that can go at once is not counted), memory_peak_bytes,
        memory_limit_bytes.
        """
        if self._version == 2:
            names, cache = ("memory.current", "memory.peak", "memory.max"), b"inactive_file"
        else:
            names = ("memory.usage_in_bytes", "memory.max_usage_in_bytes", "memory.limit_in_bytes")
            cache = b"total_inactive_file"
        used, peak, limit = (self._number(name) for name in names)
        if used is not None:
            used = max(0, used - self._statistic(cache))
        if limit is not None and limit >= 1 << 60:
            limit = None
        return {"memory_bytes": used, "memory_peak_bytes": peak, "memory_limit_bytes": limit}

    def _read(self, name: str) -> bytes:
        if not self._version:
            return b""
        try:
            fd = os.open(f"{self._folder}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return b""
        try:
            return os.read(fd, 16384)
        finally:
            os.close(fd)

    def _number(self, name: str) -> int | None:
        text = self._read(name).strip()
        return int(text) if text.isdigit() else None

    def _statistic(self, name: bytes) -> int:
        for line in self._read("memory.stat").splitlines():
            key, _, value = line.partition(b" ")
            if key == name:
                return int(value)
        return 0


class PidsCgroup:
    """The limit of processes of the cgroup this process is in; nothing is known where the kernel does not show it."""

    def __init__(self) -> None:
        folder, version = _find("pids", "pids.current", "pids.current")
        self._current_fd = -1
        self._limit = 0
        if version:
            with open(f"{folder}/pids.max") as limit:
                text = limit.read().strip()
            if text.isdigit():  # Else it says "max".
                self._limit = int(text)
                self._current_fd = os.open(f"{folder}/pids.current", os.O_RDONLY | os.O_CLOEXEC)

    def free(self) -> int | None:
        """How many processes and threads may still be started (about 3 µs); None when there is no limit."""
        if self._current_fd < 0:
            return None
        try:
            return self._limit - int(os.pread(self._current_fd, 32, 0))
        except OSError:
            return None


def _find(controller: str, file_1: str, file_2: str) -> tuple[str, int]:
    """Return (folder, cgroup version) of the controller, known by a file of each version; version 0: there is none."""
    root = "/sys/fs/cgroup"
    try:
        with open("/proc/self/cgroup", "rb") as text:
            lines = os.fsdecode(text.read()).splitlines()
    except OSError:
        lines = []
    candidates = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            candidates.append((f"{root}/{controller}{path}", file_1, 1))
    # In a container the mount shows its own cgroup as the root, whatever path /proc tells.
    candidates.append((f"{root}/{controller}", file_1, 1))
    candidates += [(root + line[3:].rstrip("/"), file_2, 2) for line in lines if line.startswith("0::/")]
    candidates.append((root, file_2, 2))
    for folder, name, version in candidates:
        if os.access(f"{folder}/{name}", os.R_OK):
            return folder, version
    return root, 0

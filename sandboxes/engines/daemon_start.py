"""When the Docker daemon was started: containers that ran before that and ended by then went down with it."""

from __future__ import annotations

import os
import socket
import struct
from datetime import UTC, datetime
from pathlib import Path

_PID_FILE = Path("/var/run/docker.pid")
_CONNECT_SECONDS = 1.0


def daemon_started_at(docker_host: str) -> datetime | None:
    """To 10 ms; None for a daemon that is not a process of this host, or not to be seen."""
    kind, _, path = docker_host.partition("://")
    if kind != "unix":
        return None
    pid = _listener(path)
    if pid is None or not _is_daemon(pid):
        # With socket activation the listener is the init system.
        pid = _pid_of(_PID_FILE)
    return _started_at(pid) if pid is not None and _is_daemon(pid) else None


def _listener(path: str) -> int | None:
    """The process that made the socket listen (SO_PEERCRED, unix(7))."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(_CONNECT_SECONDS)
            probe.connect(path)
            data = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    except OSError:
        return None
    pid: int = struct.unpack("3i", data)[0]
    return pid or None


def _pid_of(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _is_daemon(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() == "dockerd"
    except OSError:
        return False


def _started_at(pid: int) -> datetime | None:
    try:
        # Field 22, counted behind the name in brackets, which may hold anything (proc(5)).
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        booted = next(
            int(line.split()[1])
            for line in Path("/proc/stat").read_text().splitlines()
            if line.startswith("btime")
        )
    except (OSError, ValueError, IndexError, StopIteration):
        return None
    return datetime.fromtimestamp(booted + ticks / os.sysconf("SC_CLK_TCK"), UTC)

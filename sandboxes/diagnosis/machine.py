"""What the kernel and the disks of this host allow."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from django.conf import settings

from e2a.core.diagnosis import Finding, fail, ok, warn
from e2a.core.errors import EngineError
from sandboxes.diagnosis.engine import CALL_SECONDS
from sandboxes.engines.docker import DockerConnection
from sandboxes.engines.loop_disk import loop_disks_possible

GIB = 1024**3
LEAST_FREE_GIB = 10.0
"""Below that a disk is worth a word; below a fifth of it nothing new should start."""
OPEN_FILES = 4096
PIDS_A_SANDBOX = 40
"""What a busy sandbox, its shim and its share of the daemon hold; a limit of processes is for the whole host."""


def disk_findings(*, least_free_gib: float = LEAST_FREE_GIB) -> Iterator[Finding]:
    """Free space below the data folder and below Docker's."""
    yield disk_finding("disk of the data folder", settings.E2A.data_dir, least_free_gib)
    if settings.E2A.engine == "docker":
        connection = DockerConnection(settings.E2A.docker_host, timeout_seconds=CALL_SECONDS)
        try:
            root = Path(connection.run("describe itself", lambda client: client.info())["DockerRootDir"])
        except EngineError as error:
            yield fail("disk of Docker", error.detail, "See the line on the engine.")
            return
        if root.exists():
            yield disk_finding("disk of Docker", root, least_free_gib)
        else:
            yield warn(
                "disk of Docker", f"{root} is not of this host", "Look at that machine's disk yourself."
            )


def disk_finding(check: str, folder: Path, least_free_gib: float) -> Finding:
    """Space and inodes of the file system that holds `folder`."""
    found = shutil.disk_usage(folder)
    counts = os.statvfs(folder)
    free = found.free / GIB
    seen = f"{free:.1f} of {found.total / GIB:.0f} GiB free at {folder}"
    advice = (
        f"Free some: sandbox disks and images grow there. At least {least_free_gib:g} GiB should be free."
    )
    if counts.f_files and counts.f_favail / counts.f_files < 0.02:
        return fail(
            check, f"{seen}, and almost no inodes", "Remove files that nobody needs: none can be made."
        )
    if free < least_free_gib / 5:
        return fail(check, seen, advice)
    return warn(check, seen, advice) if free < least_free_gib else ok(check, seen)


def kernel_findings() -> Iterator[Finding]:
    """Features and limits that sandboxes stand on."""
    filesystems = Path("/proc/filesystems").read_text().split()
    if "overlay" in filesystems:
        yield ok("overlay", "the kernel has it")
    else:
        yield warn(
            "overlay", "the kernel has not loaded it", "`modprobe overlay`, unless Docker stores otherwise."
        )
    if loop_disks_possible():
        yield ok("loop disks", "possible")
    else:
        yield warn(
            "loop disks",
            "not possible: root, /dev/loop-control or mkfs.ext4 is missing",
            "Run the node as root, `modprobe loop`, install e2fsprogs; without them disk_mib is not enforced.",
        )
    yield _open_files()
    yield from _system_limits(settings.E2A.max_sandboxes)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = float("inf") if hard == resource.RLIM_INFINITY else hard
    seen = f"{_limit_text(soft)} (hard {_limit_text(hard)}), of this shell"
    if most < OPEN_FILES:
        return warn("open files", seen, f"Allow {OPEN_FILES} and more (LimitNOFILE=): each socket is one.")
    return ok("open files", seen)


def _limit_text(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _system_limits(sandboxes: int) -> Iterator[Finding]:
    needs = (
        ("kernel.pid_max", max(32768, sandboxes * PIDS_A_SANDBOX), "processes of the whole host"),
        ("kernel.threads-max", max(32768, sandboxes * PIDS_A_SANDBOX), "threads of the whole host"),
        ("fs.file-max", 100_000, "open files of the whole host"),
        ("fs.inotify.max_user_instances", 128, "watchers of one user, which all sandboxes of one uid share"),
        ("fs.inotify.max_user_watches", 8192, "watched files of one user"),
    )
    for name, least, what in needs:
        path = Path("/proc/sys") / name.replace(".", "/")
        if not path.exists():
            continue
        value = int(path.read_text().split()[0])
        if value < least:
            yield warn(
                name, f"{value} {what}", f"`sysctl -w {name}={least}` or more, for {sandboxes} sandboxes."
            )
        else:
            yield ok(name, f"{value} {what}")

"""A sandbox's disk: one sparse ext4 image on a loop device, so that a full disk is a true ENOSPC.

One mount on the host, `<folder>/disk`, holds three folders that become /workspace, /home/agent and /tmp.
`mount -o loop` sets the loop device's autoclear flag: the device frees itself with its last user, so after
any crash the mount table alone says what is left, and `SandboxFolder.remove` clears both.

There is no journal: the disk dies with its sandbox, and a host crash ends both. Measured here for 2 GiB:
make 10 ms, mount 8 ms, 1.2 MiB of the host's disk; `discard` gives deleted space back to the host.
"""

from __future__ import annotations

import os
from pathlib import Path

from sandboxes.engines.disk_rate import forget_free_devices, limit_writes, loop_device
from sandboxes.engines.host_folders import SandboxFolder, has_command, run_host_command

# One inode for 8 KiB: a JavaScript dependency tree is hundreds of thousands of small files (256 k for 2 GiB).
BYTES_PER_INODE = 8192
MOUNT_OPTIONS = "loop,nosuid,nodev,noatime,discard,noinit_itable,errors=remount-ro"
DISK_FOLDERS = {"workspace": 0o755, "home": 0o755, "tmp": 0o1777}


def loop_disks_possible() -> bool:
    """Whether this host can make loop disks: root, a loop driver and the ext4 tools."""
    return os.geteuid() == 0 and Path("/dev/loop-control").exists() and has_command("mkfs.ext4")


def make_loop_disk(
    folder: SandboxFolder, *, disk_mib: int, uid: int, gid: int, write_bytes_per_second: int = 0
) -> str | None:
    """Make and mount the disk; its loop device as `major:minor`. May run twice; a half-made image is made anew.

    `write_bytes_per_second`: 0 is no limit.
    """
    folder.disk.mkdir(mode=0o700, exist_ok=True)
    if not os.path.ismount(folder.disk):
        if not folder.disk_image.exists():
            _format(folder.disk_image, disk_mib)
        run_host_command("mount", "-o", MOUNT_OPTIONS, "-t", "ext4", str(folder.disk_image), str(folder.disk))
    device = loop_device(folder.disk)
    if device is not None:
        forget_free_devices()
        limit_writes(device, write_bytes_per_second)
    _make_disk_folders(folder, uid, gid)
    return device


def make_folder_disk(folder: SandboxFolder, *, uid: int, gid: int) -> None:
    """The fallback where loop disks are impossible: folders of the host's disk, without any size limit."""
    folder.disk.mkdir(mode=0o700, exist_ok=True)
    _make_disk_folders(folder, uid, gid)


def _format(image: Path, disk_mib: int) -> None:
    fresh = image.with_suffix(".new")
    with open(fresh, "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.truncate(disk_mib * 1024 * 1024)
    run_host_command(
        "mkfs.ext4", "-q", "-F", "-L", "e2a", "-m", "0", "-i", str(BYTES_PER_INODE), "-O", "^has_journal",
        "-E", "lazy_itable_init=1,nodiscard,root_owner=0:0", str(fresh),
    )  # fmt: skip
    fresh.replace(image)


def _make_disk_folders(folder: SandboxFolder, uid: int, gid: int) -> None:
    for name, mode in DISK_FOLDERS.items():
        path = folder.disk / name
        if not path.exists():
            fresh = folder.disk / f".{name}.new"
            fresh.mkdir(exist_ok=True)
            fresh.chmod(mode)
            if (uid, gid) != (os.geteuid(), os.getegid()):
                os.chown(fresh, uid, gid)
            fresh.rename(path)

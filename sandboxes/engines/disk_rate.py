"""How fast a sandbox may write its disk, so that one which fills it does not hold up what its neighbours write.

Nearly all of what is written goes through the page cache, and the kernel writes it back itself: on cgroup version 1 as
nobody's, so the limit of the container does not count it. There a rule of the root group on the loop device does; on
version 2 write-back is charged to whoever made the pages dirty, and the container's own limit holds. So both are set.

A rule of the root group outlives the loop device's use, and must not meet whoever uses the device next: it goes when
the disk goes, and those that a crash left behind go when the next disk is made.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
BLOCK = Path("/sys/dev/block")
LOOP_MAJOR = 7
_RULES = "blkio/blkio.throttle.write_bps_device"
_RULE = re.compile(rf"^({LOOP_MAJOR}:\d+) \d+$", re.MULTILINE)


def loop_device(mount: Path) -> str | None:
    """The `major:minor` of the loop device mounted there; None when it is another kind of file system."""
    device = os.stat(mount).st_dev
    return f"{LOOP_MAJOR}:{os.minor(device)}" if os.major(device) == LOOP_MAJOR else None


def limit_writes(device: str, bytes_per_second: int, *, root: Path = ROOT) -> bool:
    """Limit what the kernel writes back to this loop device; 0 sets it free. Needs root on cgroup version 1.

    Whether the limit holds now; true on version 2, where the container's own limit does it.
    """
    if (root / "cgroup.controllers").exists():
        return True
    try:
        (root / _RULES).write_text(f"{device} {bytes_per_second}")
    except OSError:
        return False
    return True


def forget_free_devices(*, root: Path = ROOT, block: Path = BLOCK) -> None:
    """Drop the rules of loop devices that are of no use now."""
    try:
        rules = (root / _RULES).read_text()
    except OSError:
        return
    for device in _RULE.findall(rules):
        if not (block / device / "loop").exists():
            limit_writes(device, 0, root=root)


def is_possible(*, root: Path = ROOT) -> bool:
    """Whether the limit can hold on this host."""
    return (root / "cgroup.controllers").exists() or os.access(root / _RULES, os.W_OK)


def container_limit(device: str | None, bytes_per_second: int) -> list[dict[str, object]]:
    """Docker's `BlkioDeviceWriteBps`."""
    if device is None or not bytes_per_second:
        return []
    return [{"Path": f"/dev/loop{device.partition(':')[2]}", "Rate": bytes_per_second}]

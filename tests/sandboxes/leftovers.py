"""What sandboxes leave on a host: containers, folders, mounts, loop devices. Asked behind e2a's back."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def containers(instance: str) -> list[str]:
    """Ids of all containers that bear that instance's label, in any state."""
    done = subprocess.run(
        ["docker", "ps", "-aq", "--no-trunc", "--filter", f"label=e2a.instance={instance}"],
        capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip
    return done.stdout.split()


def mounts_below(folder: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split(" ")[4] for line in lines if line.split(" ")[4].startswith(f"{folder.resolve()}/")]


def loops_below(folder: Path) -> list[str]:
    """Loop devices whose file lies below `folder`, deleted ones too."""
    found = []
    for entry in Path("/sys/block").glob("loop*"):
        try:
            name = (entry / "loop" / "backing_file").read_text()
        except OSError:
            continue
        if name.startswith(f"{folder.resolve()}/"):
            found.append(f"/dev/{entry.name}: {name.strip()}")
    return found


def folders_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def volumes() -> set[str]:
    """All Docker volumes of the host: sandboxes make none."""
    done = subprocess.run(
        ["docker", "volume", "ls", "-q"], capture_output=True, text=True, check=True, timeout=30
    )
    return set(done.stdout.split())


def left_over(instance: str, sandboxes_folder: Path) -> list[str]:
    """Everything that is still there of an instance; empty is good."""
    return [
        *(f"container {one}" for one in containers(instance)),
        *(f"folder {one}" for one in folders_in(sandboxes_folder)),
        *(f"mount {one}" for one in mounts_below(sandboxes_folder)),
        *(f"loop {one}" for one in loops_below(sandboxes_folder)),
    ]

"""Memory of processes, as the kernel counts it: shared pages are divided among those who share them (PSS)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

MEGABYTE = 1_000_000


def parents() -> dict[int, int]:
    """The parent of each process that is there now."""
    found: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                text = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue  # It has just ended.
            found[int(entry)] = int(text[text.rindex(")") + 2 :].split()[1])
    return found


def with_descendants(pid: int, parent_of: dict[int, int]) -> list[int]:
    """The process and all below it."""
    family = [pid]
    for one in family:
        family += [child for child, parent in parent_of.items() if parent == one]
    return family


def megabytes(pids: Iterable[int]) -> tuple[float, float]:
    """PSS and private memory of these processes together, in MB (10^6 bytes). One that has ended counts nothing."""
    pss = private = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, rest = line.partition(":")
            if name == "Pss":
                pss += int(rest.split()[0]) * 1024
            elif name in ("Private_Clean", "Private_Dirty"):
                private += int(rest.split()[0]) * 1024
    return pss / MEGABYTE, private / MEGABYTE

"""What became of a sandbox's connections: counted by target and verdict, bounded, kept beside the sandbox."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

MOST_ENTRIES: Final = 500
"""Different targets and verdicts; the one that was longest not seen makes room. Some 100 KiB as JSON."""
SEEN_FILE: Final = "egress-seen.json"
"""In the sandbox's folder on its host, which nothing inside sees."""


@dataclass(slots=True)
class Entry:
    """One target with one verdict. Times are seconds since 1970, bytes those of the ended connections."""

    host: str
    port: int
    is_allowed: bool
    reason: str
    rule: str
    count: int = 0
    first_at: float = 0.0
    last_at: float = 0.0
    bytes_out: int = 0
    bytes_in: int = 0

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class Seen:
    """All entries of a sandbox, the one seen last at the end."""

    entries: dict[tuple[str, int, str, str], Entry] = field(default_factory=dict)
    is_dirty: bool = False

    def note(self, host: str, port: int, *, is_allowed: bool, reason: str, rule: str = "") -> Entry:
        """Count one connection, or one refusal of it."""
        key, moment = (host, port, reason, rule), time.time()
        entry = self.entries.pop(key, None)
        if entry is None:
            entry = Entry(host, port, is_allowed, reason, rule, first_at=moment)
            while len(self.entries) >= MOST_ENTRIES:
                del self.entries[next(iter(self.entries))]
        self.entries[key] = entry
        entry.count += 1
        entry.last_at = moment
        self.is_dirty = True
        return entry

    def moved(self, entry: Entry, *, bytes_out: int, bytes_in: int) -> None:
        """What a connection that ended has carried."""
        entry.bytes_out += bytes_out
        entry.bytes_in += bytes_in
        self.is_dirty = True

    def as_json(self) -> list[dict[str, Any]]:
        """Newest first."""
        return [entry.as_json() for entry in reversed(self.entries.values())]

    def save(self, folder: Path) -> None:
        """Atomic. Raises OSError."""
        draft = folder / f".{SEEN_FILE}.new"
        draft.write_text(json.dumps(self.as_json()))
        os.replace(draft, folder / SEEN_FILE)
        self.is_dirty = False

    @classmethod
    def load(cls, folder: Path) -> Seen:
        """What an earlier gateway saved; nothing when there is nothing that can be read."""
        seen = cls()
        for found in reversed(seen_read(folder)):
            entry = Entry(**found)
            seen.entries[(entry.host, entry.port, entry.reason, entry.rule)] = entry
        return seen


def seen_read(folder: Path) -> list[dict[str, Any]]:
    """What `save` wrote, newest first; empty without it."""
    try:
        found = json.loads((folder / SEEN_FILE).read_text())
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []


def is_seen(folder: Path) -> bool:
    """Whether it tried anything at all."""
    return (folder / SEEN_FILE).exists()

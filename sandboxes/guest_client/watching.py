"""The lines of a watched folder. No I/O."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from e2a.core.errors import GuestError

LARGEST_LINE_BYTES = 64 * 1024
FileChangeKind = Literal["ready", "created", "modified", "deleted", "moved", "overflow", "end"]


@dataclass(frozen=True, slots=True)
class FileChange:
    """`path` is where it is now, `source` where it was before it moved. `reason` only of an `end`, the last one.

    `overflow`: changes were lost, the folder must be listed again. Names that are no UTF-8 have surrogates.
    """

    kind: FileChangeKind
    path: str = ""
    source: str = ""
    is_directory: bool = False
    reason: str = ""


class ChangeReader:
    """Feed bytes in any pieces, take whole changes. Keep-alives are swallowed."""

    def __init__(self) -> None:
        self._unread = bytearray()
        self.has_ended = False
        """The `end` was read."""

    def feed(self, data: bytes) -> Iterator[FileChange]:
        """Raises GuestError (`bad_frame`) for what no guest of ours sends."""
        self._unread += data
        *lines, rest = self._unread.split(b"\n")
        self._unread = rest
        if len(rest) > LARGEST_LINE_BYTES:
            raise _bad("a line without an end")
        for line in lines:
            if line:
                yield self._change(bytes(line))

    def _change(self, line: bytes) -> FileChange:
        try:
            document = json.loads(line)
        except (ValueError, RecursionError):
            raise _bad("a line that is not JSON") from None
        if not isinstance(document, dict) or document.get("type") not in get_args(FileChangeKind):
            raise _bad("a change of no known type")
        kind = cast(FileChangeKind, document["type"])
        self.has_ended = kind == "end"
        return FileChange(
            kind=kind,
            path=_text(document, "path"),
            source=_text(document, "from"),
            is_directory=document.get("is_directory") is True,
            reason=_text(document, "reason"),
        )


def _text(document: dict[str, Any], name: str) -> str:
    value = document.get(name, "")
    if not isinstance(value, str) or len(value) > LARGEST_LINE_BYTES:
        raise _bad(f"a bad {name}")
    return value


def _bad(found: str) -> GuestError:
    return GuestError(f"the guest's watch has {found}", code="bad_frame", guest_status=502)

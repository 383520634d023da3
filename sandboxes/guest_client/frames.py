"""The frames of an output stream: header `>BQI` (kind, offset, length), then the payload. No I/O."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from e2a.core.errors import GuestError
from sandboxes.guest_client.shapes import ProcessInfo, Stream, process_info

HEADER = struct.Struct(">BQI")
LARGEST_PAYLOAD_BYTES = 1024 * 1024

_STDOUT, _STDERR, _EXIT, _GAP, _KEEP_ALIVE = 1, 2, 3, 4, 5
_STREAMS: dict[int, Stream] = {_STDOUT: "stdout", _STDERR: "stderr"}


@dataclass(frozen=True, slots=True)
class Output:
    """Bytes that a process wrote.

    `offset` is their place in its one log; read on from `offset + len(data)`.
    """

    stream: Stream
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Gap:
    """The log overflowed: `dropped` bytes are lost, output goes on at `offset`."""

    offset: int
    dropped: int


@dataclass(frozen=True, slots=True)
class Exit:
    """The process has ended; nothing follows. `offset` is the length of its log."""

    offset: int
    process: ProcessInfo


Frame = Output | Gap | Exit


class FrameReader:
    """Feed bytes in any pieces, take whole frames.

    Keep-alives are swallowed. Holds at most one unfinished frame.
    """

    def __init__(self) -> None:
        self._unread = bytearray()
        self.has_ended = False
        """The exit was read."""

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that `data` completes.

        Raises GuestError (`bad_frame`) for what no guest of ours sends.
        """
        self._unread += data
        at = 0
        try:
            while len(self._unread) - at >= HEADER.size:
                kind, offset, length = HEADER.unpack_from(self._unread, at)
                if length > LARGEST_PAYLOAD_BYTES:
                    raise _bad(f"a payload of {length} bytes")
                begin, end = at + HEADER.size, at + HEADER.size + length
                if len(self._unread) < end:
                    return
                payload = bytes(memoryview(self._unread)[begin:end])
                at = end
                frame = self._frame(kind, offset, payload)
                if frame is not None:
                    yield frame
        finally:
            del self._unread[:at]

    def _frame(self, kind: int, offset: int, payload: bytes) -> Frame | None:
        if self.has_ended:
            raise _bad("a frame after the exit")
        stream = _STREAMS.get(kind)
        if stream is not None:
            return Output(stream, offset, payload)
        if kind == _KEEP_ALIVE:
            return None
        try:
            document = json.loads(payload)
        except (ValueError, RecursionError):
            raise _bad(f"kind {kind} without JSON") from None
        if kind == _EXIT and isinstance(document, dict):
            self.has_ended = True
            return Exit(offset, process_info(document))
        if kind == _GAP and isinstance(document, dict) and type(document.get("dropped")) is int:
            return Gap(offset, document["dropped"])
        raise _bad(f"kind {kind}")


def _bad(found: str) -> GuestError:
    return GuestError(f"the guest's stream has {found}", code="bad_frame", guest_status=502)

"""Server-sent events with limits: the sender may be anybody whom a tenant named.

The SDK's own decoder joins lines in quadratic time and has no limit; this one is linear and bounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

MAX_EVENT_BYTES = 8 * 1024 * 1024


class ServerSentEvent(NamedTuple):
    event: str
    data: str


class BadEventStreamError(ValueError):
    """Not an event stream, or one beyond the limits."""


class EventDecoder:
    """Takes a byte stream piece by piece, gives its events that have data. Linear in time, bounded in memory.

    One without its blank line at the end was cut off and is left out.
    """

    def __init__(self, *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._longest = max_event_bytes
        self._unfinished: list[bytes] = []
        self._unfinished_size = 0
        self._event = ""
        self._data: list[str] = []
        self._size = 0

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """The events that end in this piece. Raises BadEventStreamError."""
        found: list[ServerSentEvent] = []
        for line in self._lines(chunk):
            event = self._line(line)
            if event is not None:
                found.append(event)
        return found

    def _line(self, line: bytes) -> ServerSentEvent | None:
        if not line:
            whole = ServerSentEvent(self._event or "message", "\n".join(self._data)) if self._data else None
            self._event, self._data, self._size = "", [], 0
            return whole
        self._size += len(line) + 1
        if self._size > self._longest:
            raise BadEventStreamError(f"an event is longer than {self._longest} bytes")
        name, _, raw = line.partition(b":")
        if name not in (b"event", b"data"):
            return None
        try:
            value = raw.removeprefix(b" ").decode()
        except UnicodeDecodeError as error:
            raise BadEventStreamError("an event is not UTF-8") from error
        if name == b"data":
            self._data.append(value)
        else:
            self._event = value
        return None

    def _lines(self, chunk: bytes) -> Iterator[bytes]:
        """Lines without their ends (LF or CR LF). What follows the last end waits for more."""
        *whole, rest = chunk.split(b"\n")
        for part in whole:
            yield b"".join((*self._unfinished, part)).removesuffix(b"\r")
            self._unfinished, self._unfinished_size = [], 0
        if rest:
            self._unfinished.append(rest)
            self._unfinished_size += len(rest)
            if self._unfinished_size > self._longest:
                raise BadEventStreamError(f"a line is longer than {self._longest} bytes")


def server_sent_events(
    chunks: Iterable[bytes], *, max_event_bytes: int = MAX_EVENT_BYTES
) -> Iterator[ServerSentEvent]:
    """The events of a byte stream. Raises BadEventStreamError."""
    decoder = EventDecoder(max_event_bytes=max_event_bytes)
    for chunk in chunks:
        yield from decoder.feed(chunk)

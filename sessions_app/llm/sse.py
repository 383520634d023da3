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


def server_sent_events(
    chunks: Iterable[bytes], *, max_event_bytes: int = MAX_EVENT_BYTES
) -> Iterator[ServerSentEvent]:
    """The events of a byte stream that have data. One without its blank line at the end was cut off and is
    left out. Raises BadEventStreamError.
    """
    event, data, size = "", list[str](), 0
    for line in _lines(chunks, max_event_bytes):
        if not line:
            if data:
                yield ServerSentEvent(event or "message", "\n".join(data))
            event, data, size = "", [], 0
            continue
        size += len(line) + 1
        if size > max_event_bytes:
            raise BadEventStreamError(f"an event is longer than {max_event_bytes} bytes")
        name, _, raw = line.partition(b":")
        if name not in (b"event", b"data"):
            continue
        try:
            value = raw.removeprefix(b" ").decode()
        except UnicodeDecodeError as error:
            raise BadEventStreamError("an event is not UTF-8") from error
        if name == b"data":
            data.append(value)
        else:
            event = value


def _lines(chunks: Iterable[bytes], longest: int) -> Iterator[bytes]:
    """Lines without their ends (LF or CR LF). What follows the last end is left out."""
    unfinished: list[bytes] = []
    size = 0
    for chunk in chunks:
        *whole, rest = chunk.split(b"\n")
        for part in whole:
            yield b"".join((*unfinished, part)).removesuffix(b"\r")
            unfinished, size = [], 0
        if rest:
            unfinished.append(rest)
            size += len(rest)
            if size > longest:
                raise BadEventStreamError(f"a line is longer than {longest} bytes")

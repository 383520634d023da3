"""A job's output as text with byte offsets: a page of it, or event by event.

Offsets count bytes of the one log of both streams. `next_after` is always the place to read on from without
missing or repeating a byte; a character that is not there in whole yet counts as not read.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any

from sandboxes.guest_answers import guest_answers
from sandboxes.guest_client import Exit, Gap, Output, OutputStream
from sandboxes.models import Job

PAGE_BYTES = 256 * 1024


class _Text:
    """Decodes both streams, each with its own half of a character."""

    def __init__(self, after: int) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoders = {"stdout": decoder("replace"), "stderr": decoder("replace")}
        self.next_after = after

    def piece(self, frame: Output) -> dict[str, Any] | None:
        """None when the frame completes no character."""
        decoder = self._decoders[frame.stream]
        text = decoder.decode(frame.data)
        unread = min(len(decoder.getstate()[0]), len(frame.data))
        self.next_after = frame.offset + len(frame.data) - unread
        if not text:
            return None
        return {"stream": frame.stream, "offset": frame.offset, "data": text}

    def rest(self, offset: int) -> Iterator[dict[str, Any]]:
        """What no further byte can complete."""
        self.next_after = offset
        for name, decoder in self._decoders.items():
            if text := decoder.decode(b"", final=True):
                yield {"stream": name, "offset": offset, "data": text}


def output_page(stream: OutputStream, *, after: int) -> dict[str, Any]:
    """What there is from `after` on, at most about 256 KiB. `has_ended`: nothing will ever follow."""
    text = _Text(after)
    pieces: list[dict[str, Any]] = []
    size = dropped = 0
    has_ended = False
    with stream:
        for frame in stream:
            match frame:
                case Output(data=data):
                    if piece := text.piece(frame):
                        pieces.append(piece)
                    size += len(data)
                case Gap(dropped=lost, offset=offset):
                    dropped += lost
                    text.next_after = offset
                case Exit(offset=offset):
                    pieces.extend(text.rest(offset))
                    has_ended = True
            if size >= PAGE_BYTES:
                break
    return {
        "output": pieces,
        "next_after": text.next_after,
        "dropped_bytes": dropped,
        "has_ended": has_ended,
    }


class JobStream:
    """A job's output as events until it ends: `stdout`, `stderr`, `gap`, then one `exit`. To iterate once.

    `close`, from any thread, ends the iteration; the job goes on.
    """

    def __init__(self, job: Job, stream: OutputStream, *, after: int) -> None:
        self._job = job
        self._stream = stream
        self._after = after

    def __iter__(self) -> Iterator[dict[str, Any]]:
        text = _Text(self._after)
        with guest_answers(self._job.sandbox), self._stream:
            for frame in self._stream:
                match frame:
                    case Output():
                        if piece := text.piece(frame):
                            yield _event(piece, text.next_after)
                    case Gap(dropped=dropped, offset=offset):
                        text.next_after = offset
                        yield {"type": "gap", "dropped_bytes": dropped, "next_after": offset}
                    case Exit(offset=offset, process=process):
                        for piece in text.rest(offset):
                            yield _event(piece, offset)
                        yield {
                            "type": "exit",
                            "state": process.state,
                            "exit_code": process.exit_code,
                            "signal": process.signal,
                            "timed_out": process.timed_out,
                            "oom": process.oom,
                            "next_after": offset,
                        }

    def close(self) -> None:
        self._stream.close()


def _event(piece: dict[str, Any], next_after: int) -> dict[str, Any]:
    return {
        "type": piece["stream"],
        "offset": piece["offset"],
        "data": piece["data"],
        "next_after": next_after,
    }

"""A command in the sandbox, followed into the log: started once, re-attached by byte offset, cut short on cancel."""

from __future__ import annotations

import base64
import codecs
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

import structlog

from e2a.core.errors import E2AError, GuestUnreachable
from sandboxes.activity import Work
from sandboxes.guest_client import Exit, Gap, GuestClient, Output, ProcessInfo, ProcessSpec
from sandboxes.waiting import database_release
from sessions_app import frames
from sessions_app.models import Event
from sessions_app.turns import Turn

log = structlog.get_logger(__name__)

OUTPUT_LIMIT: Final = 10 * 1024 * 1024
"""Bytes of one command's output that enter the log (SECURITY 5.14); the rest is read, counted and dropped."""
KEPT_CHARS: Final = 30_000
"""Of a command's output for whoever asked for it; the middle of more is cut out."""
REATTACH_SECONDS: Final = 30.0
"""How long a guest may be out of reach (a gateway that restarts) before the command counts as lost."""
TERM_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended. `text` is both streams as a person would read them, cut to `KEPT_CHARS`."""

    process: ProcessInfo
    text: str
    truncated: bool


class _KeptText:
    """The first and the last half of a text of any length."""

    def __init__(self, limit: int) -> None:
        self._half = limit // 2
        self._head: list[str] = []
        self._head_size = 0
        self._tail: str = ""
        self.cut = 0

    def add(self, text: str) -> None:
        room = self._half - self._head_size
        if room > 0:
            self._head.append(text[:room])
            self._head_size += len(text[:room])
            text = text[room:]
        self._tail += text
        if len(self._tail) > 2 * self._half:
            self._trim()

    def _trim(self) -> None:
        over = len(self._tail) - self._half
        if over > 0:
            self.cut += over
            self._tail = self._tail[over:]

    def text(self) -> str:
        self._trim()
        middle = f"\n[… {self.cut} characters cut …]\n" if self.cut else ""
        return "".join(self._head) + middle + self._tail


@dataclass(slots=True)
class _Decoders:
    """UTF-8 of two streams, cut anywhere. What is held back is stored with a frame, so that a resume is exact."""

    by_stream: dict[str, codecs.IncrementalDecoder] = field(
        default_factory=lambda: {
            name: codecs.getincrementaldecoder("utf-8")("replace") for name in ("stdout", "stderr")
        }
    )

    def held(self) -> dict[str, str]:
        """Bytes of characters that are not whole yet, as base64 by stream."""
        found = {name: decoder.getstate()[0] for name, decoder in self.by_stream.items()}
        return {name: base64.b64encode(data).decode() for name, data in found.items() if data}

    def restore(self, held: dict[str, str]) -> None:
        for name, data in held.items():
            self.by_stream[name].setstate((base64.b64decode(data), 0))


class _RunningCommand:
    """What a turn waits for while it follows a command."""

    work: Work = "task_running"

    def __init__(self, client: GuestClient, process_id: str) -> None:
        self.client = client
        self.process_id = process_id
        self.stream: Any = None
        self.ended = threading.Event()
        self.stopping = threading.Event()

    def stop(self, *, abandon: bool) -> None:
        if self.stopping.is_set():
            return
        self.stopping.set()
        if abandon:
            if self.stream is not None:
                self.stream.close()
            return
        threading.Thread(target=self._end, name="command-stop", daemon=True).start()

    def _end(self) -> None:
        """TERM, two seconds to tidy up, then KILL for all that it started: also what outlived the command itself."""
        try:
            self.client.process_signal(self.process_id, "TERM")
            self.ended.wait(TERM_SECONDS)
            self.client.process_signal(self.process_id, "KILL")
        except E2AError as error:
            if error.code != "not_running":  # Nothing was left: what was asked for.
                log.info("command.stop_failed", process=self.process_id, error=str(error))
        if not self.ended.wait(TERM_SECONDS) and self.stream is not None:
            self.stream.close()


def command_run(
    turn: Turn, client: GuestClient, spec: ProcessSpec, *, tool_use_id: str | None = None
) -> Ended:
    """Start `spec`, or go on with it if an earlier attempt started it, and bring its output into the log.

    The process id makes the start happen once; the last stored frame says from which byte to go on. Raises
    `TurnCancelled`, `LeaseLost`, `GuestError`, and `GuestUnreachable` when the guest is out of reach for 30 s.
    """
    follower = _Follower(turn, tool_use_id)
    if turn.is_resumed:
        follower.resume()
    process = process_run(turn, client, spec, follower)
    turn.check()
    return Ended(process, follower.kept.text(), follower.kept.cut > 0 or follower.dropped > 0)


class Follower(Protocol):
    """Takes a process's output as it comes."""

    offset: int
    """From which byte to read on."""

    def output(self, frame: Output) -> None: ...

    def gap(self, gap: Gap) -> None:
        """The guest's ring dropped output that nobody had read."""
        ...

    def finish(self) -> None:
        """The process has ended, and all its output has come."""
        ...


def process_run(turn: Turn, client: GuestClient, spec: ProcessSpec, follower: Follower) -> ProcessInfo:
    """Start `spec`, or go on with it if it runs already, until it has ended: also when a cancel ended it.

    The process id makes the start happen once. Raises `LeaseLost`, `GuestError`, `TurnCancelled` when a cancelled one
    left no word, and `GuestUnreachable` when the guest is out of reach for 30 s.
    """
    running = _RunningCommand(client, spec.id)
    last_contact = time.monotonic()
    turn.waits_for(running)
    database_release()
    try:
        while True:
            turn.check_lost()
            before = follower.offset
            try:
                end = _follow(running, spec, follower)
            except GuestUnreachable as error:
                turn.check_lost()
                if follower.offset != before:
                    last_contact = time.monotonic()
                if time.monotonic() - last_contact > REATTACH_SECONDS or error.code == "no_such_sandbox":
                    raise
                turn.pause(0.25)
                continue
            if end is not None:
                running.ended.set()
                follower.finish()
                return end
            turn.check()
    finally:
        running.ended.set()
        turn.waits_for(None)


def _follow(running: _RunningCommand, spec: ProcessSpec, follower: Follower) -> ProcessInfo | None:
    """One connection's worth of output. `None` when the stream was closed by a stop."""
    with running.client.process_follow(spec, after=follower.offset) as stream:
        running.stream = stream
        for frame in stream:
            match frame:
                case Output():
                    follower.output(frame)
                case Gap():
                    follower.gap(frame)
                case Exit():
                    return frame.process
    return None


class _Follower:
    """Turns bytes at offsets into text frames, and keeps a copy for whoever asked."""

    def __init__(self, turn: Turn, tool_use_id: str | None) -> None:
        self._turn = turn
        self._tool_use_id = tool_use_id
        self._decoders = _Decoders()
        self.kept = _KeptText(KEPT_CHARS)
        self.offset = 0
        self.dropped = 0

    def resume(self) -> None:
        """Take up where the log stands: its text is kept, its last frame says from which byte to read on."""
        stored = Event.objects.filter(task=self._turn.task, type__in=frames.TEXT_TYPES, data__source="tool")
        if self._tool_use_id is not None:
            stored = stored.filter(data__tool_use_id=self._tool_use_id)
        for data, private in stored.order_by("seq").values_list("data", "private").iterator():
            self.kept.add(data["data"])
            if private:
                self.offset = private["offset"]
                self._decoders.restore(private.get("held", {}))

    def output(self, frame: Output) -> None:
        end = frame.offset + len(frame.data)
        if end <= self.offset:
            return
        data = frame.data[max(0, self.offset - frame.offset) :]
        self.offset = end
        text = self._decoders.by_stream[frame.stream].decode(data)
        if text:
            self._emit(frame.stream, text, len(data))

    def _emit(self, stream: Literal["stdout", "stderr"], text: str, size: int) -> None:
        self.kept.add(text)
        if self.offset > OUTPUT_LIMIT:
            self.dropped += size
            return
        self._turn.log.text(
            frames.Frame(
                stream,
                {"data": text, "source": "tool"}
                | ({"tool_use_id": self._tool_use_id} if self._tool_use_id is not None else {}),
                self._turn.task.pk,
                {"offset": self.offset} | ({"held": held} if (held := self._decoders.held()) else {}),
            )
        )

    def gap(self, gap: Gap) -> None:
        """The guest's ring dropped output that nobody had read."""
        self.offset = max(self.offset, gap.offset)
        self.dropped += gap.dropped

    def finish(self) -> None:
        """The last, incomplete characters; and a frame that tells how much is missing, if anything is."""
        for stream in ("stdout", "stderr"):
            text = self._decoders.by_stream[stream].decode(b"", True)
            if text:
                self._emit(stream, text, len(text))
        if self.dropped:
            self._turn.log.append(
                frames.error(
                    code="output_truncated",
                    detail=f"{self.dropped} bytes of output are not in the log: it takes 10 MiB of one command.",
                    retry="exhausted",
                    task=self._turn.task.pk,
                )
            )

"""Running one command in a sandbox and waiting for its end: answered whole, or event by event."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from e2a.core.clock import now
from e2a.core.errors import GuestError
from e2a.core.ids import new_id
from sandboxes.configuration import guest_client, holder_of
from sandboxes.guest.redaction import Patterns
from sandboxes.guest_answers import guest_answers
from sandboxes.guest_client import Completed, Exit, Gap, Output, OutputStream, ProcessInfo, ProcessSpec
from sandboxes.models import Sandbox, SandboxLogEntry
from sandboxes.services import sandbox_ensure_configured, sandbox_used, sandbox_wait_running
from sandboxes.waiting import database_release
from secrets_vault import services as vault

LOGGED_CHARACTERS = 16 * 1024
"""Of each command's output, its end, and of its text, its beginning, are kept for `GET …/logs`."""
STREAM_GRACE_SECONDS = 30.0
ROOM_SECONDS = 5.0
ROOM_PAUSE_SECONDS = 0.1
"""The guest ends what was left behind meanwhile; it does not say when there is room."""

Started = TypeVar("Started")


@dataclass(frozen=True, slots=True, repr=False)
class Command:
    """What to run; exactly one of `command` (for bash) and `argv`. Its `repr` would show secrets, so it has
    none."""

    command: str | None = None
    argv: tuple[str, ...] | None = None
    cwd: str | None = None
    env: Mapping[str, str] | None = None
    stdin: str | None = None
    timeout_seconds: float = 60.0

    def spec(self) -> ProcessSpec:
        """As a process of the guest that nobody outlives: it is killed when its reader goes away."""
        return ProcessSpec(
            id=new_id("exec"),
            command=self.command,
            argv=self.argv,
            cwd=self.cwd,
            env=self.env,
            stdin=None if self.stdin is None else self.stdin.encode(),
            timeout_seconds=self.timeout_seconds,
            on_full="block",  # The reader is us, and counts what it cuts.
            kill_on_disconnect=True,
        )

    def text(self) -> str:
        return self.command if self.command is not None else " ".join(self.argv or ())


def sandbox_exec(*, sandbox: Sandbox, command: Command) -> Completed:
    """Run it to its end. A command over its time is killed with all it started and has `exit_code` 124.

    Waits for a sandbox that is still being made. Raises `not_running`, `sandbox_not_ready`,
    `sandbox_unreachable`, and what the guest refuses (a missing `cwd`, an environment that is too large).
    """
    _prepare(sandbox)
    spec = command.spec()
    database_release()
    with guest_answers(sandbox):
        completed = with_room(lambda: guest_client(sandbox).run(spec))
    output = completed.stdout[-4 * LOGGED_CHARACTERS :] + completed.stderr[-4 * LOGGED_CHARACTERS :]
    _logged(sandbox, command, spec.id, completed.exit_code, output.decode(errors="replace"))
    return completed


def with_room(start: Callable[[], Started]) -> Started:
    """Start a process; at its limit of processes the guest ends what others left running, so try again for 5 s."""
    give_up_at = time.monotonic() + ROOM_SECONDS
    while True:
        try:
            return start()
        except GuestError as error:
            if error.code != "no_resources" or time.monotonic() > give_up_at:
                raise
        time.sleep(ROOM_PAUSE_SECONDS)


def _prepare(sandbox: Sandbox) -> None:
    sandbox_wait_running(sandbox)
    sandbox_ensure_configured(sandbox)
    sandbox_used(sandbox)


class ExecStream:
    """A running command, event by event: `stdout`, `stderr`, `gap`, then one `exit`. To iterate once.

    Made, the command runs already. `close`, from any thread, kills it and ends the iteration.
    """

    def __init__(self, sandbox: Sandbox, command: Command) -> None:
        _prepare(sandbox)
        self._sandbox = sandbox
        self._command = command
        self._spec = command.spec()
        self._began_at = time.monotonic()
        database_release()
        seconds = command.timeout_seconds + STREAM_GRACE_SECONDS
        with guest_answers(sandbox):
            self._stream: OutputStream = with_room(
                lambda: guest_client(sandbox).process_follow(self._spec, deadline_seconds=seconds)
            )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # A character may be split over two pieces; each stream remembers its own half.
        decode = codecs.getincrementaldecoder("utf-8")
        decoders: dict[str, codecs.IncrementalDecoder] = {
            "stdout": decode("replace"),
            "stderr": decode("replace"),
        }
        tail = ""
        end: ProcessInfo | None = None
        try:
            with guest_answers(self._sandbox):
                for frame in self._stream:
                    match frame:
                        case Output(stream=name, data=data):
                            if text := decoders[name].decode(data):
                                tail = (tail + text)[-LOGGED_CHARACTERS:]
                                yield {"type": name, "data": text}
                        case Gap(dropped=dropped):
                            yield {"type": "gap", "dropped_bytes": dropped}
                        case Exit(process=process):
                            end = process
                            for source, decoder in decoders.items():
                                if rest := decoder.decode(b"", final=True):
                                    yield {"type": source, "data": rest}
                            yield self._exit(process)
        finally:
            self._stream.close()
            _logged(self._sandbox, self._command, self._spec.id, end.exit_code if end else None, tail)

    def _exit(self, process: ProcessInfo) -> dict[str, Any]:
        return {
            "type": "exit",
            "exit_code": process.exit_code,
            "signal": process.signal,
            "oom": process.oom,
            "duration_ms": round((time.monotonic() - self._began_at) * 1000),
        }

    def close(self) -> None:
        self._stream.close()


def _logged(sandbox: Sandbox, command: Command, process_id: str, exit_code: int | None, output: str) -> None:
    """Write the line of `GET …/logs`. Output comes redacted from the guest; the command's text is redacted
    here."""
    SandboxLogEntry.objects.create(
        sandbox=sandbox,
        at=now(),
        process_id=process_id,
        command=command_text(sandbox, command),
        exit_code=exit_code,
        output=output[-LOGGED_CHARACTERS:].replace("\0", "�"),
    )
    sandbox_used(sandbox)


def command_text(sandbox: Sandbox, command: Command) -> str:
    """The beginning of a command as it may be stored: without the values of the sandbox's secrets."""
    text = command.text()[: 4 * LOGGED_CHARACTERS]
    if sandbox.configured_with.partition("@")[0]:
        values, _ = vault.holder_environment(holder_of(sandbox))
        patterns = Patterns((name, value.reveal().encode()) for name, value in values.items())
        text = patterns.redact(text.encode()).decode(errors="replace")
    return text[:LOGGED_CHARACTERS].replace("\0", "�")

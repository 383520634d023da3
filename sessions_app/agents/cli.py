"""Agents that are programs in the sandbox: one process a task, whose JSON events become frames as they come.

The process bears the task's id, so that it is started once. Its output is read line by line, by byte offset; each
frame carries the offset behind its line, from which another worker goes on. Nothing is run or told twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import structlog

from e2a.core.clock import now
from e2a.core.errors import ValidationFailed
from sandboxes.guest_client import Gap, GuestClient, Output, ProcessInfo, ProcessSpec
from sandboxes.services import sandbox_client, sandbox_ensure_configured
from secrets_vault.services import holder_llm
from sessions_app.agents.narration import Failure, Narrator
from sessions_app.commands import process_run
from sessions_app.models import Event, Session, StopReason
from sessions_app.rules import model_check
from sessions_app.spending import budget_spent
from sessions_app.task_queue import last_speech
from sessions_app.turns import Turn, TurnResult

log = structlog.get_logger(__name__)

WORKSPACE: Final = "/workspace"
BROKER: Final = "http://127.0.0.1:3128/llm"
"""Where a sandbox's programs reach model vendors; who asks is known by the sandbox that asks (SECURITY 4)."""
PLACEHOLDER: Final = "e2a-sandbox"
"""The programs insist on a key. The broker drops it and puts the tenant's in its place."""
LINE_LIMIT: Final = 8 * 1024 * 1024
"""Bytes of one event; a longer one is left out."""
LOG_BYTES: Final = 4 * 1024 * 1024
"""What the guest keeps for a reader that died: more than any usual line."""
STDERR_KEPT: Final = 4096


@dataclass(frozen=True, slots=True, repr=False)
class Launch:
    """A program's command line and its own variables. The prompt is its standard input."""

    argv: tuple[str, ...]
    env: Mapping[str, str]


@dataclass(slots=True)
class Outcome:
    """What the program said of its own end."""

    text: str | None = None
    failure: Failure | None = None
    is_out_of_turns: bool = False
    is_whole: bool = False
    """It did say that it is done."""


class Translation(Protocol):
    """One program's events as frames. Whatever an event holds, none may raise."""

    outcome: Outcome

    def event(self, event: Mapping[str, Any]) -> None: ...


class Program(Protocol):
    """One program that is an agent."""

    name: str

    def launch(self, turn: Turn, client: GuestClient, model: str) -> Launch: ...

    def translation(self, turn: Turn, narrator: Narrator) -> Translation: ...


@dataclass(frozen=True, slots=True)
class CliAgent:
    """Runs a program to the end of a task."""

    program: Program

    def run(self, turn: Turn) -> TurnResult:
        sandbox = turn.session.sandbox
        assert sandbox is not None, "a turn starts when the sandbox runs"
        narrator = Narrator(turn)
        if not turn.is_resumed and (spent := budget_spent(turn.session)):
            return _spent(narrator, spent, "")
        try:
            model = _model(turn.session)
        except ValidationFailed as error:  # LLM_MODEL was changed to a name that this agent cannot use.
            narrator.fail(Failure("llm_bad_request", error.detail))
            return TurnResult(1, reason="llm_bad_request", stop_reason=StopReason.ERROR)
        sandbox_ensure_configured(sandbox)
        client = sandbox_client(sandbox)
        translation = self.program.translation(turn, narrator)
        lines = EventLines(narrator, translation)
        if turn.is_resumed:
            lines.resume()
        cwd = working_folder(turn, client)
        launch = self.program.launch(turn, client, model)
        left = (turn.session.expires_at - now()).total_seconds()
        spec = ProcessSpec(
            id=turn.task.public_id,
            argv=launch.argv,
            env=launch.env,
            cwd=cwd,
            stdin=turn.task.prompt.encode(),
            on_full="block",
            log_bytes=LOG_BYTES,
            timeout_seconds=max(1.0, left),
        )
        process = process_run(turn, client, spec, lines)
        turn.check()
        return self._result(turn, narrator, translation.outcome, process, lines.stderr)

    def _result(
        self, turn: Turn, narrator: Narrator, outcome: Outcome, process: ProcessInfo, stderr: str
    ) -> TurnResult:
        text = narrator.redacted(outcome.text or "")
        if outcome.text is None and turn.is_resumed:
            text = _said_last(turn)  # The line that told it was told by another worker.
        if process.oom:
            return TurnResult(137, text, "oom", signal=process.signal, stop_reason=StopReason.ERROR)
        if process.timed_out:
            return TurnResult(124, text, "timeout", signal=process.signal, stop_reason=StopReason.ERROR)
        if outcome.is_out_of_turns:
            return TurnResult(1, text, "max_turns", stop_reason=StopReason.MAX_TURNS)
        if outcome.is_whole and outcome.failure is None and process.exit_code == 0:
            return TurnResult(0, text)
        if spent := budget_spent(turn.session):
            return _spent(narrator, spent, text)
        failure = outcome.failure or Failure(
            "agent_failed",
            f"{self.program.name} ended with {process.exit_code if process.exit_code is not None else 'no exit code'}"
            + (f": {stderr.strip()}" if stderr.strip() else ", and did not say why."),
        )
        narrator.fail(failure)
        return TurnResult(1, text, failure.code, signal=process.signal, stop_reason=StopReason.ERROR)


def _said_last(turn: Turn) -> str:
    """The model's words at the end of the task's frames."""
    turn.log.flush()
    start = last_speech(turn.session, turn.task)
    if start is None:
        return ""
    said = Event.objects.filter(task=turn.task, seq__gte=start, type="stdout", data__source="assistant")
    return "".join(said.order_by("seq").values_list("data__data", flat=True))


def _spent(narrator: Narrator, spent: str, text: str) -> TurnResult:
    narrator.fail(Failure("budget_spent", spent))
    return TurnResult(1, text, "budget", stop_reason=StopReason.BUDGET)


def _model(session: Session) -> str:
    """The model for this task. Raises `ValidationFailed`."""
    secret = holder_llm(holder=session.public_id)
    model = session.llm_model or (secret.model if secret else None) or ""
    model_check(session.agent_kind, model)
    return model


def working_folder(turn: Turn, client: GuestClient) -> str:
    """The session's folder, below the workspace, which lies elsewhere on the process engine. It is made when it is not
    there."""
    cwd = str(turn.session.agent.get("cwd") or WORKSPACE)
    if cwd != WORKSPACE and not turn.is_resumed:
        client.file_mkdir(cwd)
    return cwd.removeprefix(WORKSPACE).lstrip("/")


@dataclass(slots=True)
class EventLines:
    """A process's standard output as JSON events, each given to the translation and committed with its offset."""

    narrator: Narrator
    translation: Translation
    offset: int = 0
    stderr: str = ""
    _line: bytearray = field(default_factory=bytearray)
    _is_skipping: bool = False

    def resume(self) -> None:
        self.narrator.resume()
        self.offset = self.narrator.mark.offset

    def output(self, frame: Output) -> None:
        end = frame.offset + len(frame.data)
        if end <= self.offset:
            return
        start = max(self.offset, frame.offset)
        data = frame.data[start - frame.offset :]
        self.offset = end
        if frame.stream == "stderr":
            self.stderr = (self.stderr + data.decode(errors="replace"))[-STDERR_KEPT:]
            return
        at = 0
        while (newline := data.find(b"\n", at)) >= 0:
            self._take(data[at:newline])
            self._end_line(start + newline + 1)
            at = newline + 1
        self._take(data[at:])

    def _take(self, data: bytes) -> None:
        if self._is_skipping or len(self._line) + len(data) > LINE_LIMIT:
            self._is_skipping = True
            self._line.clear()
        else:
            self._line += data

    def _end_line(self, offset: int) -> None:
        event = None if self._is_skipping else event_of(bytes(self._line))
        if self._is_skipping:
            log.info("agent.line_left_out", offset=offset)
        self._is_skipping = False
        self._line.clear()
        if event is not None:
            self.translation.event(event)
        self.narrator.commit(offset)

    def gap(self, gap: Gap) -> None:
        """What is missing was the middle of a line, or whole ones: the next whole one counts."""
        self.offset = max(self.offset, gap.offset)
        self._is_skipping = True
        self._line.clear()

    def finish(self) -> None:
        if self._line:  # A last line without its newline.
            self._end_line(self.offset)
        self.narrator.end()


def event_of(line: bytes) -> dict[str, Any] | None:
    """One event; `None` for what is none."""
    try:
        event = json.loads(line, parse_constant=_no_number)
        if b"\\ud" in line.lower():  # Half a surrogate pair can be neither sent nor stored.
            event = json.loads(json.dumps(event, ensure_ascii=False).encode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None


def _no_number(name: str) -> None:
    """NaN and infinities are no JSON, and no database takes them."""


def part(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object inside an event; empty when there is none."""
    found = value.get(name)
    return found if isinstance(found, dict) else {}


def parts(value: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The objects of a list inside an event."""
    found = value.get(name)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def word(value: Mapping[str, Any], name: str) -> str:
    """A text inside an event; empty when there is none."""
    found = value.get(name)
    return found if isinstance(found, str) else ""


def number(value: Mapping[str, Any], name: str) -> int | None:
    """A whole number inside an event."""
    found = value.get(name)
    return found if type(found) is int else None

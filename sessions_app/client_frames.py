"""What a client may say on the socket, parsed and carried out (CONTRACT 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from e2a.core.errors import Conflict, E2AError, NotFound
from e2a.core.parsers import strict_json
from sandboxes.services import sandbox_client
from sessions_app.models import Event, Session, SessionStatus, Task, TaskState
from sessions_app.task_queue import prompt_check, task_cancel, task_submit


class BadFrame(Exception):
    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Auth:
    token: str
    after: int | None = None


@dataclass(frozen=True, slots=True)
class Resume:
    after: int


@dataclass(frozen=True, slots=True)
class Ping:
    data: Any = None


@dataclass(frozen=True, slots=True)
class SubmitTask:
    prompt: str
    client_id: str | None


@dataclass(frozen=True, slots=True)
class Cancel:
    task_id: str | None


@dataclass(frozen=True, slots=True)
class Stdin:
    data: str
    is_last: bool


ClientFrame = Auth | Resume | Ping | SubmitTask | Cancel | Stdin

_FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "auth": ({"token"}, {"after"}),
    "resume": ({"after"}, set()),
    "ping": (set(), {"data"}),
    "task": ({"prompt"}, {"id"}),
    "cancel": (set(), {"task_id"}),
    "stdin": ({"data"}, {"eof"}),
}
_LATER = {"tool_result": "custom tools", "approval": "approvals"}


def parse(text: str | None) -> ClientFrame:
    """The frame that `text` is. Raises `BadFrame` for what is none."""
    if text is None:
        raise BadFrame("not_text", "Frames are JSON text, not binary.")
    try:
        frame = strict_json(text.encode())
    except ValueError:
        raise BadFrame("malformed_json", "This is not well-formed JSON.") from None
    if not isinstance(frame, dict) or not isinstance(frame.get("type"), str):
        raise BadFrame("malformed_frame", "A frame is an object with a `type`.")
    kind = frame.pop("type")
    if kind in _LATER:
        raise BadFrame("not_built", f"{_LATER[kind]} are not built yet.")
    if kind not in _FIELDS:
        raise BadFrame("unknown_type", f"There is no frame type {kind[:40]!r}.")
    needed, optional = _FIELDS[kind]
    if missing := needed - set(frame):
        raise BadFrame("missing_field", f"`{min(missing)}` is missing.")
    if unknown := set(frame) - needed - optional:
        raise BadFrame("unknown_field", f"There is no field {min(unknown)[:40]!r} in {kind}.")
    return _typed(kind, frame)


def _typed(kind: str, frame: dict[str, Any]) -> ClientFrame:
    match kind:
        case "auth":
            return Auth(_text(frame, "token"), _count(frame["after"]) if "after" in frame else None)
        case "resume":
            return Resume(_count(frame["after"]))
        case "ping":
            return Ping(frame.get("data"))
        case "task":
            client_id = frame.get("id")
            if client_id is not None and not (
                isinstance(client_id, str) and 1 <= len(client_id) <= 128 and "\0" not in client_id
            ):
                raise BadFrame("invalid_field", "`id` is a text of 1 to 128 characters.")
            return SubmitTask(_text(frame, "prompt"), client_id)
        case "cancel":
            return Cancel(None if frame.get("task_id") is None else _text(frame, "task_id"))
        case _:
            if not isinstance(frame.get("eof", False), bool):
                raise BadFrame("invalid_field", "`eof` is true or false.")
            return Stdin(_text(frame, "data"), frame.get("eof", False))


def _text(frame: dict[str, Any], name: str) -> str:
    value = frame[name]
    if not isinstance(value, str) or "\0" in value:
        raise BadFrame("invalid_field", f"`{name}` is a text.")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**53:
        raise BadFrame("invalid_field", "`after` is a whole number, 0 or more.")
    return value


def act(frame: ClientFrame, session_pk: int) -> None:
    """Carry a frame out. Raises errors of our tree, which become `error` frames; effects are in the log."""
    session = Session.objects.select_related("tenant", "sandbox__node").get(pk=session_pk)
    match frame:
        case SubmitTask():
            prompt_check(frame.prompt)
            task_submit(session=session, prompt=frame.prompt, client_id=frame.client_id)
        case Cancel():
            task_cancel(_task_to_cancel(session, frame.task_id))
        case Stdin():
            stdin_send(session=session, data=frame.data, is_last=frame.is_last)
        case _:
            raise AssertionError(f"{frame} is for the consumer")


def _task_to_cancel(session: Session, task_id: str | None) -> Task:
    open_tasks = session.tasks.exclude(state=TaskState.DONE).order_by("pk")
    task = session.tasks.filter(public_id=task_id).first() if task_id is not None else open_tasks.first()
    if task is None:
        raise NotFound("There is no task to cancel." if task_id is None else "There is no such task.")
    return task


def stdin_send(*, session: Session, data: str, is_last: bool) -> None:
    """Input for the running command. Raises `Conflict` (`nothing_running`) when there is none.

    A shell task's command has the task's id; a tool call's id is in its frame.
    """
    task = session.tasks.filter(state=TaskState.RUNNING).first()
    if session.status == SessionStatus.ENDED or task is None or session.sandbox is None:
        raise Conflict("No command is running.", code="nothing_running")
    process_id = task.public_id
    if session.agent_kind != "shell":
        last = Event.objects.filter(task=task, type__in=("tool_use", "tool_result")).order_by("-seq").first()
        if last is None or last.type != "tool_use" or not last.private:
            raise Conflict("No command is running.", code="nothing_running")
        process_id = last.private["process_id"]
    try:
        sandbox_client(session.sandbox).process_stdin(process_id, data.encode(), close=is_last)
    except E2AError as error:
        raise Conflict(f"The command takes no input: {error.detail}", code="stdin_refused") from error

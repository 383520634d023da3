"""`codex`: OpenAI's program of that name, run headless; its JSON events as frames."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from sandboxes.guest_client import GuestClient
from sessions_app.agents.cli import BROKER, PLACEHOLDER, Launch, Outcome, number, part, parts, word
from sessions_app.agents.narration import Failure, Narrator, mark_of
from sessions_app.models import Event
from sessions_app.turns import Turn

_KEY_NAME: Final = "E2A_MODEL_KEY"
"""No bundle can hold it, so nothing of the tenant's is hidden from the commands."""
_CONFIGURATION: Final = (
    'model_provider="e2a"',
    f'model_providers.e2a={{name="e2a", base_url="{BROKER}/openai/v1", env_key="{_KEY_NAME}", '
    'wire_api="responses", request_max_retries=3, stream_max_retries=3}',
    "shell_environment_policy.ignore_default_excludes=true",
    "check_for_update_on_startup=false",
    "analytics.enabled=false",
)
_STATUS: Final = re.compile(r"(?:unexpected|last) status:? (\d{3})")
_RETRY: Final = re.compile(r"Reconnecting\.\.\. \d+/\d+(?: \((.*)\))?", re.DOTALL)
_URL: Final = re.compile(r",? url: \S+?(?=,|\)|\s|\Z)")
_THREAD: Final = re.compile(r"[0-9a-fA-F-]{8,64}")


class Codex:
    name = "codex"

    def launch(self, turn: Turn, client: GuestClient, model: str) -> Launch:
        thread = _thread_of(turn)
        options = [
            "--json",
            "--skip-git-repo-check",
            "--dangerously-bypass-approvals-and-sandbox",
            "-m",
            model,
        ]
        for setting in _CONFIGURATION:
            options += ["-c", setting]
        where = ["exec", "resume", *options, thread] if thread else ["exec", *options]
        return Launch(("codex", *where, "-"), {_KEY_NAME: PLACEHOLDER})

    def translation(self, turn: Turn, narrator: Narrator) -> CodexEvents:
        return CodexEvents(narrator, turn.task.public_id)


def _thread_of(turn: Turn) -> str:
    """The conversation that an earlier task of the session began; the program names it, and the frames remember."""
    mark = mark_of(Event.objects.filter(session=turn.session))
    thread = mark.state.get("thread", "") if mark else ""
    return thread if isinstance(thread, str) and _THREAD.fullmatch(thread) else ""


class CodexEvents:
    """Items come when they begin and when they end. Their ids begin anew with each task, so the task's goes before."""

    def __init__(self, narrator: Narrator, task: str) -> None:
        self._narrator = narrator
        self._task = task
        self.outcome = Outcome()

    def event(self, event: Mapping[str, Any]) -> None:
        match event.get("type"):
            case "thread.started" if _THREAD.fullmatch(word(event, "thread_id")):
                self._narrator.state["thread"] = word(event, "thread_id")
                self._narrator.keep_state()
            case "item.started" | "item.updated":
                self._begun(part(event, "item"))
            case "item.completed":
                self._ended(part(event, "item"))
            case "error":
                if retry := _RETRY.fullmatch(word(event, "message")):
                    self._narrator.retrying(_failure(retry[1] or "The connection to the model broke."))
            case "turn.failed":
                self.outcome.failure = _failure(word(part(event, "error"), "message"))
            case "turn.completed":
                self.outcome.is_whole = True
                self.outcome.failure = None

    def _call_id(self, item: Mapping[str, Any]) -> str:
        return f"{self._task}_{word(item, 'id')[:64]}"

    def _begun(self, item: Mapping[str, Any]) -> None:
        called = _called(item)
        if called is not None and self._call_id(item) not in self._narrator.open_calls:
            self._narrator.state.pop("spoken", None)
            self._narrator.tool_use(self._call_id(item), *called)

    def _ended(self, item: Mapping[str, Any]) -> None:
        if item.get("type") in ("agent_message", "reasoning"):
            self._said(word(item, "text"), is_answer=item.get("type") == "agent_message")
        elif _called(item) is not None:
            self._begun(item)
            output, exit_code = _answered(item)
            is_error = item.get("status") in ("failed", "declined") or bool(item.get("error"))
            self._narrator.tool_result(self._call_id(item), output, is_error=is_error, exit_code=exit_code)

    def _said(self, text: str, *, is_answer: bool) -> None:
        state = self._narrator.state
        if not text:
            return
        self._narrator.say(f"\n\n{text}" if state.get("spoken") else text)
        self._narrator.end_speech()
        state["spoken"] = True
        if is_answer:
            self.outcome.text = text


def _called(item: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Name and input of the tool that an item is a call of; `None` for other items."""
    match item.get("type"):
        case "command_execution":
            return "command_execution", {"command": word(item, "command")}
        case "file_change":
            return "file_change", {"changes": parts(item, "changes")}
        case "mcp_tool_call":
            return f"{word(item, 'server')}.{word(item, 'tool')}", item.get("arguments")
        case "web_search":
            return "web_search", {"query": word(item, "query")}
        case _:
            return None


def _answered(item: Mapping[str, Any]) -> tuple[str, int | None]:
    """What a call gave: its output for a person, and a command's exit code."""
    match item.get("type"):
        case "command_execution":
            return word(item, "aggregated_output"), number(item, "exit_code")
        case "file_change":
            lines = [f"{word(change, 'kind')} {word(change, 'path')}\n" for change in parts(item, "changes")]
            return "".join(lines), None
        case "mcp_tool_call":
            error, result = part(item, "error"), part(item, "result")
            texts = [word(block, "text") for block in parts(result, "content") if block.get("type") == "text"]
            return word(error, "message") or "\n".join(texts) or (json.dumps(result) if result else ""), None
        case _:
            return "", None


def _failure(message: str) -> Failure:
    """The program names the status in a sentence, and the broker's address behind it."""
    detail = _URL.sub("", message).strip() or "codex failed, and did not say why."
    if status := _STATUS.search(message):
        return Failure.of_model(int(status[1]), detail)
    if "disconnected" in message or "connection" in message.lower() or "error sending request" in message:
        return Failure.of_model(None, detail)
    return Failure("agent_failed", detail)

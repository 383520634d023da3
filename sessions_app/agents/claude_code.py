"""`claude-code`: Anthropic's program `claude`, run headless; its `stream-json` events as frames."""

from __future__ import annotations

import itertools
import re
import uuid
from collections.abc import Mapping
from typing import Any, Final

from e2a.core.errors import GuestError
from sandboxes.guest_client import GuestClient
from sessions_app.agents.cli import BROKER, PLACEHOLDER, Launch, Outcome, number, part, parts, word
from sessions_app.agents.narration import Failure, Narrator
from sessions_app.models import Session
from sessions_app.turns import Turn

_NAMESPACE: Final = uuid.UUID("5b3fbd4c-1b0e-4f2e-9d3c-6a4d1f5b7a10")
_PROJECTS: Final = "/home/agent/.claude/projects"
_MISSING: Final = frozenset({"not_found", "no_such_path", "not_a_directory"})
_EXIT_CODE: Final = re.compile(r"Exit code (\d{1,3})(?:\n|\Z)")
_ENVIRONMENT: Final = {
    "ANTHROPIC_BASE_URL": f"{BROKER}/anthropic",
    "ANTHROPIC_API_KEY": PLACEHOLDER,
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "CLAUDE_CODE_MAX_RETRIES": "3",
    "DISABLE_AUTOUPDATER": "1",
    "IS_SANDBOX": "1",
}


class ClaudeCode:
    name = "claude"

    def launch(self, turn: Turn, client: GuestClient, model: str) -> Launch:
        conversation = conversation_id(turn.session)
        knows_it = _has_conversation(client, conversation)
        argv = [
            "claude", "-p", "--output-format", "stream-json", "--verbose", "--include-partial-messages",
            "--dangerously-skip-permissions", "--model", model,
            "--resume" if knows_it else "--session-id", conversation,
        ]  # fmt: skip
        if max_turns := turn.session.agent.get("max_turns"):
            argv += ["--max-turns", str(int(max_turns))]
        return Launch(tuple(argv), _ENVIRONMENT)

    def translation(self, turn: Turn, narrator: Narrator) -> ClaudeEvents:
        return ClaudeEvents(narrator)


def conversation_id(session: Session) -> str:
    """What the program calls the session's conversation. Ours to choose, so that no worker has to learn it."""
    return str(uuid.uuid5(_NAMESPACE, session.public_id))


def _has_conversation(client: GuestClient, conversation: str) -> bool:
    """Whether the program has saved it, which it does when the first prompt arrives: in a folder of the project's."""
    try:
        projects = client.file_list(_PROJECTS)
    except GuestError as error:
        if error.code not in _MISSING:
            raise
        return False
    for project in itertools.islice(projects, 100):
        try:
            client.file_stat(f"{_PROJECTS}/{project.name}/{conversation}.jsonl")
            return True
        except GuestError as error:
            if error.code not in _MISSING:
                raise
    return False


class ClaudeEvents:
    """Text comes in deltas and again as a whole: it is told from the deltas, or from the whole when none came."""

    def __init__(self, narrator: Narrator) -> None:
        self._narrator = narrator
        self.outcome = Outcome()

    def event(self, event: Mapping[str, Any]) -> None:
        if event.get("parent_tool_use_id"):
            return  # What a subagent does is the inside of the call that started it.
        match event.get("type"):
            case "stream_event":
                self._delta(part(event, "event"), is_abandoned=bool(event.get("abandoned_blocks")))
            case "assistant":
                self._message(event, part(event, "message"))
            case "user":
                self._results(event, part(event, "message"))
            case "system" if event.get("subtype") == "api_retry":
                self._broken_off()
                why = word(event, "error") or "unknown"
                failure = Failure.of_model(number(event, "error_status"), f"The model call failed: {why}.")
                self._narrator.retrying(failure)
            case "result":
                self._result(event)

    def _delta(self, event: Mapping[str, Any], *, is_abandoned: bool) -> None:
        state = self._narrator.state
        match event.get("type"):
            case "message_start":
                self._broken_off()
                state["message"] = word(part(event, "message"), "id")
            case "content_block_delta":
                delta = part(event, "delta")
                if text := word(delta, "text") or word(delta, "thinking"):
                    state["spoken"] = True
                    self._narrator.say(text)
            case "content_block_stop":
                self._narrator.end_speech()
            case "message_stop":
                self._narrator.end_speech()
                if is_abandoned:
                    self._broken_off()
                state.pop("spoken", None)

    def _broken_off(self) -> None:
        """Another message begins: what an unfinished one has said will be said again."""
        if self._narrator.state.get("spoken"):
            self._narrator.take_back()
            self._narrator.state.pop("spoken", None)

    def _message(self, event: Mapping[str, Any], message: Mapping[str, Any]) -> None:
        is_told = word(message, "id") == self._narrator.state.get("message")
        if not is_told:
            self._broken_off()
        for block in parts(message, "content"):
            match block.get("type"):
                case "text" | "thinking" if not is_told and not event.get("is_api_error_message"):
                    self._narrator.say(word(block, "text") or word(block, "thinking"))
                    self._narrator.end_speech()
                case "tool_use":
                    self._narrator.tool_use(word(block, "id"), word(block, "name"), block.get("input"))

    def _results(self, event: Mapping[str, Any], message: Mapping[str, Any]) -> None:
        for block in parts(message, "content"):
            if block.get("type") != "tool_result":
                continue
            output = word(block, "content") or "\n".join(
                word(item, "text") for item in parts(block, "content") if item.get("type") == "text"
            )
            is_error = block.get("is_error") is True
            exit_code = 0 if not is_error and "stdout" in part(event, "tool_use_result") else None
            if is_error and (said := _EXIT_CODE.match(output)):
                exit_code = int(said[1])
                output = output[said.end() :]
            self._narrator.tool_result(
                word(block, "tool_use_id"), output, is_error=is_error, exit_code=exit_code
            )

    def _result(self, event: Mapping[str, Any]) -> None:
        outcome = self.outcome
        outcome.is_whole = True
        outcome.text = word(event, "result")
        outcome.is_out_of_turns = event.get("subtype") == "error_max_turns"
        if event.get("is_error") is True and not outcome.is_out_of_turns:
            errors = event.get("errors")
            detail = outcome.text or (str(errors[0]) if isinstance(errors, list) and errors else "")
            if event.get("terminal_reason") == "api_error" or "api_error_status" in event:
                outcome.failure = Failure.of_model(number(event, "api_error_status"), detail)
            else:
                outcome.failure = Failure("agent_failed", detail or "claude failed, and did not say why.")
            outcome.text = ""

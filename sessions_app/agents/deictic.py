"""`deictic`: our own agent loop. The model is called from here with the tenant's key; the sandbox runs commands."""

from __future__ import annotations

import functools
from typing import Any, Final

import structlog

from e2a.core.errors import E2AError
from sandboxes.activity import Work
from sandboxes.guest_client import GuestClient
from sandboxes.models import Sandbox
from sandboxes.services import sandbox_client, sandbox_ensure_configured
from sandboxes.waiting import database_release
from secrets_vault.services import LLMSecret, holder_environment_names, holder_llm
from sessions_app import frames
from sessions_app.conversation import Conversation, conversation_of
from sessions_app.llm import model_endpoint, open_model
from sessions_app.llm.anthropic_message import BASH_TOOL, EDITOR_TOOL
from sessions_app.llm.base import (
    Block,
    MessageDone,
    ModelClient,
    ModelError,
    ModelRequest,
    TextDelta,
    ThinkingDelta,
    retry_delay,
)
from sessions_app.models import Event, Session, StopReason
from sessions_app.secrecy import SessionSecrets, SpokenText
from sessions_app.spending import Spent, budget_spent, call_enter
from sessions_app.tools.base import ToolAnswer
from sessions_app.tools.bash import process_id, run_bash
from sessions_app.tools.editor import run_editor
from sessions_app.turns import Turn, TurnResult

log = structlog.get_logger(__name__)

MODEL_ATTEMPTS: Final = 5
DEFAULT_MAX_TURNS: Final = 100
TOOLS: Final[tuple[Block, ...]] = (BASH_TOOL, EDITOR_TOOL)
SYSTEM: Final = (
    "You are an agent with a Linux sandbox of your own. Your working folder is /workspace; relative paths start there. "
    "bash keeps its folder and variables from one call to the next; every command must end by itself within ten "
    "minutes, and runs without a terminal. There is no network unless the task says so. What your commands print is "
    "shown to the user as it happens, so do not repeat it. Say briefly what you did when you are done."
)


class _OpenModel:
    """What a turn waits for while the model speaks."""

    work: Work = "model_call"

    def __init__(self, client: ModelClient) -> None:
        self.client = client

    def stop(self, *, abandon: bool) -> None:
        self.client.close()


class DeicticAgent:
    """Model, tools, model, … until the model is done. What it knows is in the log, so any worker can go on."""

    def run(self, turn: Turn) -> TurnResult:
        sandbox = turn.session.sandbox
        assert sandbox is not None, "a turn starts when the sandbox runs"
        conversation = conversation_of(turn.session)
        max_turns = int(turn.session.agent.get("max_turns") or DEFAULT_MAX_TURNS)
        while True:
            turn.check()
            if conversation.open_calls:
                self._answer_calls(turn, sandbox, conversation)
                continue
            if conversation.model_calls and conversation.last_stop_reason not in ("tool_use", "pause_turn"):
                return _ending(conversation)
            if conversation.model_calls >= max_turns:
                return TurnResult(1, _last_text(conversation), "max_turns", stop_reason=StopReason.MAX_TURNS)
            if spent := budget_spent(turn.session):
                turn.log.append(
                    frames.error(code="budget_spent", detail=spent, retry="terminal", task=turn.task.pk)
                )
                return TurnResult(1, _last_text(conversation), "budget", stop_reason=StopReason.BUDGET)
            try:
                self._call_model(turn, conversation)
            except ModelError as error:
                turn.check()
                return TurnResult(1, _last_text(conversation), error.code, stop_reason=StopReason.ERROR)

    def _call_model(self, turn: Turn, conversation: Conversation) -> None:
        """One model call with its retries. Raises `ModelError` when they are used up, after its `error` frame."""
        attempt = 1
        while True:
            start = turn.log.position()
            try:
                self._stream(turn, conversation)
                return
            except ModelError as error:
                turn.check()
                if _has_spoken(turn, start):  # What it said before it broke will be said again.
                    turn.log.append(frames.restarted(turn.task.pk, discard_after=start))
                is_last = not error.retryable or attempt >= MODEL_ATTEMPTS
                turn.log.append(
                    frames.error(
                        code=error.code,
                        detail=error.detail,
                        retry="retrying" if not is_last else "exhausted" if error.retryable else "terminal",
                        task=turn.task.pk,
                    )
                )
                if is_last:
                    raise
                log.info("model.retry", task=turn.task.public_id, code=error.code, attempt=attempt)
                turn.pause(retry_delay(attempt, error))
                attempt += 1

    def _stream(self, turn: Turn, conversation: Conversation) -> None:
        secret = holder_llm(
            holder=turn.session.public_id
        )  # Read for every call: a replaced key counts at once.
        if secret is None:
            raise ModelError("llm_auth", "The session's bundles hold no LLM_API_KEY any more.")
        client = _open(turn.session, secret)
        request = ModelRequest(
            model=turn.session.llm_model or secret.model or "",
            messages=conversation.messages,
            system=str(turn.session.agent.get("system") or SYSTEM),
            tools=TOOLS,
        )
        secrets = SessionSecrets.of(turn.session.public_id)
        spoken = SpokenText(secrets)
        turn.waits_for(_OpenModel(client))
        database_release()
        try:
            for event in client.stream(request):
                # Some models report what they do between calls as thoughts: a person would read them, too.
                text = (
                    spoken.feed(event.text) if isinstance(event, TextDelta | ThinkingDelta) else spoken.end()
                )
                if text:
                    turn.log.text(frames.text("stdout", text, source="assistant", task=turn.task.pk))
                if isinstance(event, MessageDone):
                    self._store(turn, conversation, event, secrets)
        finally:
            turn.waits_for(None)
            client.close()

    def _store(
        self, turn: Turn, conversation: Conversation, done: MessageDone, secrets: SessionSecrets
    ) -> None:
        """The model's message, its cost and its calls, in one transaction: the point from which a crash goes on."""
        spent = Spent.of(done.model, done.usage)
        message = secrets.to_store(done.content)
        calls = [block for block in message if block.get("type") == "tool_use"]
        session, task = turn.session, turn.task
        assert session.sandbox is not None, "a turn starts when the sandbox runs"
        turn.log.append(
            frames.usage(task.pk, spent.as_frame(), message=message, stop_reason=done.stop_reason),
            *(
                frames.tool_use(
                    turn.task.pk,
                    tool_use_id=call["id"],
                    name=call["name"],
                    tool_input=call["input"],
                    process_id=process_id(turn, call["id"]) if call["name"] == "bash" else None,
                )
                for call in calls
            ),
            also=functools.partial(
                call_enter,
                tenant_pk=session.tenant_id,
                session_pk=session.pk,
                task_pk=task.pk,
                sandbox_id=session.sandbox.public_id,
                vendor=session.llm_vendor,
                spent=spent,
            ),
        )
        conversation.answer(secrets.to_run(done.content), done.stop_reason)
        for call in calls:
            if call["id"] in done.broken_tool_inputs:
                cut_off = ToolAnswer("The call's input was cut off.", is_error=True)
                self._result(turn, conversation, call, cut_off, secrets)

    def _answer_calls(self, turn: Turn, sandbox: Sandbox, conversation: Conversation) -> None:
        """Run every open call, in order. A command that runs already is re-attached, one that is done is read."""
        sandbox_ensure_configured(sandbox)
        client = sandbox_client(sandbox)
        names = holder_environment_names(holder=turn.session.public_id)
        secrets = SessionSecrets.of(turn.session.public_id)
        for call in list(conversation.open_calls):
            turn.check()
            self._result(turn, conversation, call, _run_tool(turn, client, call, names), secrets)

    def _result(
        self, turn: Turn, conversation: Conversation, call: Block, answer: ToolAnswer, secrets: SessionSecrets
    ) -> None:
        content = secrets.text(answer.content)
        shown = []
        if answer.shown:
            text = secrets.text(answer.shown)
            shown = [frames.text("stdout", text, source="tool", task=turn.task.pk, tool_use_id=call["id"])]
        turn.log.append(
            *shown,
            frames.tool_result(
                turn.task.pk,
                tool_use_id=call["id"],
                content=content,
                is_error=answer.is_error,
                exit_code=answer.exit_code,
                truncated=answer.truncated,
            ),
        )
        conversation.result(call["id"], content, is_error=answer.is_error)


def _has_spoken(turn: Turn, after: int) -> bool:
    """Whether the model's text entered the log after that seq."""
    turn.log.flush()
    spoken = Event.objects.filter(task=turn.task, seq__gt=after, type="stdout", data__source="assistant")
    return spoken.exists()


def _run_tool(turn: Turn, client: GuestClient, call: Block, bundle_names: frozenset[str]) -> ToolAnswer:
    arguments: dict[str, Any] = call["input"] if isinstance(call["input"], dict) else {}
    if call["name"] == "bash":
        return run_bash(turn, client, call["id"], arguments, bundle_names=bundle_names)
    if call["name"] == "str_replace_based_edit_tool":
        return run_editor(client, arguments, is_resumed=turn.is_resumed)
    return ToolAnswer(f"There is no tool {call['name']}.", is_error=True)


def _open(session: Session, secret: LLMSecret) -> ModelClient:
    """Raises `ModelError` when the address is not allowed any more: a setting may have changed since."""
    base_url = session.llm_base_url or secret.base_url or None
    try:
        endpoint = model_endpoint(session.llm_vendor, base_url)
    except E2AError as error:
        raise ModelError("llm_bad_request", error.detail) from None
    return open_model(vendor=session.llm_vendor, api_key=secret.api_key.reveal(), endpoint=endpoint)


def _last_text(conversation: Conversation) -> str:
    if not conversation.messages or conversation.messages[-1]["role"] != "assistant":
        return ""
    return "".join(b["text"] for b in conversation.messages[-1]["content"] if b.get("type") == "text")


def _ending(conversation: Conversation) -> TurnResult:
    """The model said its last word: well, cut off, or refusing."""
    text = _last_text(conversation)
    if conversation.last_stop_reason in ("max_tokens", "refusal", "model_context_window_exceeded"):
        return TurnResult(1, text, conversation.last_stop_reason, stop_reason=StopReason.ERROR)
    return TurnResult(0, text)

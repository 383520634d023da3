"""The conversation with a model, rebuilt from the event log: the log is the only memory (ARCHITECTURE 6)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sessions_app.llm.base import Block, Message
from sessions_app.models import Event, Session

INTERRUPTED = "The call was interrupted before it had a result."


@dataclass(slots=True)
class Conversation:
    """Messages in the vendor's shape, and the tool calls of the last one that have no result yet."""

    messages: list[Message] = field(default_factory=list)
    open_calls: list[Block] = field(default_factory=list)
    last_stop_reason: str = ""
    model_calls: int = 0
    """Model calls of the newest task."""

    def user(self, *blocks: Block) -> None:
        """Add to the user's side; neighbouring user messages become one, since roles must alternate."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages[-1]["content"].extend(blocks)
        else:
            self.messages.append({"role": "user", "content": list(blocks)})

    def prompt(self, text: str) -> None:
        """A new task. Calls that were left open by a cancelled one are answered as interrupted."""
        self.user(*(tool_result(call["id"], INTERRUPTED, is_error=True) for call in self.open_calls))
        if self.messages and not self.messages[-1]["content"]:
            self.messages.pop()
        self.open_calls = []
        self.model_calls = 0
        self.user({"type": "text", "text": text})

    def answer(self, content: list[Block], stop_reason: str) -> None:
        """What the model said, verbatim. An empty answer is left out: vendors refuse it in the next request."""
        self.model_calls += 1
        self.last_stop_reason = stop_reason
        self.open_calls = [block for block in content if block.get("type") == "tool_use"]
        if content:
            self.messages.append({"role": "assistant", "content": list(content)})

    def result(self, tool_use_id: str, content: Any, *, is_error: bool) -> None:
        """A tool's answer."""
        self.open_calls = [call for call in self.open_calls if call["id"] != tool_use_id]
        self.user(tool_result(tool_use_id, content, is_error=is_error))


def tool_result(tool_use_id: str, content: Any, *, is_error: bool) -> Block:
    """The block that answers a tool call. Vendors refuse empty text, so nothing is said to be nothing."""
    return {
        "type": "tool_result",
        "tool_use_id": tool_use_id,
        "content": content if content not in ("", None) else "(no output)",
        "is_error": is_error,
    }


def conversation_of(session: Session) -> Conversation:
    """Everything said in the session so far. One query, over the frames that make a conversation."""
    rows: Iterable[tuple[str, dict[str, Any], dict[str, Any] | None]] = (
        Event.objects.filter(session=session, type__in=("task_started", "usage", "tool_result"))
        .order_by("seq")
        .values_list("type", "data", "private")
        .iterator()
    )
    conversation = Conversation()
    for kind, data, private in rows:
        if kind == "task_started":
            conversation.prompt(data["prompt"])
        elif private is None:
            continue  # The bill of a program in the sandbox that called a model itself.
        elif kind == "usage":
            conversation.answer(private["message"], private["stop_reason"])
        else:
            conversation.result(data["tool_use_id"], private["content"], is_error=data["is_error"])
    return conversation

"""Anthropic's stream protocol: raw events in, our events and the verbatim message out. No SDK, no network.

The SDK could build the message too, but it parses a growing tool input anew at each of its pieces, which is
quadratic for a file of some hundred kilobytes, and reshapes blocks that it does not know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final, NoReturn

from sessions_app.llm.base import (
    Block,
    MessageDone,
    ModelEvent,
    TextDelta,
    ThinkingDelta,
    ToolInputStarted,
    Usage,
)

BASH_TOOL: Final[Block] = {"type": "bash_20250124", "name": "bash"}
"""Input: `{command}` or `{restart: true}`."""
EDITOR_TOOL: Final[Block] = {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"}
"""Input: `{command: view|create|str_replace|insert, path, …}`."""

_TOOL_ID = re.compile(r"[a-zA-Z0-9_.:-]{1,256}")
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")
_MOST_TOKENS = 10**9
_USAGE_FIELDS = {
    "input_tokens": "input_tokens",
    "output_tokens": "output_tokens",
    "cache_read_input_tokens": "cache_read_tokens",
    "cache_creation_input_tokens": "cache_write_tokens",
}


class BadMessageError(ValueError):
    """The events do not make a message. The text is ours, none of the sender's."""


def loads_strictly(text: str) -> Any:
    """JSON as a database and UTF-8 can hold it: no NaN, no lone surrogates. Raises ValueError."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deep") from None
    return _without_lone_surrogates(value) if "\\ud" in text.lower() else value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _without_lone_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_without_lone_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_lone_surrogates(key): _without_lone_surrogates(item) for key, item in value.items()}
    return value


def _expect(condition: object, what: str) -> None:
    if not condition:
        raise BadMessageError(what)


class MessageBuilder:
    """Feed it the events of one answer in order."""

    def __init__(self, asked_model: str) -> None:
        self.is_started = False
        self._model = asked_model
        self._stop_reason = ""
        self._blocks: dict[int, Block] = {}
        self._pieces: dict[int, dict[str, list[str]]] = {}
        self._counts: dict[str, int] = {}
        self._tool_ids: set[str] = set()

    @property
    def usage(self) -> Usage:
        """What is known so far."""
        return Usage(**self._counts)

    def feed(self, event: Any) -> Iterator[ModelEvent]:
        """What this event means; `MessageDone` for the last. Unknown events and deltas mean nothing.

        Raises BadMessageError.
        """
        _expect(isinstance(event, dict), "an event is no object")
        match event.get("type"):
            case "message_start":
                self._start(event.get("message"))
            case "content_block_start":
                yield from self._block_start(self._index(event), event.get("content_block"))
            case "content_block_delta":
                yield from self._delta(self._index(event), event.get("delta"))
            case "message_delta":
                delta = event.get("delta")
                _expect(isinstance(delta, dict), "message_delta without a delta")
                if isinstance(delta.get("stop_reason"), str):
                    self._stop_reason = delta["stop_reason"]
                self._count(event.get("usage"))
            case "message_stop":
                _expect(self.is_started, "message_stop before message_start")
                yield self._done()

    def _start(self, message: Any) -> None:
        _expect(isinstance(message, dict), "message_start without a message")
        _expect(not self.is_started, "two messages in one answer")
        self.is_started = True
        if isinstance(message.get("model"), str) and message["model"]:
            self._model = message["model"][:128]
        self._count(message.get("usage"))

    def _count(self, usage: Any) -> None:
        # The counts of message_delta are totals, and those it leaves out stay as they were.
        for theirs, ours in _USAGE_FIELDS.items():
            count = usage.get(theirs) if isinstance(usage, dict) else None
            if isinstance(count, int) and not isinstance(count, bool) and 0 <= count <= _MOST_TOKENS:
                self._counts[ours] = count

    def _index(self, event: dict[str, Any]) -> int:
        index = event.get("index")
        _expect(
            self.is_started and isinstance(index, int), "a block outside of a message or without an index"
        )
        return int(event["index"])

    def _block_start(self, index: int, block: Any) -> Iterator[ModelEvent]:
        _expect(isinstance(block, dict) and isinstance(block.get("type"), str), "a block without a type")
        _expect(index not in self._blocks, "two blocks with one index")
        self._blocks[index] = dict(block)
        self._pieces[index] = {}
        if block["type"] == "tool_use":
            identifier, name = block.get("id"), block.get("name")
            _expect(
                isinstance(identifier, str) and _TOOL_ID.fullmatch(identifier), "a tool call without an id"
            )
            _expect(isinstance(name, str) and _TOOL_NAME.fullmatch(name), "a tool call without a name")
            _expect(identifier not in self._tool_ids, "two tool calls with one id")
            self._tool_ids.add(identifier)
            yield ToolInputStarted(identifier, name)
        elif block["type"] == "text" and block.get("text"):
            yield from self._text(index, "text", block["text"], TextDelta)

    def _delta(self, index: int, delta: Any) -> Iterator[ModelEvent]:
        _expect(index in self._blocks, "a delta before its block")
        _expect(isinstance(delta, dict), "a delta is no object")
        match delta.get("type"):
            case "text_delta":
                yield from self._text(index, "text", delta.get("text"), TextDelta)
            case "thinking_delta":
                yield from self._text(index, "thinking", delta.get("thinking"), ThinkingDelta)
            case "signature_delta":
                _expect(isinstance(delta.get("signature"), str), "a signature is no text")
                self._blocks[index]["signature"] = delta["signature"]
            case "input_json_delta":
                self._add(index, "input", delta.get("partial_json"))
            case "citations_delta":
                citations = self._blocks[index].get("citations")
                known = citations if isinstance(citations, list) else []
                self._blocks[index]["citations"] = [*known, delta.get("citation")]

    def _add(self, index: int, field: str, piece: Any) -> None:
        _expect(isinstance(piece, str), "a delta without its text")
        self._pieces[index].setdefault(field, []).append(piece)

    def _text(
        self, index: int, field: str, piece: Any, event: type[TextDelta | ThinkingDelta]
    ) -> Iterator[ModelEvent]:
        self._add(index, field, piece)
        if piece:
            yield event(piece)

    def _done(self) -> MessageDone:
        broken: set[str] = set()
        content: list[Block] = []
        for index in sorted(self._blocks):
            block = self._blocks[index]
            for field, pieces in self._pieces[index].items():
                joined = "".join(pieces)
                block[field] = joined if field != "input" else _tool_input(joined)
            if block["type"] == "tool_use" and not isinstance(block.get("input"), dict):
                # Cut off by max_tokens, as a rule. The vendor takes only objects back.
                broken.add(block["id"])
                block["input"] = {}
            content.append(block)
        return MessageDone(
            content=content,
            stop_reason=self._stop_reason or ("tool_use" if self._tool_ids else "end_turn"),
            usage=self.usage,
            model=self._model,
            broken_tool_inputs=frozenset(broken),
        )


def _tool_input(joined: str) -> Any:
    """The input that the pieces spell; None when they spell nothing whole."""
    if not joined:
        return {}
    try:
        return loads_strictly(joined)
    except ValueError:
        return None

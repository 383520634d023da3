"""What a model server answers: the vocabulary of scripts. Pure data; `server` speaks it."""

from __future__ import annotations

import itertools
import json
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Json = dict[str, Any]

WAIT_LIMIT = 30.0
"""No gate and no silence lasts longer, so that a broken test ends."""

_tool_numbers = itertools.count(1)


class Gate:
    """Holds an answer in its middle: the server waits at the gate until a test opens it."""

    def __init__(self) -> None:
        self._arrived = threading.Event()
        self.opened = threading.Event()

    def arrive(self) -> None:
        self._arrived.set()

    def wait_arrived(self, seconds: float = 10.0) -> None:
        """Until the server stands at the gate, which means that all before it was sent."""
        if not self._arrived.wait(seconds):
            raise AssertionError(f"the model server did not reach its gate within {seconds:g} s")

    def open(self) -> None:
        self.opened.set()


@dataclass(frozen=True)
class Reply:
    """A whole message. Each text is streamed in `pieces` deltas; `gate` stands after the first delta."""

    blocks: tuple[Json, ...]
    stop_reason: str | None = None
    """None: `tool_use` when a tool is called, else `end_turn`."""
    usage: Json = field(default_factory=dict)
    gate: Gate | None = None
    pieces: int = 3
    cut_input_of: str | None = None
    """The id of a tool call whose input ends in its middle, as when `max_tokens` is reached."""

    def with_(self, **changes: Any) -> Reply:
        """A copy: `say("x").with_(stop_reason="max_tokens", usage={"input_tokens": 9})`."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Answer:
    """A whole HTTP answer that is no message: an error, a redirect, garbage."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Misbehaviour:
    """`hang`: never answers. `cut`: closes in the middle of `reply`. `midstream`: an error event."""

    kind: Literal["hang", "cut", "midstream"]
    reply: Reply | None = None
    error_type: str = "overloaded_error"
    gate: Gate | None = None


Step = Reply | Answer | Misbehaviour
Script = Sequence[Step] | Callable[[Json, Mapping[str, str]], Step]


def say(text: str, *, gate: Gate | None = None, pieces: int = 3) -> Reply:
    """The model says something and stops."""
    return Reply(({"type": "text", "text": text},), gate=gate, pieces=pieces)


def call(name: str, tool_input: Json, *, tool_use_id: str | None = None, gate: Gate | None = None) -> Reply:
    """The model calls a tool."""
    identifier = tool_use_id or f"toolu_{next(_tool_numbers):024d}"
    block = {"type": "tool_use", "id": identifier, "name": name, "input": tool_input}
    return Reply((block,), gate=gate)


def think(text: str, *, signature: str | None = None) -> Reply:
    """The model thinks. Only of use in `together`; the block must come back verbatim in the next request."""
    return Reply(
        (
            {
                "type": "thinking",
                "thinking": text,
                "signature": signature or f"sig-{zlib.crc32(text.encode()):x}",
            },
        )
    )


def together(*replies: Reply) -> Reply:
    """One message with the blocks of several: `together(say("Looking."), call("bash", {...}))`."""
    gates = [reply.gate for reply in replies if reply.gate is not None]
    blocks = tuple(block for reply in replies for block in reply.blocks)
    return Reply(blocks, gate=gates[0] if gates else None, pieces=replies[0].pieces)


def then(*steps: Step) -> list[Step]:
    """A script: the first request gets the first step, and so on. One request too many gets a 400."""
    return list(steps)


_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def fail(
    status: int, message: str = "as the script says", *, retry_after: float | str | None = None
) -> Answer:
    """An error in the vendor's form."""
    headers = {} if retry_after is None else {"retry-after": str(retry_after)}
    return error_answer(status, _ERROR_TYPES.get(status, "api_error"), message, headers)


def error_answer(status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> Answer:
    body = {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_scripted"}
    return Answer(status, json.dumps(body).encode(), {"content-type": "application/json", **(headers or {})})


def garbage(body: bytes = b"event: message_start\ndata: {this is not json\n\n") -> Answer:
    """200 with an event stream that is none."""
    return Answer(200, body, {"content-type": "text/event-stream; charset=utf-8"})


def redirect(location: str, status: int = 307) -> Answer:
    return Answer(status, b"", {"location": location})


def hang(*, gate: Gate | None = None) -> Misbehaviour:
    """Takes the request and never answers (30 s at most)."""
    return Misbehaviour("hang", gate=gate)


def cut(reply: Reply) -> Misbehaviour:
    """Closes the connection after the first delta of the reply (after its gate, if it has one)."""
    return Misbehaviour("cut", reply)


def midstream_error(reply: Reply, error_type: str = "overloaded_error") -> Misbehaviour:
    """Sends an error event after the first delta of the reply, as the vendor does under load."""
    return Misbehaviour("midstream", reply, error_type)


def last_prompt(body: Json) -> tuple[str, int]:
    """The text of the last message that a person wrote, and how many model messages came after it."""
    from tests.model_server.responses import as_messages

    answers = 0
    for message in reversed(body["messages"] if "messages" in body else as_messages(body)):
        if message["role"] == "assistant":
            answers += 1
        if message["role"] != "user":  # Programs also speak as `system` and `developer`.
            continue
        content = message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if any(block["type"] == "tool_result" for block in blocks):
            continue
        return "\n".join(block["text"] for block in blocks if block["type"] == "text"), answers
    return "", answers


def by_prompt(
    scripts: Mapping[str, Sequence[Step]], *, otherwise: Sequence[Step] = ()
) -> Callable[[Json, Mapping[str, str]], Step]:
    """Scripts by a part of the prompt, for many sessions at once.

    The step is found from the conversation itself, so a retried request gets the same step again.
    """

    def answer(body: Json, headers: Mapping[str, str]) -> Step:
        prompt, number = last_prompt(body)
        steps = next((steps for part, steps in scripts.items() if part in prompt), otherwise)
        if number >= len(steps):
            return error_answer(
                400, "invalid_request_error", f"the script has no step {number} for {prompt!r}"
            )
        return steps[number]

    return answer

"""What a turn knows of a model: one request, a stream of events, typed errors. No vendor's name in it.

Messages, tools and content are in the shape of Anthropic's Messages API, which the other vendors' adapters
translate; they are stored and sent back verbatim, since vendors sign parts of them (thinking).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypedDict

Block = dict[str, Any]
"""One content block or one tool, as JSON."""


class Message(TypedDict):
    role: Literal["user", "assistant"]
    content: list[Block]


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """`tools` are the vendor's own or `{name, description, input_schema}`; `system` may be ""."""

    model: str
    messages: Sequence[Message]
    system: str = ""
    tools: Sequence[Block] = ()
    max_tokens: int = 16_384


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call. Each input token is in exactly one of the three input counts."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cache_read_tokens + other.cache_read_tokens,
            self.cache_write_tokens + other.cache_write_tokens,
        )


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of what the model says."""

    text: str


@dataclass(frozen=True, slots=True)
class ThinkingDelta:
    """A piece of the model's thoughts, where the vendor shows them. Some models report progress this way."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolInputStarted:
    """The model began to call a tool; its input comes with `MessageDone`."""

    tool_use_id: str
    name: str


@dataclass(frozen=True, slots=True)
class MessageDone:
    """The whole message, once, last. `content` must be sent back verbatim in the next request."""

    content: list[Block]
    stop_reason: str
    """`end_turn`, `tool_use`, `max_tokens`, `refusal`, `pause_turn`, … as the vendor says."""
    usage: Usage
    model: str
    """The model that answered; it may be more exact than the one asked for."""
    broken_tool_inputs: frozenset[str] = frozenset()
    """Ids of tool calls whose input was cut off or is no JSON object. Their `input` is `{}`: answer them with
    an error instead of running them."""


ModelEvent = TextDelta | ThinkingDelta | ToolInputStarted | MessageDone

ErrorCode = Literal[
    "llm_auth",  # 401, 403: the key
    "llm_billing",  # 402: the account behind the key
    "llm_rate_limited",  # 429
    "llm_overloaded",  # 529, 503
    "llm_server_error",  # other 5xx, 408, 409
    "llm_bad_request",  # 400, 404, …: the model's name, or our conversation
    "llm_context_too_long",  # the conversation does not fit; shorten it and try again
    "llm_bad_response",  # not the vendor's protocol, or a redirect
    "llm_unreachable",  # no connection, or it broke
    "llm_timeout",  # connected, then silence
    "llm_closed",  # `close` was called: cancel or deadline
]


class ModelError(Exception):
    """A model call failed. `detail` is for the tenant and holds no key.

    `retryable`: the same call may work later.
    """

    def __init__(
        self,
        code: ErrorCode,
        detail: str,
        *,
        retryable: bool = False,
        status: int | None = None,
        retry_after: float | None = None,
        usage: Usage | None = None,
    ) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.retryable = retryable
        self.status = status
        self.retry_after = retry_after
        """Seconds the vendor asks to wait, or None."""
        self.usage = usage
        """What the call had cost when it broke in its middle, as far as known."""


class ModelClient(Protocol):
    """One tenant's way to one vendor, for one call at a time. Not shared between sessions."""

    def stream(self, request: ModelRequest) -> Iterator[ModelEvent]:
        """Events as they come, `MessageDone` last. Raises only ModelError while iterated.

        Never retries. An iterator that is dropped or closed early ends the call.
        """
        ...

    def close(self) -> None:
        """End a running `stream` at once (it raises `llm_closed`) and refuse later ones. From any thread."""
        ...


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential back-off with jitter, in seconds."""

    first: float = 1.0
    longest: float = 30.0
    longest_asked: float = 60.0
    """A vendor that asks for more than this is asked again after this."""
    random: random.Random = field(default_factory=random.SystemRandom)

    def delay(self, attempt: int, error: ModelError) -> float:
        """How long to wait after failed attempt number `attempt` (from 1).

        Never shorter than the vendor asks, up to `longest_asked`.
        """
        backoff: float = min(self.longest, self.first * 2.0 ** min(attempt - 1, 16))
        backoff *= self.random.uniform(0.5, 1.0)
        if error.retry_after is None:
            return backoff
        asked = min(error.retry_after, self.longest_asked)
        # Those who were told the same time must not come back at the same moment.
        return max(backoff, asked + self.random.uniform(0.0, 0.25 * min(asked, 4.0)))


_RETRIES = RetryPolicy()


def retry_delay(attempt: int, error: ModelError) -> float:
    """Seconds to wait after failed attempt number `attempt` (from 1), by the usual policy."""
    return _RETRIES.delay(attempt, error)

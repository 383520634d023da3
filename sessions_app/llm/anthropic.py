"""Anthropic's Messages API through its own SDK. The only module that imports it."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any, cast

import anthropic
import httpx2
import structlog
from anthropic.types import MessageParam, ToolUnionParam

from e2a.core.outbound import CheckedUrl, OutboundClient, refused_address
from sessions_app.llm.anthropic_errors import from_error_event, from_status
from sessions_app.llm.anthropic_message import BadMessageError, MessageBuilder, loads_strictly
from sessions_app.llm.base import Block, Message, MessageDone, ModelError, ModelEvent, ModelRequest
from sessions_app.llm.sse import BadEventStreamError, server_sent_events

log = structlog.get_logger(__name__)

_KEY = re.compile(r"[!-~]{1,4096}")
_CACHED: Block = {"type": "ephemeral"}
_UNCACHEABLE = frozenset({"thinking", "redacted_thinking"})
_SENT_HEADERS = re.compile(
    r"host|connection|accept|accept-encoding|user-agent|content-type|content-length|transfer-encoding"
    r"|authorization|x-api-key|idempotency-key|anthropic-.*|x-stainless-.*"
)
_REPORTS_IN_THOUGHTS = ("claude-sonnet-5-5",)
"""Models whose words between tool calls arrive as thoughts, which are empty unless they are asked for:
https://platform.claude.com/docs/en/models/sonnet-5-5/whats-new-sonnet-5-5"""

_UNREACHABLE = "The model's endpoint could not be reached."
_CLOSED = "The model call was ended."
_BROKE_OFF = "The model's endpoint broke off its answer."


def _only_known_headers(request: httpx2.Request) -> None:
    """Drop what the SDK adds from our own environment (`ANTHROPIC_CUSTOM_HEADERS`, tracing).

    The endpoint may be anybody's.
    """
    for name in list(request.headers):
        if not _SENT_HEADERS.fullmatch(name.lower()):
            del request.headers[name]


class AnthropicModel:
    """A `ModelClient`. Owns `http` and closes it. A `/v1` at the end of `base_url` is taken off."""

    def __init__(self, *, api_key: str, base_url: CheckedUrl, http: OutboundClient) -> None:
        self._key = api_key.strip()
        self._http = http
        self._lock = threading.Lock()
        self._is_streaming = False
        self._closed = threading.Event()
        http.event_hooks = {"request": [_only_known_headers]}
        # The SDK sends the key as a bearer token. Gateways that speak the older form know only x-api-key.
        is_vendor = base_url.host == "anthropic.com" or base_url.host.endswith(".anthropic.com")
        headers = {} if is_vendor or not _KEY.fullmatch(self._key) else {"x-api-key": self._key}
        self._sdk = anthropic.Anthropic(
            api_key=self._key or "none",
            base_url=base_url.url.removesuffix("/v1"),
            max_retries=0,  # The turn retries: it tells the user, and it can be cancelled in between.
            http_client=http,
            timeout=http.timeout,
            default_headers=headers,
            open_telemetry=False,
        )

    def __repr__(self) -> str:
        return f"AnthropicModel({self._sdk.base_url})"

    def stream(self, request: ModelRequest) -> Iterator[ModelEvent]:
        with self._lock:
            if self._closed.is_set():
                raise ModelError("llm_closed", _CLOSED)
            if self._is_streaming:
                raise RuntimeError("one call at a time")
            self._is_streaming = True
        builder = MessageBuilder(request.model)
        try:
            yield from self._events(request, builder)
        except ModelError as error:
            found = ModelError("llm_closed", _CLOSED) if self._http.is_aborted else error
            found.usage = builder.usage if builder.is_started else None
            raise found from None
        except Exception as error:
            # Not chained: texts of the SDK and of h11 quote headers and bodies, which may hold the key.
            raise self._translated(error, builder) from None
        finally:
            with self._lock:
                self._is_streaming = False
                must_close = self._closed.is_set()
            if must_close:
                self._http.close()

    def close(self) -> None:
        with self._lock:
            self._closed.set()
            is_streaming = self._is_streaming
        self._http.abort()
        # Only the reading thread may close a socket: its descriptor could be reused under a TLS read.
        if not is_streaming:
            self._http.close()

    def _events(self, request: ModelRequest, builder: MessageBuilder) -> Iterator[ModelEvent]:
        if not _KEY.fullmatch(self._key):
            raise ModelError("llm_auth", "LLM_API_KEY is empty or holds characters that no key has.")
        answer = self._sdk.messages.create(
            model=request.model,
            max_tokens=request.max_tokens,
            messages=cast(list[MessageParam], _with_cache_mark(request.messages)),
            system=_system(request.system),
            tools=cast("list[ToolUnionParam] | anthropic.Omit", _tools(request)),
            thinking=(
                {"type": "adaptive", "display": "summarized"}
                if request.model in _REPORTS_IN_THOUGHTS
                else anthropic.omit
            ),
            stream=True,
        )
        with answer:
            response = answer.response
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                raise ModelError(
                    "llm_bad_response", "The model's endpoint did not answer with an event stream."
                )
            for event in server_sent_events(response.iter_bytes()):
                data = loads_strictly(event.data)
                if event.event == "error":
                    raise from_error_event(data, mask=self._masked)
                for model_event in builder.feed(data):
                    yield model_event
                    if isinstance(model_event, MessageDone):
                        return
        raise ModelError("llm_unreachable", _BROKE_OFF, retryable=True)

    def _translated(self, error: Exception, builder: MessageBuilder) -> ModelError:
        translated = self._by_kind(error)
        translated.usage = builder.usage if builder.is_started else None
        return translated

    def _by_kind(self, error: Exception) -> ModelError:
        if self._http.is_aborted:
            return ModelError("llm_closed", _CLOSED)
        if isinstance(error, anthropic.APIStatusError):
            return from_status(
                error.status_code, error.api_message, error.response.headers, mask=self._masked
            )
        cause = error.__cause__ if isinstance(error, anthropic.APIConnectionError) else error
        reason = refused_address(error)
        log.warning(
            "model_call_failed",
            host=self._sdk.base_url.host,
            kind=type(cause).__name__,
            refused=reason,
        )
        match cause:
            case httpx2.ConnectError() | httpx2.ConnectTimeout():
                return ModelError("llm_unreachable", _UNREACHABLE, retryable=True)
            case httpx2.TimeoutException():
                return ModelError("llm_timeout", "The model's endpoint fell silent.", retryable=True)
            case httpx2.LocalProtocolError():
                return ModelError("llm_bad_request", "The request could not be written as HTTP.")
            case httpx2.TransportError():
                return ModelError("llm_unreachable", _BROKE_OFF, retryable=True)
            case BadEventStreamError() | BadMessageError() | ValueError():
                return ModelError(
                    "llm_bad_response", "The model's endpoint does not speak Anthropic's protocol."
                )
            case _:
                raise error

    def _masked(self, text: str) -> str:
        return text.replace(self._key, "[redacted:LLM_API_KEY]") if self._key else text


def _system(text: str) -> Any:
    if not text.strip():
        return anthropic.omit
    return [{"type": "text", "text": text, "cache_control": _CACHED}]


def _tools(request: ModelRequest) -> Any:
    if not request.tools:
        return anthropic.omit
    tools = [dict(tool) for tool in request.tools]
    if not request.system.strip():
        tools[-1]["cache_control"] = _CACHED  # The mark on the system prompt covers the tools before it.
    return tools


def _with_cache_mark(messages: Sequence[Message]) -> list[Message]:
    """The messages with a cache mark on the last block that can bear one; what was passed in is not changed.

    The next call then reads all before the mark from the vendor's cache.
    """
    marked = list(messages)
    if not marked:
        return marked
    content = list(marked[-1]["content"])
    for position in reversed(range(len(content))):
        block = content[position]
        if block["type"] in _UNCACHEABLE or (block["type"] == "text" and not block["text"].strip()):
            continue
        content[position] = {**block, "cache_control": _CACHED}
        marked[-1] = {"role": marked[-1]["role"], "content": content}
        break
    return marked

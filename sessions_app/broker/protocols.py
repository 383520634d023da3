"""What the broker knows of each vendor's HTTP: which paths, where the key goes, what an error and a bill look like.

Anthropic Messages: https://platform.claude.com/docs/en/api/messages; OpenAI Chat Completions and Responses:
https://platform.openai.com/docs/api-reference.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sessions_app.llm.base import Usage

Headers = list[tuple[bytes, bytes]]


class Bill:
    """What one call costs, read from the events or the document that pass by. Takes any JSON."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.usage = Usage()
        self.is_known = False
        self.is_final = False
        """The answer says nothing more of its cost."""


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**12 else 0


def _anthropic(bill: Bill, data: Mapping[str, Any]) -> None:
    """An event of a stream, or a whole message. Counts of `message_delta` are totals; absent ones stand."""
    message = data.get("message") if data.get("type") == "message_start" else data
    if not isinstance(message, Mapping):
        return
    if isinstance(message.get("model"), str):
        bill.model = message["model"]
    usage = message.get("usage")
    if isinstance(usage, Mapping):
        before = bill.usage

        def total(name: str, known: int) -> int:
            return _count(usage[name]) if usage.get(name) is not None else known

        bill.usage = Usage(
            total("input_tokens", before.input_tokens),
            total("output_tokens", before.output_tokens),
            total("cache_read_input_tokens", before.cache_read_tokens),
            total("cache_creation_input_tokens", before.cache_write_tokens),
        )
        bill.is_known = True
        delta = data.get("delta")
        is_last = isinstance(delta, Mapping) and delta.get("stop_reason") is not None
        bill.is_final = data.get("type") == "message" or is_last


def _openai(bill: Bill, data: Mapping[str, Any]) -> None:
    """A chunk or a document of Chat Completions; an event or a document of Responses."""
    found = data.get("response") if isinstance(data.get("response"), Mapping) else data
    assert isinstance(found, Mapping), "one of two mappings"
    if isinstance(found.get("model"), str):
        bill.model = found["model"]
    usage = found.get("usage")
    if not isinstance(usage, Mapping):
        return
    is_chat = "prompt_tokens" in usage
    details = usage.get("prompt_tokens_details" if is_chat else "input_tokens_details")
    cached = _count(details.get("cached_tokens")) if isinstance(details, Mapping) else 0
    prompt = _count(usage.get("prompt_tokens" if is_chat else "input_tokens"))
    bill.usage = Usage(
        max(0, prompt - cached),
        _count(usage.get("completion_tokens" if is_chat else "output_tokens")),
        cached,
    )
    bill.is_known = bill.is_final = True


def _anthropic_error(status: int, kind: str, text: str) -> bytes:
    return json.dumps({"type": "error", "error": {"type": kind, "message": text}}).encode()


def _openai_error(status: int, kind: str, text: str) -> bytes:
    return json.dumps({"error": {"message": text, "type": kind, "param": None, "code": kind}}).encode()


def _anthropic_key(key: str, is_vendors_own: bool) -> Headers:
    headers: Headers = [(b"x-api-key", key.encode())]
    if not is_vendors_own:  # Gateways that speak the newer form know only the bearer token.
        headers.append((b"authorization", b"Bearer " + key.encode()))
    return headers


def _openai_key(key: str, is_vendors_own: bool) -> Headers:
    return [(b"authorization", b"Bearer " + key.encode())]


@dataclass(frozen=True, slots=True)
class Protocol:
    """One vendor's."""

    vendor: str
    paths: frozenset[str]
    """Below the base URL; only these."""
    unbilled: frozenset[str]
    domain: str
    """Of the vendor's own hosts."""
    read: Callable[[Bill, Mapping[str, Any]], None]
    error: Callable[[int, str, str], bytes]
    key: Callable[[str, bool], Headers]

    def is_own(self, host: str) -> bool:
        """Whether a host is the vendor's."""
        return host == self.domain or host.endswith(f".{self.domain}")


PROTOCOLS: Final[Mapping[str, Protocol]] = {
    one.vendor: one
    for one in (
        Protocol(
            "anthropic",
            frozenset({"/v1/messages", "/v1/messages/count_tokens"}),
            frozenset({"/v1/messages/count_tokens"}),
            "anthropic.com",
            _anthropic,
            _anthropic_error,
            _anthropic_key,
        ),
        Protocol(
            "openai",
            frozenset({"/v1/chat/completions", "/v1/responses"}),
            frozenset(),
            "openai.com",
            _openai,
            _openai_error,
            _openai_key,
        ),
    )
}

_REQUEST: Final = frozenset(b"accept content-type user-agent idempotency-key".split())
_REQUEST_PREFIXES: Final = (b"anthropic-", b"x-stainless-", b"openai-")
_ANSWER: Final = frozenset(
    b"content-type retry-after retry-after-ms x-should-retry request-id x-request-id".split()
)
_ANSWER_PREFIXES: Final = (b"anthropic-", b"openai-", b"x-ratelimit-")


def request_headers(headers: Headers) -> Headers:
    """What of a program's request goes to the vendor: no credential, no cookie, nothing between neighbours."""
    return [
        (name, value) for name, value in headers if name in _REQUEST or name.startswith(_REQUEST_PREFIXES)
    ]


def answer_headers(headers: Headers, *, key: bytes) -> Headers:
    """What of the vendor's answer goes to the program: nothing that names the key."""
    return [
        (name, value)
        for name, value in headers
        if (name in _ANSWER or name.startswith(_ANSWER_PREFIXES)) and key not in value and key not in name
    ]


def request_read(protocol: Protocol, path: str, body: bytes) -> tuple[str, bytes]:
    """The model that is asked for, and the body to send.

    A stream of Chat Completions says what it cost only when it is asked to, so it is asked. Raises ValueError with a
    sentence for whoever wrote the program.
    """
    try:
        document = json.loads(body, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The body is not a JSON object with each name once: {error}") from None
    if not isinstance(document, dict) or not isinstance(document.get("model"), str):
        raise ValueError("The body is not a JSON object with a model.")
    if document.get("stream") is True and path == "/v1/chat/completions":
        options = document.get("stream_options")
        options = options if isinstance(options, dict) else {}
        if options.get("include_usage") is not True:
            document["stream_options"] = {**options, "include_usage": True}
            body = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    return document["model"], body


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Which of two values of one name the vendor would take is not known, so there may be one only."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found

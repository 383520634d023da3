"""A model call: the key is added, the answer streams without it, and ends when its cost is stored."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator
from typing import Any, Final

from django.db import DatabaseError

from e2a.core.outbound_async import StreamedAnswer
from e2a.core.outbound_wire import BadAnswer
from sandboxes.guest.redaction import Redactor
from sessions_app.broker.admission import Admission, admit, model_admit
from sessions_app.broker.exchange import Denied, Exchange, Gone, log
from sessions_app.broker.ledger import call_record
from sessions_app.broker.protocols import (
    PROTOCOLS,
    Bill,
    Protocol,
    answer_headers,
    request_headers,
    request_read,
)
from sessions_app.llm.sse import EventDecoder
from sessions_app.spending import Spent

LARGEST_BODY: Final = 32 * 1024 * 1024
"""Anthropic's own limit of a request: https://platform.claude.com/docs/en/api/errors."""
LARGEST_BODIES: Final = 512 * 1024 * 1024
"""Of all requests that are being read or sent."""
LARGEST_DOCUMENT: Final = 32 * 1024 * 1024
"""Of an answer that is no stream."""
BODY_SECONDS: Final = 60.0
READMIT_SECONDS: Final = 1.0
"""A request that took longer to come is admitted anew: its key or budget may have changed."""
_SMALL: Final = 256 * 1024
"""Bytes of JSON that are read on the event loop: about a millisecond."""
_PATH = re.compile(r"([a-z]+)(/[a-z0-9/_]{1,64})", re.ASCII)
_QUERY = re.compile(rb"[A-Za-z0-9_=&.-]{0,256}")


class ModelCall(Exchange):
    """`POST /<sandbox>/llm/<vendor>/<path>`; `rest` is `<vendor>/<path>`."""

    def __init__(self, *args: Any, rest: str) -> None:
        super().__init__(*args)
        self._match = _PATH.fullmatch(rest)
        self._protocol: Protocol | None = PROTOCOLS.get(self._match[1]) if self._match else None
        self._began_at = time.monotonic()

    def refusal(self, denied: Denied) -> bytes:
        return (self._protocol or PROTOCOLS["anthropic"]).error(denied.status, denied.kind, denied.text)

    async def serve(self) -> None:
        protocol, path = self._addressed()
        broker = self.broker
        try:
            admission = await broker.in_database(lambda: admit(self.sandbox_id, protocol, broker.keys))
            body = await self._body()
            try:
                held = len(body)
                model, body = await self._read(protocol, path, body)
                model_admit(admission, model)
                if time.monotonic() - self._began_at > READMIT_SECONDS:
                    admission = await broker.in_database(
                        lambda: admit(self.sandbox_id, protocol, broker.keys)
                    )
                await self.until_left(self._call(admission, protocol, path, model, body))
            finally:
                broker.body_bytes -= held
        except DatabaseError as error:
            log.error("broker.database", error=str(error)[:200])
            raise Denied(503, "overloaded_error", "The database does not answer.") from None

    def _addressed(self) -> tuple[Protocol, str]:
        """Vendor, and the path below its base URL. Raises Denied."""
        protocol = self._protocol
        if self._match is None or protocol is None:
            raise Denied(404, "not_found_error", f"There are models of {', '.join(sorted(PROTOCOLS))} here.")
        if self._match[2] not in protocol.paths or self.scope["method"] != "POST":
            raise Denied(
                404, "not_found_error", f"Only POST {', '.join(sorted(protocol.paths))} is passed on."
            )
        if not _QUERY.fullmatch(self.scope["query_string"]):
            raise Denied(400, "invalid_request_error", "This query is not passed on.")
        return protocol, self._match[2]

    async def _body(self) -> bytes:
        """The whole request. What it holds of `LARGEST_BODIES` is the caller's to give back. Raises Denied, Gone."""
        pieces: list[bytes] = []
        size = 0
        broker = self.broker
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await self.hear()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    piece = message.get("body", b"")
                    size += len(piece)
                    broker.body_bytes += len(piece)
                    pieces.append(piece)
                    if size > LARGEST_BODY:
                        raise Denied(413, "request_too_large", f"The request is over {LARGEST_BODY} bytes.")
                    if broker.body_bytes > LARGEST_BODIES:
                        raise Denied(503, "overloaded_error", "Too many large model calls at once.")
                    if not message.get("more_body"):
                        return b"".join(pieces)
        except BaseException as error:
            broker.body_bytes -= size
            if isinstance(error, TimeoutError):
                raise Denied(408, "timeout_error", f"The request took over {BODY_SECONDS:g} s.") from None
            raise

    @staticmethod
    async def _read(protocol: Protocol, path: str, body: bytes) -> tuple[str, bytes]:
        try:
            if len(body) <= _SMALL:
                return request_read(protocol, path, body)
            return await asyncio.to_thread(request_read, protocol, path, body)
        except ValueError as error:
            raise Denied(400, "invalid_request_error", str(error)) from None

    async def _call(
        self, admission: Admission, protocol: Protocol, path: str, model: str, body: bytes
    ) -> None:
        url = admission.url
        base = url.path.removesuffix("/v1")
        query = self.scope["query_string"].decode("ascii")
        key_headers = protocol.key(admission.key, protocol.is_own(url.host))
        with self.failures(url.host, what="The model's endpoint"):
            async with self.broker.pool_for(admission.allow_private).stream(
                "POST",
                scheme=url.scheme,
                host=url.host,
                port=url.port,
                target=f"{base}{path}?{query}" if query else f"{base}{path}",
                headers=[*request_headers(self.scope["headers"]), *key_headers],
                body=body,
            ) as answer:
                if 300 <= answer.status < 400:
                    raise Denied(502, "api_error", "The model's endpoint answered with a redirect.")
                is_billed = answer.status == 200 and path not in protocol.unbilled
                await self._pass_on(admission, protocol, answer, model, is_billed=is_billed)

    async def _pass_on(
        self,
        admission: Admission,
        protocol: Protocol,
        answer: StreamedAnswer,
        model: str,
        *,
        is_billed: bool,
    ) -> None:
        """The answer's head and body, redacted; its cost is entered before its last part is sent."""
        bill = Bill(model)
        redactor = Redactor(admission.patterns)
        is_stream = answer.header(b"content-type").startswith(b"text/event-stream")
        await self.begin(answer.status, answer_headers(list(answer.headers), key=admission.key.encode()))
        pieces = _streamed(protocol, answer, bill) if is_stream else _whole(protocol, answer, bill)
        is_entered = not is_billed
        is_whole = False

        async def enter() -> None:
            nonlocal is_entered
            is_entered = True
            spent = Spent.of(bill.model, bill.usage)
            took = round(1000 * (time.monotonic() - self._began_at))
            await self.broker.in_database(
                lambda: call_record(
                    admission,
                    vendor=protocol.vendor,
                    spent=spent,
                    status=answer.status,
                    is_whole=is_whole or bill.is_final,
                    duration_ms=took,
                )
            )

        try:
            async for piece in pieces:
                if bill.is_final and not is_entered:
                    await enter()
                await self.more(redactor.feed(piece))
            is_whole = True
            if not is_entered:
                await enter()
            await self.end(redactor.end())
        finally:
            if not is_entered and bill.is_known:
                await enter()


async def _streamed(protocol: Protocol, answer: StreamedAnswer, bill: Bill) -> AsyncIterator[bytes]:
    """The pieces of an event stream, after the bill has seen them."""
    decoder = EventDecoder()
    async for chunk in answer.chunks:
        for event in decoder.feed(chunk):
            if '"usage"' in event.data:
                _look(protocol, bill, event.data)
        yield chunk


async def _whole(protocol: Protocol, answer: StreamedAnswer, bill: Bill) -> AsyncIterator[bytes]:
    """A document, in one piece."""
    pieces: list[bytes] = []
    size = 0
    async for chunk in answer.chunks:
        size += len(chunk)
        if size > LARGEST_DOCUMENT:
            raise BadAnswer(f"the answer is over {LARGEST_DOCUMENT} bytes")
        pieces.append(chunk)
    document = b"".join(pieces)
    _look(protocol, bill, document)
    yield document


def _look(protocol: Protocol, bill: Bill, document: str | bytes) -> None:
    with contextlib.suppress(ValueError, RecursionError):
        data = json.loads(document)
        if isinstance(data, dict):
            protocol.read(bill, data)

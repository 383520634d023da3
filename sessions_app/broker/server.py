"""The broker's HTTP: one ASGI application under uvicorn, whose clients are gateways.

`POST /<sandbox>/llm/<vendor>/<path>`, signed with the node key. The request is read whole (its model must be known
before anything is sent), the answer streams. What the model sends passes a redactor of the key; the piece that tells
the last of the cost waits until the ledger has it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import httpcore2
import structlog
import uvicorn
from django.db import DatabaseError, close_old_connections

from e2a.core.addresses import Resolver, system_resolver
from e2a.core.outbound import refused_address
from e2a.core.outbound_async import AsyncDial, BadAnswer, OutboundPool, StreamedAnswer, async_dial_tcp
from e2a.core.outbound_transport import Timeouts
from sandboxes.gateway.guest_socket import SANDBOX_ID
from sandboxes.gateway.signing import NonceCacheFull, SignatureCheck, SignatureRefused
from sandboxes.guest.redaction import Redactor
from sessions_app.broker.admission import Admission, Denied, Keys, admit, model_admit
from sessions_app.broker.ledger import call_record
from sessions_app.broker.protocols import (
    PROTOCOLS,
    Bill,
    Headers,
    Protocol,
    answer_headers,
    request_headers,
    request_read,
)
from sessions_app.llm.sse import BadEventStreamError, EventDecoder
from sessions_app.spending import Spent

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Found = TypeVar("Found")

log = structlog.get_logger("e2a.broker")

LARGEST_BODY: Final = 32 * 1024 * 1024
"""Anthropic's own limit of a request: https://platform.claude.com/docs/en/api/errors."""
LARGEST_BODIES: Final = 512 * 1024 * 1024
"""Of all requests that are being read or sent."""
LARGEST_DOCUMENT: Final = 32 * 1024 * 1024
"""Of an answer that is no stream."""
CALLS_A_SANDBOX: Final = 32
BODY_SECONDS: Final = 60.0
STOP_SECONDS: Final = 5
STORE_SECONDS: Final = 20.0
"""For the bills of calls that were cut at the end."""
SWEEP_SECONDS: Final = 5.0
_SMALL: Final = 256 * 1024
"""Bytes of JSON that are read on the event loop: about a millisecond."""
_DATABASE_THREADS: Final = 8
_TARGET = re.compile(r"/(sbx_[a-z2-7]+)/llm/([a-z]+)(/[a-z0-9/_]{1,64})", re.ASCII)
_QUERY = re.compile(rb"[A-Za-z0-9_=&.-]{0,256}")


class Broker:
    """The application. `resolver`, `dial` and `timeouts` are for tests."""

    def __init__(
        self,
        *,
        node_key: bytes,
        resolver: Resolver = system_resolver,
        dial: AsyncDial = async_dial_tcp,
        timeouts: Timeouts | None = None,
    ) -> None:
        self._signatures = SignatureCheck(node_key)
        self._keys = Keys()
        self._resolver, self._dial, self._timeouts = resolver, dial, timeouts
        self._database = ThreadPoolExecutor(_DATABASE_THREADS, thread_name_prefix="broker database")
        self._lookups = ThreadPoolExecutor(32, thread_name_prefix="broker lookup")
        self._pools: dict[frozenset[str], OutboundPool] = {}
        self._calls: Counter[str] = Counter()
        self._open: set[asyncio.Task[Any]] = set()
        self._body_bytes = 0

    # -- its life

    async def run(
        self,
        listener: socket.socket,
        *,
        on_ready: Callable[[], None] = lambda: None,
        stop: asyncio.Event | None = None,
    ) -> None:
        """Serve on a listening socket until SIGTERM or SIGINT, or until `stop` is set.

        Calls under way may end within 5 s; then they are cut, and what they had cost is entered.
        """
        config = uvicorn.Config(
            self,
            loop="asyncio",
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            timeout_keep_alive=120,
            timeout_graceful_shutdown=STOP_SECONDS,
        )
        server = _Server(config)
        if stop is None:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, server.leave)
        else:
            stopping = asyncio.create_task(stop.wait())
            stopping.add_done_callback(lambda task: server.leave())
        sweeping = asyncio.create_task(self._sweep())
        on_ready()
        try:
            await server.serve(sockets=[listener])
        finally:
            sweeping.cancel()
            await self.close()

    async def close(self) -> None:
        """End, on the loop that served. Calls that were cut enter what they had cost first."""
        if self._open:
            await asyncio.wait(self._open, timeout=STORE_SECONDS)
        for pool in self._pools.values():
            await pool.aclose()
        self._lookups.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._database.shutdown)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self._keys.forget_old()

    async def _in_database(self, work: Callable[[], Found]) -> Found:
        """Run a piece of database work in a thread. Also when the caller is cancelled it goes on to its end."""
        return await asyncio.shield(
            asyncio.get_running_loop().run_in_executor(self._database, _released, work)
        )

    # -- one request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        task = asyncio.current_task()
        assert task is not None, "a server runs its application in tasks"
        self._open.add(task)
        try:
            with contextlib.suppress(_Gone):
                await _Call(self, scope, receive, send).serve()
        finally:
            self._open.discard(task)

    def pool_for(self, allow_private: frozenset[str]) -> OutboundPool:
        """Connections under one set of exceptions; there are two or three sets."""
        pool = self._pools.get(allow_private)
        if pool is None:
            pool = self._pools[allow_private] = OutboundPool(
                allow_private=allow_private,
                timeouts=self._timeouts,
                resolver=self._resolver,
                dial=self._dial,
                lookups=self._lookups,
            )
        return pool


class _Server(uvicorn.Server):
    """With our own signal handlers: uvicorn's raise the signal once more when it is done, before costs are stored."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield

    def leave(self) -> None:
        self.should_exit = True


def _released(work: Callable[[], Found]) -> Found:
    close_old_connections()
    try:
        return work()
    finally:
        close_old_connections()


class _Gone(Exception):
    """The client went away."""


class _Call:
    """One request of one sandbox."""

    def __init__(self, broker: Broker, scope: Scope, receive: Receive, send: Send) -> None:
        self._broker = broker
        self._scope = scope
        self._receive = receive
        self._send = send
        self._protocol: Protocol = PROTOCOLS["anthropic"]
        self._has_begun = False
        self._began_at = time.monotonic()

    async def serve(self) -> None:
        """Answer. Raises _Gone, and CancelledError."""
        headers = self._scope["headers"]
        raw_path = self._scope["raw_path"].decode("latin-1")
        if raw_path == "/" and self._scope["method"] == "GET":
            await self._answer(200, b'{"broker": "1"}')
            return
        try:
            sandbox_id, protocol, path = self._addressed(raw_path, headers)
        except Denied as denied:
            await self._deny(denied)
            return
        self._protocol = protocol
        broker = self._broker
        if broker._calls[sandbox_id] >= CALLS_A_SANDBOX:
            await self._deny(Denied(429, "rate_limit_error", f"{CALLS_A_SANDBOX} model calls are under way."))
            return
        broker._calls[sandbox_id] += 1
        try:
            await self._call(sandbox_id, path, headers)
        except Denied as denied:
            log.info("model_call.denied", sandbox=sandbox_id, status=denied.status, why=denied.text[:200])
            await self._deny(denied)
        finally:
            broker._calls[sandbox_id] -= 1
            if not broker._calls[sandbox_id]:
                del broker._calls[sandbox_id]

    def _addressed(self, raw_path: str, headers: Headers) -> tuple[str, Protocol, str]:
        """Sandbox, vendor and path below the vendor's base URL. Raises Denied."""
        given = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        query = self._scope["query_string"]
        target = f"{raw_path}?{query.decode('latin-1')}" if query else raw_path
        length = given.get("content-length", "chunked" if "transfer-encoding" in given else "0")
        try:
            self._broker._signatures.verify(
                method=self._scope["method"], target=target, length=length, headers=given
            )
        except NonceCacheFull:
            raise Denied(503, "overloaded_error", "Too many model calls at once.") from None
        except SignatureRefused as error:
            log.warning("model_call.unsigned", why=str(error))
            raise Denied(401, "authentication_error", "This is for gateways.") from None
        match = _TARGET.fullmatch(raw_path)
        protocol = PROTOCOLS.get(match[2]) if match else None
        if match is None or protocol is None or not SANDBOX_ID.fullmatch(match[1]):
            raise Denied(404, "not_found_error", f"There are models of {', '.join(sorted(PROTOCOLS))} here.")
        if match[3] not in protocol.paths or self._scope["method"] != "POST":
            self._protocol = protocol
            raise Denied(
                404, "not_found_error", f"Only POST {', '.join(sorted(protocol.paths))} is passed on."
            )
        if not _QUERY.fullmatch(query):
            raise Denied(400, "invalid_request_error", "This query is not passed on.")
        return match[1], protocol, match[3]

    async def _call(self, sandbox_id: str, path: str, headers: Headers) -> None:
        broker, protocol = self._broker, self._protocol
        try:
            admission = await broker._in_database(lambda: admit(sandbox_id, protocol, broker._keys))
            body = await self._body()
            try:
                held = len(body)
                model, body = await self._read(path, body)
                model_admit(admission, model)
                if time.monotonic() - self._began_at > 1.0:  # Its key or budget may have changed since.
                    admission = await broker._in_database(lambda: admit(sandbox_id, protocol, broker._keys))
                await self._exchange(admission, path, model, request_headers(headers), body)
            finally:
                broker._body_bytes -= held
        except DatabaseError as error:
            log.error("model_call.database", error=str(error)[:200])
            raise Denied(503, "overloaded_error", "The database does not answer.") from None

    async def _body(self) -> bytes:
        """The whole request. What it holds of `LARGEST_BODIES` is the caller's to give back. Raises Denied, _Gone."""
        pieces: list[bytes] = []
        size = 0
        broker = self._broker
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    piece = message.get("body", b"")
                    size += len(piece)
                    broker._body_bytes += len(piece)
                    pieces.append(piece)
                    if size > LARGEST_BODY:
                        raise Denied(413, "request_too_large", f"The request is over {LARGEST_BODY} bytes.")
                    if broker._body_bytes > LARGEST_BODIES:
                        raise Denied(503, "overloaded_error", "Too many large model calls at once.")
                    if not message.get("more_body"):
                        return b"".join(pieces)
        except BaseException as error:
            broker._body_bytes -= size
            if isinstance(error, TimeoutError):
                raise Denied(408, "timeout_error", f"The request took over {BODY_SECONDS:g} s.") from None
            raise

    async def _read(self, path: str, body: bytes) -> tuple[str, bytes]:
        try:
            if len(body) <= _SMALL:
                return request_read(self._protocol, path, body)
            return await asyncio.to_thread(request_read, self._protocol, path, body)
        except ValueError as error:
            raise Denied(400, "invalid_request_error", str(error)) from None

    async def _exchange(
        self, admission: Admission, path: str, model: str, headers: Headers, body: bytes
    ) -> None:
        """Call the vendor and stream its answer, until either side is gone. Raises Denied before the first byte."""
        url = admission.url
        query = self._scope["query_string"].decode("ascii")
        base = url.path.removesuffix("/v1")
        key_headers = self._protocol.key(admission.key, self._protocol.is_own(url.host))
        leaving = asyncio.create_task(self._left())
        streaming = asyncio.create_task(
            self._stream(
                admission,
                self._broker.pool_for(admission.allow_private).stream(
                    "POST",
                    scheme=url.scheme,
                    host=url.host,
                    port=url.port,
                    target=f"{base}{path}?{query}" if query else f"{base}{path}",
                    headers=[*headers, *key_headers],
                    body=body,
                ),
                model,
                is_billed=path not in self._protocol.unbilled,
            )
        )
        try:
            await asyncio.wait((leaving, streaming), return_when=asyncio.FIRST_COMPLETED)
            if not streaming.done():
                raise _Gone
            streaming.result()
        finally:
            leaving.cancel()
            streaming.cancel()
            await asyncio.gather(leaving, streaming, return_exceptions=True)

    async def _left(self) -> None:
        """Returns when the client is gone."""
        while (await self._receive())["type"] != "http.disconnect":
            pass  # It has nothing more to say.

    async def _stream(
        self,
        admission: Admission,
        exchange: contextlib.AbstractAsyncContextManager[StreamedAnswer],
        model: str,
        *,
        is_billed: bool,
    ) -> None:
        try:
            async with exchange as answer:
                if 300 <= answer.status < 400:
                    raise Denied(502, "api_error", "The model's endpoint answered with a redirect.")
                await self._pass_on(admission, answer, model, is_billed=is_billed and answer.status == 200)
        except (httpcore2.ConnectError, httpcore2.ConnectTimeout, httpcore2.PoolTimeout) as error:
            self._log_failure(admission, error)
            raise Denied(502, "api_error", "The model's endpoint could not be reached.") from None
        except httpcore2.TimeoutException as error:
            self._failed(admission, error, Denied(504, "timeout_error", "The model's endpoint fell silent."))
        except (httpcore2.NetworkError, httpcore2.ProtocolError, BadAnswer, BadEventStreamError) as error:
            self._failed(
                admission, error, Denied(502, "api_error", "The model's endpoint broke off its answer.")
            )

    def _failed(self, admission: Admission, error: Exception, denied: Denied) -> None:
        """Say so where that can still be done; cut an answer that has begun, so that it is not taken for whole."""
        self._log_failure(admission, error)
        if self._has_begun:
            raise _Gone from None
        raise denied from None

    def _log_failure(self, admission: Admission, error: Exception) -> None:
        # Not the error's text: libraries quote headers, which hold the key.
        log.warning(
            "model_call.failed",
            sandbox=admission.sandbox_id,
            host=admission.url.host,
            kind=type(error).__name__,
            refused=refused_address(error),
        )

    async def _pass_on(
        self, admission: Admission, answer: StreamedAnswer, model: str, *, is_billed: bool
    ) -> None:
        """The answer's head and body, redacted; its cost is entered before its last part is sent."""
        bill = Bill(model)
        redactor = Redactor(admission.patterns)
        is_stream = answer.header(b"content-type").startswith(b"text/event-stream")
        await self._begin(answer.status, answer_headers(list(answer.headers), key=admission.key.encode()))
        pieces = self._streamed(answer, bill) if is_stream else self._whole(answer, bill)
        is_entered = not is_billed
        is_whole = False

        async def enter() -> None:
            nonlocal is_entered
            is_entered = True
            spent = Spent.of(bill.model, bill.usage)
            took = round(1000 * (time.monotonic() - self._began_at))
            await self._broker._in_database(
                lambda: call_record(
                    admission,
                    vendor=self._protocol.vendor,
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
                if shown := redactor.feed(piece):
                    await self._send({"type": "http.response.body", "body": shown, "more_body": True})
            is_whole = True
            if not is_entered:
                await enter()
            await self._send({"type": "http.response.body", "body": redactor.end(), "more_body": False})
        finally:
            if not is_entered and bill.is_known:
                await enter()

    async def _streamed(self, answer: StreamedAnswer, bill: Bill) -> AsyncIterator[bytes]:
        """The pieces of an event stream, after the bill has seen them."""
        decoder = EventDecoder()
        async for chunk in answer.chunks:
            for event in decoder.feed(chunk):
                if '"usage"' in event.data:
                    with contextlib.suppress(ValueError, RecursionError):
                        data = json.loads(event.data)
                        if isinstance(data, dict):
                            self._protocol.read(bill, data)
            yield chunk

    async def _whole(self, answer: StreamedAnswer, bill: Bill) -> AsyncIterator[bytes]:
        """A document, in one piece."""
        pieces: list[bytes] = []
        size = 0
        async for chunk in answer.chunks:
            size += len(chunk)
            if size > LARGEST_DOCUMENT:
                raise BadAnswer(f"the answer is over {LARGEST_DOCUMENT} bytes")
            pieces.append(chunk)
        document = b"".join(pieces)
        with contextlib.suppress(ValueError, RecursionError):
            data = json.loads(document)
            if isinstance(data, dict):
                self._protocol.read(bill, data)
        yield document

    # -- answers

    async def _begin(self, status: int, headers: Headers) -> None:
        self._has_begun = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _answer(self, status: int, body: bytes, more: Headers | None = None) -> None:
        headers = [
            (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *(more or ()),
        ]  # fmt: skip
        await self._begin(status, headers)
        await self._send({"type": "http.response.body", "body": body})

    async def _deny(self, denied: Denied) -> None:
        if self._has_begun:
            raise _Gone
        body = self._protocol.error(denied.status, denied.kind, denied.text)
        await self._answer(denied.status, body, [(b"x-e2a-answered-by", b"broker")])

"""The broker's process: one ASGI application under uvicorn, whose clients are gateways.

`/<sandbox>/llm/<vendor>/<path>` is a model call, `/<sandbox>/to/<host>:<port>/<path>` a call with an injected secret;
both are signed with the node key by the gateway, which knows by the socket who asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import uvicorn
from django.db import close_old_connections

from e2a.core.addresses import Resolver, system_resolver
from e2a.core.descriptors import descriptors_raise
from e2a.core.outbound_async import AsyncDial, OutboundPool, async_dial_tcp
from e2a.core.outbound_transport import Timeouts
from sandboxes.gateway.guest_socket import SANDBOX_ID
from sandboxes.gateway.signing import CHUNKED, NonceCacheFull, SignatureCheck, SignatureRefused
from sessions_app.broker.admission import Opened, injections_read, model_key_read
from sessions_app.broker.exchange import Denied, Gone, Receive, Scope, Send, answer_head, log
from sessions_app.broker.injected_call import InjectedCall
from sessions_app.broker.model_call import ModelCall

Found = TypeVar("Found")

CALLS_A_SANDBOX: Final = 32
DESCRIPTORS: Final = 8192
"""A call has two; most systems give a process 1024."""
STOP_SECONDS: Final = 5
STORE_SECONDS: Final = 20.0
"""For the bills of calls that were cut at the end."""
SWEEP_SECONDS: Final = 5.0
_DATABASE_THREADS: Final = 8
_TARGET = re.compile(r"/(sbx_[a-z2-7]+)/(llm|to)/(.*)", re.ASCII | re.DOTALL)


class Broker:
    """The application. `resolver`, `dial`, `timeouts` and `ssl_context` are for tests."""

    def __init__(
        self,
        *,
        node_key: bytes,
        resolver: Resolver = system_resolver,
        dial: AsyncDial = async_dial_tcp,
        timeouts: Timeouts | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._signatures = SignatureCheck(node_key)
        self.keys = Opened(model_key_read)
        self.injections = Opened(injections_read)
        self._resolver, self._dial, self._timeouts = resolver, dial, timeouts
        self._ssl_context = ssl_context
        self._database = ThreadPoolExecutor(_DATABASE_THREADS, thread_name_prefix="broker database")
        self._lookups = ThreadPoolExecutor(32, thread_name_prefix="broker lookup")
        self._pools: dict[tuple[frozenset[str], bool], OutboundPool] = {}
        self._calls: Counter[str] = Counter()
        self._open: set[asyncio.Task[Any]] = set()
        self.body_bytes = 0

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
        descriptors_raise(DESCRIPTORS)
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
            pool.close()
        self._lookups.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._database.shutdown)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self.keys.forget_old()
            self.injections.forget_old()
            for pool in self._pools.values():
                pool.sweep()

    async def in_database(self, work: Callable[[], Found]) -> Found:
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
            with contextlib.suppress(Gone):
                await self._serve(scope, receive, send)
        finally:
            self._open.discard(task)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw_path = scope["raw_path"].decode("latin-1")
        if raw_path == "/healthz":
            body = b'{"broker": "1"}'
            await send({"type": "http.response.start", "status": 200, "headers": answer_head(body)})
            await send({"type": "http.response.body", "body": body})
            return
        match = _TARGET.fullmatch(raw_path)
        is_ours = match is not None and SANDBOX_ID.fullmatch(match[1]) is not None
        kind = InjectedCall if match is not None and match[2] == "to" else ModelCall
        call = kind(
            self, scope, receive, send, match[1] if match and is_ours else "", rest=match[3] if match else ""
        )
        try:
            self._verify(scope, raw_path)
            if not is_ours:
                raise Denied(404, "not_found_error", "There is nothing at this path.")
            with self._counted(call.sandbox_id):
                await call.serve()
        except Denied as denied:
            await call.deny(denied)

    def _verify(self, scope: Scope, raw_path: str) -> None:
        """Only gateways are served. Raises Denied."""
        given = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        query = scope["query_string"]
        target = f"{raw_path}?{query.decode('latin-1')}" if query else raw_path
        length = given.get("content-length", CHUNKED if "transfer-encoding" in given else "0")
        try:
            self._signatures.verify(method=scope["method"], target=target, length=length, headers=given)
        except NonceCacheFull:
            raise Denied(503, "overloaded_error", "Too many calls at once.") from None
        except SignatureRefused as error:
            log.warning("broker.unsigned", why=str(error))
            raise Denied(401, "authentication_error", "This is for gateways.") from None

    @contextlib.contextmanager
    def _counted(self, sandbox_id: str) -> Iterator[None]:
        """One of the calls that a sandbox may make at once. Raises Denied."""
        if self._calls[sandbox_id] >= CALLS_A_SANDBOX:
            raise Denied(429, "rate_limit_error", f"{CALLS_A_SANDBOX} calls of this sandbox are under way.")
        self._calls[sandbox_id] += 1
        try:
            yield
        finally:
            self._calls[sandbox_id] -= 1
            if not self._calls[sandbox_id]:
                del self._calls[sandbox_id]

    def pool_for(self, allow_private: frozenset[str], *, any_port: bool = False) -> OutboundPool:
        """Connections under one set of exceptions; there are three or four sets."""
        pool = self._pools.get((allow_private, any_port))
        if pool is None:
            pool = self._pools[allow_private, any_port] = OutboundPool(
                allow_private=allow_private,
                any_port=any_port,
                ssl_context=self._ssl_context,
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

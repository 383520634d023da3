"""The way out for addresses that a tenant chose, on an event loop: the rules of `outbound`, for calls that stream.

`OutboundPool` keeps connections between calls. Every request's target is checked by its form, every connection is made
by `dial` to an address that was resolved here and found to be public (or allowed), TLS checks the name, no redirect is
followed, nothing of the environment is used. SECURITY.md 6.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from concurrent.futures import Executor
from dataclasses import dataclass

import httpcore2

from e2a.core.addresses import (
    IPAddress,
    NameLookupError,
    NotPublicError,
    Resolver,
    is_allowed_private,
    resolve_public,
    system_resolver,
    target_refusal,
)
from e2a.core.outbound_transport import (
    MAX_HEADER_BYTES,
    UNREACHABLE,
    AddressRefused,
    Timeouts,
    client_ssl_context,
)
from e2a.core.outbound_wire import PIECE, BadAnswer, Headers, Wire

AsyncDial = Callable[[IPAddress, int], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
"""A connection to exactly this address. Raises OSError."""

PLACE_SECONDS = 10.0
"""How long a call waits for a place among all connections."""
IDLE_CONNECTION_SECONDS = 30.0
MOST_CONNECTIONS = 1000
"""In use."""
MOST_IDLE = 200
"""Of all hosts: each is a descriptor, and hosts are the tenants' to name."""


async def async_dial_tcp(address: IPAddress, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """As it says."""
    return await asyncio.open_connection(str(address), port, limit=PIECE)


class _Dialler:
    """Turns the name in a request into a connection to a checked address."""

    def __init__(
        self,
        *,
        allow_private: Collection[str],
        timeouts: Timeouts,
        resolver: Resolver,
        dial: AsyncDial,
        lookups: Executor | None,
    ) -> None:
        self._allow_private = allow_private
        self._timeouts = timeouts
        self._resolver = resolver
        self._dial = dial
        self._lookups = lookups

    async def connected(self, host: str, port: int) -> Wire:
        """Raises ConnectError, ConnectTimeout; AddressRefused is one."""
        try:
            addresses = await asyncio.get_running_loop().run_in_executor(
                self._lookups, self._resolve, host, port
            )
        except NotPublicError as error:
            raise AddressRefused(error.reason) from error
        except NameLookupError as error:
            raise httpcore2.ConnectError(UNREACHABLE) from error
        deadline = time.monotonic() + self._timeouts.connect
        failure: OSError | None = None
        for index, address in enumerate(addresses):
            share = (deadline - time.monotonic()) / (len(addresses) - index)
            if share <= 0:
                break
            try:
                async with asyncio.timeout(share):
                    reader, writer = await self._dial(address, port)
                return Wire(reader, writer, self._timeouts)
            except OSError as error:  # TimeoutError is one.
                failure = error
        if failure is None or isinstance(failure, TimeoutError):
            raise httpcore2.ConnectTimeout(UNREACHABLE) from failure
        raise httpcore2.ConnectError(UNREACHABLE) from failure

    def _resolve(self, host: str, port: int) -> list[IPAddress]:
        return resolve_public(
            host,
            port,
            allow_private=self._allow_private,
            resolver=self._resolver,
            seconds=self._timeouts.dns,
        )


@dataclass(frozen=True, slots=True)
class StreamedAnswer:
    """An answer whose body is read as it comes. Header names are in lower case."""

    status: int
    headers: Headers
    chunks: AsyncIterator[bytes]

    def header(self, name: bytes) -> bytes:
        """The first one of that lower-case name; empty for none."""
        return next((value for key, value in self.headers if key == name), b"")


class OutboundPool:
    """Connections to hosts that are public, or that `allow_private` lists. For one event loop; `close` on it.

    `any_port`: whoever calls has decided on the port.

    Raises in `stream`, and while its chunks are read, what httpcore raises (`ConnectError` for refused and
    unreachable alike; `outbound.refused_address` tells the log the difference) and `BadAnswer`.
    """

    def __init__(
        self,
        *,
        allow_private: Collection[str] = (),
        any_port: bool = False,
        timeouts: Timeouts | None = None,
        resolver: Resolver = system_resolver,
        dial: AsyncDial = async_dial_tcp,
        lookups: Executor | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._allow_private = frozenset(allow_private)
        self._any_port = any_port
        self._ssl_context = ssl_context or client_ssl_context()
        self._ssl_context.set_alpn_protocols(["http/1.1"])
        self._dialler = _Dialler(
            allow_private=self._allow_private,
            timeouts=timeouts or Timeouts(),
            resolver=resolver,
            dial=dial,
            lookups=lookups,
        )
        self._room = asyncio.Semaphore(MOST_CONNECTIONS)
        self._idle: dict[tuple[str, str, int], list[Wire]] = {}
        self._used: set[Wire] = set()

    @contextlib.asynccontextmanager
    async def stream(
        self,
        method: str,
        *,
        scheme: str,
        host: str,
        port: int,
        target: str,
        headers: Headers,
        body: bytes | AsyncIterator[bytes] = b"",
        length: int | None = None,
    ) -> AsyncIterator[StreamedAnswer]:
        """One exchange. `headers` without Host and lengths, which are ours; `host` in lower case, an IPv6 address
        without brackets. A 3xx is an ordinary answer. `length` is that of a body that comes in pieces, where known."""
        # Where another has decided on the port, the rule for addresses that are written down is left.
        shown_port = (
            443 if self._any_port and not is_allowed_private(host, port, self._allow_private) else port
        )
        reason = target_refusal(scheme, host, shown_port, self._allow_private)
        shown = f"[{host}]" if ":" in host else host
        if reason is not None:
            raise AddressRefused(f"{scheme}://{shown}:{port}: {reason}")
        is_default = port == (443 if scheme == "https" else 80)
        ours = [(b"host", (shown if is_default else f"{shown}:{port}").encode())]
        if not isinstance(body, bytes):
            framing = (
                (b"transfer-encoding", b"chunked") if length is None else (b"content-length", b"%d" % length)
            )
            ours.append(framing)
        elif body or method not in ("GET", "HEAD", "DELETE", "OPTIONS"):
            ours.append((b"content-length", b"%d" % len(body)))
        # Some compressed kilobytes may hold gigabytes, which a limit on received bytes would not see.
        sent = [*ours, *headers, (b"accept-encoding", b"identity")]
        async with self._wire(scheme, host, port) as wire:
            status, found = await wire.ask(
                method, target, sent, body, is_chunked=not isinstance(body, bytes) and length is None
            )
            answer = StreamedAnswer(status, found, wire.chunks())
            if sum(len(name) + len(value) for name, value in found) > MAX_HEADER_BYTES:
                raise BadAnswer(f"the answer's header is over {MAX_HEADER_BYTES} bytes")
            if answer.header(b"content-encoding") not in (b"", b"identity"):
                raise BadAnswer("the answer is compressed although that was not asked for")
            yield answer

    @contextlib.asynccontextmanager
    async def _wire(self, scheme: str, host: str, port: int) -> AsyncIterator[Wire]:
        """A connection for one exchange; afterwards it is kept when it can be."""
        key = (scheme, host, port)
        try:
            async with asyncio.timeout(PLACE_SECONDS):
                await self._room.acquire()
        except TimeoutError:
            raise httpcore2.PoolTimeout(f"no place among {MOST_CONNECTIONS} connections") from None
        wire: Wire | None = None
        is_kept = False
        try:
            wire = self._kept(key)
            if wire is None:
                wire = await self._dialler.connected(host, port)
                self._used.add(wire)
                if scheme == "https":
                    await wire.start_tls(self._ssl_context, name=host)
            self._used.add(wire)
            yield wire
            if wire.may_follow and self.idle < MOST_IDLE:
                wire.idle_since = time.monotonic()
                self._idle.setdefault(key, []).append(wire)
                is_kept = True
        finally:
            self._room.release()
            if wire is not None:
                self._used.discard(wire)
                if not is_kept:
                    wire.abort()

    def _kept(self, key: tuple[str, str, int]) -> Wire | None:
        """The one that was used last. Those that are old or have hung up are closed."""
        idle = self._idle.get(key, [])
        found: Wire | None = None
        while idle and found is None:
            wire = idle.pop()
            if time.monotonic() - wire.idle_since < IDLE_CONNECTION_SECONDS and not wire.is_readable():
                found = wire
            else:
                wire.abort()
        if not idle:
            self._idle.pop(key, None)
        return found

    def sweep(self) -> None:
        """Close what was not used for a while; to be called every few seconds."""
        moment = time.monotonic()
        for key, wires in list(self._idle.items()):
            old = [wire for wire in wires if moment - wire.idle_since >= IDLE_CONNECTION_SECONDS]
            self._idle[key] = [wire for wire in wires if wire not in old]
            for wire in old:
                wire.abort()
            if not self._idle[key]:
                del self._idle[key]

    @property
    def idle(self) -> int:
        """How many connections are kept and not in use."""
        return sum(len(wires) for wires in self._idle.values())

    def close(self) -> None:
        """Close what is idle and cut what is not."""
        for wires in self._idle.values():
            for wire in wires:
                wire.abort()
        self._idle.clear()
        for wire in list(self._used):
            wire.abort()

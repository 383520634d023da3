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
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, NoReturn

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

Headers = Sequence[tuple[bytes, bytes]]
AsyncDial = Callable[[IPAddress, int], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
"""A connection to exactly this address. Raises OSError."""

PIECE = 64 * 1024
IDLE_CONNECTION_SECONDS = 30.0
MOST_CONNECTIONS = 1000


class BadAnswer(Exception):
    """The host's answer is none that we take: too large a header, compressed unasked."""


async def async_dial_tcp(address: IPAddress, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """As it says."""
    return await asyncio.open_connection(str(address), port, limit=PIECE)


class _Stream(httpcore2.AsyncNetworkStream):
    """A connected socket with our limits."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, timeouts: Timeouts
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._timeouts = timeouts
        self._awaits_first_byte = True

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        limit = self._timeouts.first_byte if self._awaits_first_byte else self._timeouts.idle
        try:
            async with asyncio.timeout(limit):
                data = await self._reader.read(max_bytes)
        except TimeoutError:
            what = "first byte" if self._awaits_first_byte else "next byte"
            raise httpcore2.ReadTimeout(f"no {what} of the answer within {limit:g} s") from None
        except OSError as error:
            raise httpcore2.ReadError("the connection broke") from error
        self._awaits_first_byte = False
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._awaits_first_byte = True
        if not buffer:
            return
        try:
            self._writer.write(buffer)
            async with asyncio.timeout(self._timeouts.write):
                await self._writer.drain()
        except TimeoutError:
            seconds = self._timeouts.write
            raise httpcore2.WriteTimeout(f"the request was not taken within {seconds:g} s") from None
        except OSError as error:
            raise httpcore2.WriteError("the connection broke") from error

    async def aclose(self) -> None:
        # Not waited for: a TLS peer that never says goodbye would hold the caller.
        self._writer.transport.abort()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> _Stream:
        try:
            async with asyncio.timeout(self._timeouts.connect):
                await self._writer.start_tls(ssl_context, server_hostname=server_hostname)
        except TimeoutError as error:
            await self.aclose()
            raise httpcore2.ConnectTimeout(UNREACHABLE) from error
        except (OSError, ValueError) as error:
            await self.aclose()
            raise httpcore2.ConnectError(UNREACHABLE) from error
        return self

    def get_extra_info(self, info: str) -> Any:
        if info == "ssl_object":
            return self._writer.get_extra_info("ssl_object")
        if info == "is_readable":  # Asked of idle connections: readable means that the other side hung up.
            return self._reader.at_eof() or self._writer.is_closing() or bool(self._reader._buffer)  # type: ignore[attr-defined]
        return None


class _Backend(httpcore2.AsyncNetworkBackend):
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

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
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
                return _Stream(reader, writer, self._timeouts)
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

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> NoReturn:
        raise AddressRefused(f"unix socket {path}")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


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
    """Connections to hosts that are public, or that `allow_private` lists. For one event loop; `aclose` on it.

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
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=ssl_context or client_ssl_context(),
            max_connections=MOST_CONNECTIONS,
            keepalive_expiry=IDLE_CONNECTION_SECONDS,
            network_backend=_Backend(
                allow_private=self._allow_private,
                timeouts=timeouts or Timeouts(),
                resolver=resolver,
                dial=dial,
                lookups=lookups,
            ),
        )

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
        async with self._pool.stream(
            method,
            f"{scheme}://{shown}:{port}{target}",
            # Some compressed kilobytes may hold gigabytes, which a limit on received bytes would not see.
            headers=[*ours, *headers, (b"accept-encoding", b"identity")],
            content=body,
            # Waiting for a place; all other limits are the stream's own.
            extensions={"timeout": {"pool": 10.0}},
        ) as response:
            found = [(name.lower(), value) for name, value in response.headers]
            answer = StreamedAnswer(response.status, found, response.aiter_stream())
            if sum(len(name) + len(value) for name, value in found) > MAX_HEADER_BYTES:
                raise BadAnswer(f"the answer's header is over {MAX_HEADER_BYTES} bytes")
            if answer.header(b"content-encoding") not in (b"", b"identity"):
                raise BadAnswer("the answer is compressed although that was not asked for")
            yield answer

    async def aclose(self) -> None:
        """Close what is idle and cut what is not."""
        await self._pool.aclose()

"""How `outbound_client` dials: resolve, check all answers, connect to a checked address, within limits.

Built below httpx2, as a network backend of its connection pool, so that TLS still sees the name and so that
a blocked read can be ended from another thread (closing a socket does not wake its reader; shutting it down
does).
"""

from __future__ import annotations

import contextlib
import functools
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, Literal, NoReturn, cast

import httpcore2
import httpx2

from e2a.core.addresses import (
    IPAddress,
    NameLookup,
    NameLookupError,
    NotPublicError,
    Resolver,
    checked_addresses,
    parse_address,
    target_refusal,
)

Dial = Callable[[socket.socket, IPAddress, int], None]
"""Connects the socket, whose timeout is set, to the address and port. Raises OSError."""

MAX_HEADER_BYTES = 32 * 1024
UNREACHABLE = "the host could not be reached"
"""One text for refused, closed, filtered and unknown hosts, so that nobody can scan our network with it."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Limits of one exchange in seconds, as in SECURITY.md 6.6. `connect` counts for TCP and for TLS each."""

    dns: float = 5.0
    connect: float = 10.0
    write: float = 30.0
    first_byte: float = 60.0
    idle: float = 120.0


class AddressRefused(httpcore2.ConnectError):
    """The host or one of its addresses may not be reached. The text tells nothing; the log gets `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(UNREACHABLE)
        self.reason = reason


def refused_address(error: BaseException) -> str | None:
    """The reason, when an error comes from a refused address; None for every other failure. For logs only."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, AddressRefused):
            return found.reason
        found = found.__cause__ or found.__context__
    return None


def dial_tcp(sock: socket.socket, address: IPAddress, port: int) -> None:
    sock.connect((str(address), port))


@functools.cache
def client_ssl_context() -> ssl.SSLContext:
    """The trusted roots, read once: some 25 ms."""
    return httpx2.create_ssl_context(trust_env=False)


class Aborter:
    """Ends everything a client is waiting for, from another thread, and everything it starts later."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stops: dict[object, Callable[[], None]] = {}
        self.is_aborted = False

    def add(self, owner: object, stop: Callable[[], None]) -> None:
        """`stop` must not block. Raises ReadError when the client was aborted before."""
        with self._lock:
            self.refuse_if_aborted()
            self._stops[owner] = stop

    def remove(self, owner: object) -> None:
        """After this `stop` is not running and will not run: the owner may close what it stops."""
        with self._lock:
            self._stops.pop(owner, None)

    def abort(self) -> None:
        with self._lock:
            self.is_aborted = True
            for stop in self._stops.values():
                with contextlib.suppress(OSError):
                    stop()

    def refuse_if_aborted(self) -> None:
        if self.is_aborted:
            raise httpcore2.ReadError("the client was closed")


def _shutdown(sock: socket.socket) -> None:
    # SSLSocket.shutdown would drop its TLS object under the reader's feet; the plain one only wakes it.
    socket.socket.shutdown(sock, socket.SHUT_RDWR)


class GuardedStream(httpcore2.NetworkStream):
    """A connected socket with our limits; what the HTTP library asks for is used where it is shorter."""

    def __init__(self, sock: socket.socket, aborter: Aborter, timeouts: Timeouts) -> None:
        self._sock = sock
        self._aborter = aborter
        self._timeouts = timeouts
        self._awaits_first_byte = True
        self._aborter.add(self, functools.partial(_shutdown, sock))

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        limit = self._timeouts.first_byte if self._awaits_first_byte else self._timeouts.idle
        try:
            self._sock.settimeout(min(limit, timeout) if timeout is not None else limit)
            data = self._sock.recv(max_bytes)
        except TimeoutError:
            what = "first byte" if self._awaits_first_byte else "next byte"
            raise httpcore2.ReadTimeout(f"no {what} of the answer within {limit:g} s") from None
        except OSError as error:
            self._aborter.refuse_if_aborted()
            raise httpcore2.ReadError("the connection broke") from error
        self._aborter.refuse_if_aborted()
        self._awaits_first_byte = False
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._awaits_first_byte = True
        view = memoryview(buffer)
        try:
            while view:
                self._sock.settimeout(self._timeouts.write)
                view = view[self._sock.send(view) :]
        except TimeoutError:
            seconds = self._timeouts.write
            raise httpcore2.WriteTimeout(f"the request was not taken within {seconds:g} s") from None
        except OSError as error:
            self._aborter.refuse_if_aborted()
            raise httpcore2.WriteError("the connection broke") from error

    def close(self) -> None:
        self._aborter.remove(self)
        self._sock.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> GuardedStream:
        self._aborter.remove(self)  # The plain socket gives its descriptor to the TLS one.
        self._sock.settimeout(self._timeouts.connect)
        wrapped: socket.socket = self._sock
        try:
            wrapped = tls = ssl_context.wrap_socket(
                self._sock, server_hostname=server_hostname, do_handshake_on_connect=False
            )
            secured = GuardedStream(tls, self._aborter, self._timeouts)
            try:
                tls.do_handshake()
            except BaseException:
                secured.close()
                raise
        except TimeoutError as error:
            wrapped.close()
            raise httpcore2.ConnectTimeout(UNREACHABLE) from error
        except (OSError, ValueError) as error:
            wrapped.close()
            raise httpcore2.ConnectError(UNREACHABLE) from error
        return secured

    def get_extra_info(self, info: str) -> Any:
        if info == "ssl_object":
            return self._sock if isinstance(self._sock, ssl.SSLSocket) else None
        if info == "server_addr":
            return self._sock.getpeername()
        if info == "client_addr":
            return self._sock.getsockname()
        if info == "is_readable":  # Asked of idle connections: readable means that the other side hung up.
            readable = select.poll()
            readable.register(self._sock, select.POLLIN)
            return bool(readable.poll(0))
        return None


class GuardedBackend(httpcore2.NetworkBackend):
    """Turns the name in a request into a connection to a checked address."""

    def __init__(
        self,
        *,
        allow_private: frozenset[str],
        timeouts: Timeouts,
        resolver: Resolver,
        dial: Dial,
        aborter: Aborter,
    ) -> None:
        self._allow_private = allow_private
        self._timeouts = timeouts
        self._resolver = resolver
        self._dial = dial
        self._aborter = aborter

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        try:
            answers = self._answers(host, port)
            addresses = checked_addresses(host, port, answers, allow_private=self._allow_private)
        except NotPublicError as error:
            raise AddressRefused(error.reason) from error
        except NameLookupError as error:
            self._aborter.refuse_if_aborted()
            raise httpcore2.ConnectError(UNREACHABLE) from error
        deadline = time.monotonic() + self._timeouts.connect
        failure: OSError | None = None
        for index, address in enumerate(addresses):
            share = (deadline - time.monotonic()) / (len(addresses) - index)
            if share <= 0:
                break
            try:
                return self._connected(address, port, share)
            except OSError as error:
                self._aborter.refuse_if_aborted()
                failure = error
        if failure is None or isinstance(failure, TimeoutError):
            raise httpcore2.ConnectTimeout(UNREACHABLE) from failure
        raise httpcore2.ConnectError(UNREACHABLE) from failure

    def _answers(self, host: str, port: int) -> list[str]:
        if parse_address(host) is not None:
            return [host]
        lookup = NameLookup(host, port, self._resolver)
        self._aborter.add(lookup, lookup.cancel)
        try:
            return lookup.wait(self._timeouts.dns)
        finally:
            self._aborter.remove(lookup)

    def _connected(self, address: IPAddress, port: int, seconds: float) -> GuardedStream:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(seconds)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream = GuardedStream(sock, self._aborter, self._timeouts)
        except BaseException:
            sock.close()
            raise
        try:
            self._dial(sock, address, port)
        except BaseException:
            stream.close()
            raise
        return stream

    def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> NoReturn:
        raise AddressRefused(f"unix socket {path}")


class _CountedBody(httpx2.SyncByteStream):
    def __init__(self, body: httpx2.SyncByteStream, limit: int) -> None:
        self._body = body
        self._limit = limit

    def __iter__(self) -> Iterator[bytes]:
        left = self._limit
        for chunk in self._body:
            left -= len(chunk)
            if left < 0:
                raise httpx2.RemoteProtocolError(f"the answer is longer than {self._limit} bytes")
            yield chunk

    def close(self) -> None:
        self._body.close()


class GuardedTransport(httpx2.HTTPTransport):
    """Checks the target of each request, and the size and encoding of each answer."""

    def __init__(
        self,
        *,
        allow_private: frozenset[str],
        ssl_context: ssl.SSLContext,
        backend: GuardedBackend,
        max_response_bytes: int,
    ) -> None:
        # Not super().__init__(): it builds a pool without our backend, and it has no parameter for one.
        self._pool = httpcore2.ConnectionPool(
            ssl_context=ssl_context, max_connections=10, keepalive_expiry=30.0, network_backend=backend
        )
        self._allow_private = allow_private
        self._max_response_bytes = max_response_bytes

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        port = url.port or (443 if url.scheme == "https" else 80)
        reason = target_refusal(url.scheme, url.raw_host.decode("ascii"), port, self._allow_private)
        if reason is not None:
            refused = AddressRefused(f"{url.scheme}://{url.host}:{port}: {reason}")
            raise httpx2.ConnectError(UNREACHABLE) from refused
        # Some compressed kilobytes may hold gigabytes, which a limit on received bytes would not see.
        request.headers["Accept-Encoding"] = "identity"
        request.extensions.pop("sni_hostname", None)
        response = super().handle_request(request)
        try:
            if sum(len(name) + len(value) for name, value in response.headers.raw) > MAX_HEADER_BYTES:
                raise httpx2.RemoteProtocolError(f"the answer's header is over {MAX_HEADER_BYTES} bytes")
            if response.headers.get("content-encoding", "identity") != "identity":
                raise httpx2.RemoteProtocolError("the answer is compressed although that was not asked for")
        except BaseException:
            response.close()
            raise
        response.stream = _CountedBody(cast(httpx2.SyncByteStream, response.stream), self._max_response_bytes)
        return response


class OutboundClient(httpx2.Client):
    """See `e2a.core.outbound.outbound_client`, which makes it."""

    def __init__(
        self,
        *,
        allow_private: frozenset[str],
        timeouts: Timeouts,
        resolver: Resolver,
        dial: Dial,
        ssl_context: ssl.SSLContext,
        max_response_bytes: int,
    ) -> None:
        self._aborter = Aborter()
        backend = GuardedBackend(
            allow_private=allow_private,
            timeouts=timeouts,
            resolver=resolver,
            dial=dial,
            aborter=self._aborter,
        )
        super().__init__(
            transport=GuardedTransport(
                allow_private=allow_private,
                ssl_context=ssl_context,
                backend=backend,
                max_response_bytes=max_response_bytes,
            ),
            trust_env=False,
            follow_redirects=False,
            # Nothing is carried from one call to the next.
            cookies=CookieJar(policy=DefaultCookiePolicy(allowed_domains=())),
            timeout=httpx2.Timeout(
                connect=timeouts.connect,
                read=max(timeouts.first_byte, timeouts.idle),
                write=timeouts.write,
                pool=timeouts.connect,
            ),
        )

    @property
    def is_aborted(self) -> bool:
        return self._aborter.is_aborted

    def abort(self) -> None:
        """End what any thread waits for on this client, at once, and refuse all further use. Never blocks.

        The thread that was waiting gets `httpx2.ReadError`; it must still call `close`.
        """
        self._aborter.abort()

    def send(
        self,
        request: httpx2.Request,
        *,
        stream: bool = False,
        auth: Any = httpx2.USE_CLIENT_DEFAULT,
        follow_redirects: Any = False,
    ) -> httpx2.Response:
        """As httpx2's, but a redirect is never followed, whatever the caller asks."""
        never: Literal[False] = False
        return super().send(request, stream=stream, auth=auth, follow_redirects=never)

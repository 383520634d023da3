"""One connection of a sandbox to its proxy: CONNECT tunnels that carry TLS to the named host, and plain HTTP.

Every target passes the rules, is resolved here, refused when any of its addresses is not public, and dialled at an
address that was checked. The text of a refusal says why; whether a private address answers is not told.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import h11

from e2a.core.addresses import IPAddress, NameLookupError, NotPublicError, parse_address, resolve_public
from sandboxes.egress.client_hello import MOST_BYTES, NotTls, hello_read
from sandboxes.egress.rules import BadHost, Verdict, host_normal
from sandboxes.gateway.broker_call import BrokerCall, Program
from sandboxes.gateway.egress_seen import Entry
from sandboxes.gateway.refusal import Refusal

if TYPE_CHECKING:
    from sandboxes.gateway.egress import EgressHost, SandboxEgress

log = logging.getLogger(__name__)

LARGEST_HEAD: Final = 64 * 1024
HEAD_SECONDS: Final = 60.0
"""Also between two requests of a kept connection."""
LOOKUP_SECONDS: Final = 5.0
DIAL_SECONDS: Final = 10.0
HELLO_SECONDS: Final = 10.0
ANSWER_SECONDS: Final = 300.0
IDLE_SECONDS: Final = 600.0
PIECE: Final = 64 * 1024
OWN_NAME: Final = "gateway.e2a"
"""As a host this is the gateway itself; so is the proxy's own address."""
OWN_HEADERS: Final = b"x-e2a-"

HOP_BY_HOP: Final = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade expect".split()
)


Dial = Callable[[IPAddress, int], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
"""A connection to exactly this address. Raises OSError."""


async def dial_tcp(address: IPAddress, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """As it says."""
    return await asyncio.open_connection(str(address), port, limit=PIECE)


class ProxyConnection:
    """Serves one connection; `cut` and `recheck` come from outside."""

    def __init__(
        self,
        host: EgressHost,
        egress: SandboxEgress,
        reader: Program,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._host = host
        self._egress = egress
        self._reader = reader
        self._writer = writer
        self._http = _server()
        self._upstream: asyncio.StreamWriter | None = None
        self._call: BrokerCall | None = None
        self._target: tuple[str, int] | None = None
        self._entry: Entry | None = None

    def cut(self) -> None:
        """End it now."""
        for writer in (self._writer, self._upstream):
            if writer is not None:
                writer.transport.abort()
        if self._call is not None:
            self._call.cut()

    def recheck(self) -> None:
        """The rules have changed."""
        if self._target is None or self._egress.rules.verdict(*self._target).is_allowed:
            return
        self._note(*self._target, is_allowed=False, reason="revoked")
        self.cut()

    async def serve(self) -> None:
        """Until the client or the target is gone. Never raises for what they do."""
        try:
            while await self._request():
                pass
        except Refusal as refusal:
            await self._refuse(refusal)
        except h11.RemoteProtocolError as error:
            await self._refuse(Refusal(error.error_status_hint, "bad_request", "this is not HTTP"))
        except (OSError, TimeoutError, asyncio.IncompleteReadError, h11.LocalProtocolError):
            pass  # One side is gone or too slow; there is nobody to tell.
        finally:
            self.cut_softly()

    def cut_softly(self) -> None:
        """Close both sides; what is written is flushed."""
        for writer in (self._upstream, self._writer):
            if writer is not None:
                writer.close()

    # -- one request

    async def _request(self) -> bool:
        """Whether another one may follow on the connection."""
        async with asyncio.timeout(HEAD_SECONDS):
            event = await self._next_event()
        if isinstance(event, h11.ConnectionClosed):
            return False
        assert isinstance(event, h11.Request), "a server's first event"
        if event.method == b"CONNECT":
            await self._tunnel(event)
            return False
        return await self._plain(event)

    async def _next_event(self) -> Any:
        while True:
            event = self._http.next_event()
            if event is not h11.NEED_DATA:
                return event
            self._http.receive_data(await self._reader.read(PIECE))

    async def _reach(self, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to a target that the rules allow, at an address that was checked. Raises Refusal."""
        verdict = self._allowed(host, port)
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            addresses = await asyncio.get_running_loop().run_in_executor(
                self._host.lookups, self._resolve, host, port
            )
        except NotPublicError as error:
            log.warning("sandbox %s: %s", self._egress.sandbox_id, error.reason)
            self._note(host, port, is_allowed=False, reason="private_address", rule=verdict.rule)
            raise Refusal(403, "egress_denied", f"{shown} leads to an address that is not public") from None
        except NameLookupError:
            self._note(host, port, is_allowed=False, reason="no_address", rule=verdict.rule)
            raise Refusal(502, "no_address", f"{host} has no address") from None
        reader, writer = await self._dial(addresses, host, port, shown)
        self._upstream, self._target = writer, (host, port)
        if not self._egress.rules.verdict(host, port).is_allowed:
            self.recheck()  # They changed while we were dialling.
            raise Refusal(403, "egress_denied", f"{shown} is not allowed any more")
        self._entry = self._note(host, port, is_allowed=True, reason="allowed", rule=verdict.rule)
        return reader, writer

    def _resolve(self, host: str, port: int) -> list[IPAddress]:
        return resolve_public(
            host,
            port,
            allow_private=self._host.allow_private,
            resolver=self._host.resolver,
            seconds=LOOKUP_SECONDS,
        )

    def _allowed(self, host: str, port: int) -> Verdict:
        """What the rules say, when it is yes. Raises Refusal."""
        verdict = self._egress.rules.verdict(host, port)
        if not verdict.is_allowed:
            self._note(host, port, is_allowed=False, reason=verdict.reason, rule=verdict.rule)
            shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            raise Refusal(403, "egress_denied", f"{shown} is not allowed by the egress rules of this sandbox")
        return verdict

    async def _dial(
        self, addresses: list[IPAddress], host: str, port: int, shown: str
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            async with asyncio.timeout(DIAL_SECONDS):
                for address in addresses:
                    with contextlib.suppress(OSError):
                        return await self._host.dial(address, port)
        except TimeoutError:
            pass
        self._note(host, port, is_allowed=False, reason="unreachable")
        raise Refusal(502, "unreachable", f"{shown} does not take a connection")

    def _note(self, host: str, port: int, *, is_allowed: bool, reason: str, rule: str = "") -> Entry:
        entry = self._egress.seen.note(host, port, is_allowed=is_allowed, reason=reason, rule=rule)
        self._egress.save_if_due()
        if entry.count == 1:  # The rest is counted; a loop inside must not fill the log.
            log.info("sandbox %s: egress to %s:%s: %s", self._egress.sandbox_id, host, port, reason)
        return entry

    # -- CONNECT

    async def _tunnel(self, request: h11.Request) -> None:
        host, port = authority(request.target.decode("ascii", "replace"), default_port=None)
        upstream_reader, upstream = await self._reach(host, port)
        self._writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        hello = await self._hello(host, port, self._http.trailing_data[0])
        upstream.write(hello)
        out, into = await _both(
            _pump(self._reader, upstream, IDLE_SECONDS), _pump(upstream_reader, self._writer, IDLE_SECONDS)
        )
        assert self._entry is not None
        self._egress.seen.moved(self._entry, bytes_out=out + len(hello), bytes_in=into)

    async def _hello(self, host: str, port: int, begun: bytes) -> bytes:
        """The first bytes, once they are seen to be TLS for that host. Closes on anything else."""
        async with asyncio.timeout(HELLO_SECONDS):
            try:
                while (hello := hello_read(begun)) is None:
                    more = await self._reader.read(MOST_BYTES)
                    if not more:
                        raise NotTls("it ended before it began")
                    begun += more
            except NotTls:
                self._note(host, port, is_allowed=False, reason="not_tls")
                raise asyncio.IncompleteReadError(b"", None) from None
        # An address cannot be named in SNI (RFC 6066 3).
        if hello.server_name != (None if parse_address(host) is not None else host):
            self._note(host, port, is_allowed=False, reason="sni_mismatch")
            raise asyncio.IncompleteReadError(b"", None)
        return begun

    # -- plain HTTP

    async def _plain(self, request: h11.Request) -> bool:
        if request.target.startswith(b"/"):
            return await self._ours(request, request.target.decode("ascii", "replace"))
        url = urlsplit(request.target.decode("ascii", "replace"))
        if url.scheme != "http" or not url.netloc or "@" in url.netloc:
            raise Refusal(400, "bad_request", "this is a proxy: it takes http://host/… and CONNECT host:port")
        host, port = authority(url.netloc, default_port=80)
        given = [value for name, value in request.headers if name == b"host"]
        if len(given) != 1 or authority(given[0].decode("ascii", "replace"), default_port=80) != (host, port):
            raise Refusal(400, "bad_request", "Host is not the host of the URL")
        path = url.path or "/"
        target = f"{path}?{url.query}" if url.query else path
        if (host, port) == (OWN_NAME, 80):
            return await self._ours(request, target)
        reader, writer = await self._reach(host, port)
        return await self._exchange(request, target, reader, writer)

    async def _ours(self, request: h11.Request, target: str) -> bool:
        """A request to the gateway itself, which the broker answers: `/llm/anthropic/v1/messages` is a model call,
        `/api.example.com/…` a call of that host with the header that a secret says.

        Who asks is known by the socket, and said with our signature.
        """
        broker = self._host.broker
        inner = self._inner(target)
        if broker is None or inner is None:
            raise Refusal(
                400,
                "bad_request",
                "this is a proxy: it takes http://host/… and CONNECT host:port; "
                f"http://{OWN_NAME}/ has /llm/<vendor>/… and /<host>/…",
            )
        if request.http_version < b"1.1":
            raise Refusal(505, "bad_request", "this takes HTTP/1.1")
        call = self._call = BrokerCall(
            broker,
            method=request.method,
            target=f"/{self._egress.sandbox_id}{inner}",
            headers=_passed_on(request.headers),
            framing=_framing(request.headers),
            http=self._http,
            program=self._reader,
            writer=self._writer,
        )
        try:
            if not await call.run():
                return False
        finally:
            self._moved(bytes_out=call.bytes_out, bytes_in=call.bytes_in)
            self._call = self._target = self._entry = None
        # The answer went past h11: it begins anew, with what it was given of the next request.
        following, _ = self._http.trailing_data
        self._http = _server()
        if following:
            self._http.receive_data(following)
        return True

    def _inner(self, target: str) -> str | None:
        """The path that the broker knows; None for one that is not ours. Raises Refusal for a host without a rule."""
        if target.startswith("/llm/"):
            return target
        first, slash, rest = target[1:].partition("/")
        if not slash or "." not in first:
            return None
        host, port = authority(first, default_port=443)
        verdict = self._allowed(host, port)
        self._target = (host, port)
        self._entry = self._note(host, port, is_allowed=True, reason="allowed", rule=verdict.rule)
        shown = f"[{host}]" if ":" in host else host
        return f"/to/{shown}:{port}/{rest}"

    async def _exchange(
        self, request: h11.Request, target: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Pass on one request and its answer. Whether another one may follow."""
        self._upstream = writer
        ours = h11.Connection(h11.CLIENT, max_incomplete_event_size=LARGEST_HEAD)
        headers = [*_passed_on(request.headers), *_framing(request.headers), (b"connection", b"close")]
        writer.write(ours.send(h11.Request(method=request.method, target=target, headers=headers)) or b"")
        if self._http.they_are_waiting_for_100_continue:
            self._writer.write(self._http.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
        sending = asyncio.create_task(self._send_body(ours, writer))
        try:
            await self._answer(ours, reader)
        finally:
            is_sent = sending.done() and not sending.cancelled() and sending.exception() is None
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError, TimeoutError, h11.ProtocolError):
                await sending
            writer.close()
            self._upstream = self._target = self._entry = None
        if not is_sent or self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    async def _send_body(self, ours: h11.Connection, writer: asyncio.StreamWriter) -> None:
        while True:
            async with asyncio.timeout(IDLE_SECONDS):
                event = await self._next_event()
            if isinstance(event, h11.Data):
                writer.write(ours.send(h11.Data(data=event.data)) or b"")
                self._moved(bytes_out=len(event.data))
                async with asyncio.timeout(IDLE_SECONDS):
                    await writer.drain()
            elif isinstance(event, h11.EndOfMessage):
                writer.write(ours.send(h11.EndOfMessage()) or b"")
                return
            else:
                raise asyncio.IncompleteReadError(b"", None)

    async def _answer(self, ours: h11.Connection, reader: asyncio.StreamReader) -> None:
        began = False
        try:
            while True:
                event = ours.next_event()
                if event is h11.NEED_DATA:
                    async with asyncio.timeout(ANSWER_SECONDS):
                        ours.receive_data(await reader.read(PIECE))
                elif isinstance(event, h11.Response):
                    began = True
                    headers = [*_end_to_end(event.headers), *_framing(event.headers)]
                    await self._pass_on(
                        h11.Response(status_code=event.status_code, headers=headers, reason=event.reason)
                    )
                elif isinstance(event, h11.Data):
                    self._moved(bytes_in=len(event.data))
                    await self._pass_on(h11.Data(data=event.data))
                elif isinstance(event, h11.EndOfMessage):
                    await self._pass_on(h11.EndOfMessage())
                    return
                elif not isinstance(event, h11.InformationalResponse):
                    raise h11.RemoteProtocolError("closed in the middle of an answer")
        except (h11.RemoteProtocolError, TimeoutError, OSError):
            if began:
                raise asyncio.IncompleteReadError(
                    b"", None
                ) from None  # Cut, so that it is not taken for whole.
            raise Refusal(502, "bad_gateway", "the host did not answer in HTTP") from None

    def _moved(self, *, bytes_out: int = 0, bytes_in: int = 0) -> None:
        """Count what was carried to and from a host outside; calls of our own are in the ledger."""
        if self._entry is not None:
            self._egress.seen.moved(self._entry, bytes_out=bytes_out, bytes_in=bytes_in)

    async def _pass_on(self, event: h11.Event) -> None:
        self._writer.write(self._http.send(event) or b"")
        async with asyncio.timeout(IDLE_SECONDS):
            await self._writer.drain()

    # -- refusals

    async def _refuse(self, refusal: Refusal) -> None:
        """Answer, if an answer still can be begun."""
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        body = json.dumps({"code": refusal.code, "detail": refusal.detail}).encode() + b"\n"
        headers = [
            ("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close"),
            ("x-e2a-answered-by", "gateway"),
        ]  # fmt: skip
        reason = HTTPStatus(refusal.status).phrase
        with contextlib.suppress(h11.LocalProtocolError, OSError, TimeoutError):
            head = h11.Response(status_code=refusal.status, headers=headers, reason=reason)
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self._writer.write(self._http.send(event) or b"")
            async with asyncio.timeout(HELLO_SECONDS):
                await self._writer.drain()


def authority(text: str, *, default_port: int | None) -> tuple[str, int]:
    """`host:port` in the form that rules are compared in. Raises Refusal."""
    host, port = text, default_port
    if not text.endswith("]"):
        before, colon, after = text.rpartition(":")
        if colon:
            host, port = before, int(after) if after.isascii() and after.isdigit() and len(after) <= 5 else 0
    if port is None or not 1 <= port <= 65535:
        raise Refusal(400, "bad_request", "CONNECT takes host:port")
    try:
        return host_normal(host), port
    except BadHost as bad:
        raise Refusal(400, "bad_request", str(bad)) from None


def _end_to_end(headers: Any) -> list[tuple[bytes, bytes]]:
    """Without what is between two neighbours only, and without lengths, which `_framing` gives."""
    named = {
        token.strip().lower()
        for name, value in headers
        if name == b"connection"
        for token in value.split(b",")
    }
    dropped = HOP_BY_HOP | named | {b"content-length"}
    return [(name, value) for name, value in headers if name not in dropped]


def _passed_on(headers: Any) -> list[tuple[bytes, bytes]]:
    """What a program's request may say to whom it is passed on."""
    return [(name, value) for name, value in _end_to_end(headers) if not name.startswith(OWN_HEADERS)]


def _server() -> h11.Connection:
    """The program's side, before a request."""
    return h11.Connection(h11.SERVER, max_incomplete_event_size=LARGEST_HEAD)


def _framing(headers: Any) -> list[tuple[bytes, bytes]]:
    """How long the body is, as it was said; h11 has checked that it is said once and well."""
    for wanted in (b"transfer-encoding", b"content-length"):
        for name, value in headers:
            if name == wanted:
                return [(name, value)]
    return []


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, idle: float) -> int:
    """Bytes that were carried, until the reader's end, which is passed on."""
    count = 0
    while True:
        async with asyncio.timeout(idle):
            piece = await reader.read(PIECE)
        if not piece:
            break
        count += len(piece)
        writer.write(piece)
        async with asyncio.timeout(idle):
            await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
    return count


async def _both(one: Any, other: Any) -> tuple[int, int]:
    """Both directions; when one fails, the other is ended too."""
    tasks = [asyncio.create_task(one), asyncio.create_task(other)]
    try:
        first, second = await asyncio.gather(*tasks)
        return first, second
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

"""Bytes between a client and a guest: one request, one answer, with back-pressure in both directions.

Two plain asyncio protocols that hold each other. Streams would cost a task, a reader and a second copy per
direction; this hop is on the way of every command. When one side cannot take more, the other is not read, so
a connection holds at most `BUFFER_BYTES` waiting plus one read, whatever flows through it.

How a connection ends:
- The client goes away: the guest's side is cut at once (a guest kills what asked for `kill_on_disconnect`).
  TCP cannot tell a close from the end of sending; clients of ours never end only their sending, so that is a
  close there. On a unix socket the two differ, and the end of sending is just passed on.
- The guest ends its answer: what is left is written to the client, then its side is closed.
- The guest refuses an upload half-way: its answer is passed on, and the rest of the upload is read and
  dropped for `LINGER_SECONDS`, because closing with unread bytes would take the answer away again.
- A tunnel has two ends: either side may end its sending first, which is passed on, and the other direction goes on.
  A server that refuses an upload behind it closes altogether: then the rest is dropped as above.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
import select
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import cast

from sandboxes.gateway.egress import EgressHost
from sandboxes.gateway.guest_socket import (
    GuestBusy,
    NoGuest,
    NoSuchSandbox,
    PlantedSocket,
    guest_connect,
)
from sandboxes.gateway.request_head import HeadRefused, RequestHead, RequestReader
from sandboxes.gateway.signing import NonceCacheFull, SignatureCheck, SignatureRefused

log = logging.getLogger(__name__)

READ_BYTES = 64 * 1024
BUFFER_BYTES = 64 * 1024

HEAD_SECONDS = 10.0
"""A client has this long to send its head."""
CONNECT_SECONDS = 5.0
"""A guest has this long to take a connection."""
LINGER_SECONDS = 5.0
IDLE_SECONDS = 300.0
"""A connection on which nothing moved for so long is cut. Guests send a keep-alive on streams every 10 s."""
TUNNEL_IDLE_SECONDS = 3600.0
"""As `IDLE_SECONDS`, for tunnels: what a WebSocket or a screen has to say comes when it comes."""

LARGEST_RULES = 256 * 1024
EGRESS_TARGET = re.compile(r"/egress/(?P<sandbox>sbx_[a-z2-7]{16,64})(\?sha256=(?P<digest>[0-9a-f]{64}))?")

_RETRY_SECONDS = 0.01

# Every read of every connection lands here and is copied out before the next callback runs.
_read_buffer = bytearray(READ_BYTES)
_read_view = memoryview(_read_buffer)


@dataclass(slots=True)
class RelayContext:
    """What all connections of a gateway share."""

    sandboxes: Path
    signatures: SignatureCheck
    largest_number: int
    connections: set[ClientSide] = field(default_factory=set)
    relayed: int = 0
    egress: EgressHost | None = None
    """Answers what is asked of the gateway itself, below `/egress/`."""


def answer_bytes(status: int, document: Mapping[str, object]) -> bytes:
    """A whole answer of the gateway itself."""
    body = json.dumps(document).encode()
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\nx-e2a-answered-by: gateway\r\n\r\n"
    )
    return head.encode() + body


def _has_hung_up(transport: asyncio.BaseTransport | None) -> bool:
    """Whether the other end of a unix socket is closed altogether, given that it sends no more and we have not said so
    ourselves. False on TCP, which cannot tell before it is written to."""
    if transport is None or transport.is_closing():
        return True
    connection = transport.get_extra_info("socket")
    poll = select.poll()
    poll.register(connection.fileno(), 0)
    return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))


class _Side(asyncio.BufferedProtocol):
    """What both sides share: a transport that may not be there, reads into the one buffer, holds."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._held_by: set[str] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=BUFFER_BYTES)

    def get_buffer(self, sizehint: int) -> memoryview:
        return _read_view

    def hold(self, reason: str) -> None:
        """Do not read for now. Each reason is released by itself."""
        self._held_by.add(reason)
        if self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading()

    def release(self, reason: str) -> None:
        self._held_by.discard(reason)
        if self.transport is not None and not self._held_by and not self.transport.is_closing():
            self.transport.resume_reading()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class GuestSide(_Side):
    """The connection to the guest: its bytes go to the client as they are."""

    def __init__(self, client: ClientSide) -> None:
        super().__init__()
        self._client = client
        self.has_answered = False

    def buffer_updated(self, nbytes: int) -> None:
        self.has_answered = True
        self._client.pass_on(bytes(_read_view[:nbytes]))

    def pause_writing(self) -> None:
        self._client.hold("guest is slow")

    def resume_writing(self) -> None:
        self._client.release("guest is slow")

    def eof_received(self) -> bool:
        if self._client.passes_end_on():
            return True
        # The answer is over. What the guest has not taken of the request by now it never will.
        self.abort()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if isinstance(exc, BrokenPipeError | ConnectionResetError) and self.transport is not None:
            # We were writing to a guest that had answered early and closed: its last words are still in the
            # socket.
            connection = self.transport.get_extra_info("socket")
            with contextlib.suppress(OSError):
                while last := os.read(connection.fileno(), READ_BYTES):
                    self.has_answered = True
                    self._client.pass_on(last)
        self._client.guest_ended(self)


class ClientSide(_Side):
    """The connection of a client: head, signature, guest, then bytes both ways."""

    def __init__(self, context: RelayContext) -> None:
        super().__init__()
        self._context = context
        self._request = RequestReader()
        self._head: RequestHead | None = None
        self._sandbox_id = ""
        self._own: re.Match[str] | None = None
        self._own_body = b""
        self._guest: GuestSide | None = None
        self._opening: asyncio.Task[None] | None = None
        self._is_answered = False
        self._is_tunnel = False
        self._client_has_ended = False
        self._guest_has_ended = False
        loop = asyncio.get_running_loop()
        self._now = loop.time
        self._moved_at = loop.time()
        self._limit_seconds = HEAD_SECONDS

    # -- the life of the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if len(self._context.connections) < self._context.largest_number:
            self._context.connections.add(self)
            return
        assert self.transport is not None
        self._is_answered = True
        detail = f"the gateway has {self._context.largest_number} connections, its limit"
        self.transport.write(answer_bytes(503, {"code": "too_many_connections", "detail": detail}))
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._context.connections.discard(self)
        if self._opening is not None:
            self._opening.cancel()
        if self._guest is not None:
            self._guest.abort()

    def cut_if_late(self, now: float) -> None:
        """Called from time to time: no connection waits for ever."""
        self._end_tunnel()
        limit = self._limit_seconds
        if self._is_answered and self.transport is not None and self.transport.get_write_buffer_size():
            limit = IDLE_SECONDS  # It lingers from when the client has got its answer.
        if now - self._moved_at > limit:
            if self._head is None and not self._is_answered:
                self._answer(408, "head_late", f"no request within {HEAD_SECONDS:g} s")
            else:
                self.abort()

    def abort(self) -> None:
        super().abort()
        if self._guest is not None:
            self._guest.abort()

    # -- from the client

    def buffer_updated(self, nbytes: int) -> None:
        if self._is_answered:
            return
        self._moved_at = self._now() if self._head is not None else self._moved_at
        try:
            self._request.feed(bytes(_read_view[:nbytes]))
            if self._head is None:
                self._read_head()
            elif self._own is not None:
                self._answer_egress()
            elif self._guest is not None:
                self._pass_body()
        except HeadRefused as refused:
            self._refuse(refused)

    def eof_received(self) -> bool:
        if self._is_answered:
            return False
        if self._is_tunnel and self._guest is not None and self._guest.transport is not None:
            # On TCP this may be a close: then what is sent to it next says so.
            if not self._guest_has_ended and _has_hung_up(self.transport):
                self.abort()
                return False
            self._client_has_ended = True
            self._guest.transport.write_eof()
            self._end_tunnel()
            return True
        if self._guest is None or not self._request.is_complete or self._is_gone():
            self.abort()
            return False
        # The client only says that it sends no more. The guest hears the same; its answer still goes out.
        if self._guest.transport is not None and not self._guest.transport.is_closing():
            self._guest.transport.write_eof()
        return True

    def _is_gone(self) -> bool:
        """Whether the client has closed, given that it sends no more."""
        assert self.transport is not None
        connection = self.transport.get_extra_info("socket")
        return connection.family != socket.AF_UNIX or _has_hung_up(self.transport)

    def passes_end_on(self) -> bool:
        """The guest sends no more. Whether its connection stays, because the client may still send: a tunnel."""
        if not self._is_tunnel or self._guest is None or self.transport is None:
            return False
        if self.transport.is_closing():
            return False
        if not self._client_has_ended and _has_hung_up(self._guest.transport):
            return False
        self._guest_has_ended = True
        self.transport.write_eof()
        self._end_tunnel()
        return True

    def _end_tunnel(self) -> None:
        """Close a tunnel whose ends are both there, once the guest has got what was sent."""
        guest = self._guest.transport if self._guest is not None else None
        has_ended = self._client_has_ended and self._guest_has_ended
        if has_ended and guest is not None and not guest.get_write_buffer_size():
            guest.abort()  # What the client has yet to get is written before its side is closed.

    def _read_head(self) -> None:
        head = self._request.head()
        if head is None:
            return
        self._head = head
        self._moved_at, self._limit_seconds = self._now(), IDLE_SECONDS
        if head.method == "GET" and head.target == "/healthz":
            self._answer_health()
            return
        try:
            self._context.signatures.verify(
                method=head.method, target=head.target, length=head.length, headers=head.headers
            )
        except SignatureRefused as error:
            log.warning("refused a request: %s", error)
            raise HeadRefused(
                401, "unauthenticated", "the request is not signed with this node's key"
            ) from None
        except NonceCacheFull:
            log.error("refused a request: more signed requests within a minute than the gateway remembers")
            raise HeadRefused(503, "gateway_busy", "too many requests within a minute") from None
        if (own := EGRESS_TARGET.fullmatch(head.target)) is not None:
            self._own = own
            self._answer_egress()
            return
        self._sandbox_id, guest_target = head.sandbox_and_target()
        if head.is_tunnel:
            self._is_tunnel, self._limit_seconds = True, TUNNEL_IDLE_SECONDS
        # What follows the head stays with the kernel and the reader until the guest is there to take it.
        self.hold("guest is not there")
        self._opening = asyncio.get_running_loop().create_task(self._open(head.for_guest(guest_target)))
        self._opening.add_done_callback(self._opened)

    def _pass_body(self) -> None:
        assert self._guest is not None
        body = self._request.body()
        if body and self._guest.transport is not None and not self._guest.transport.is_closing():
            self._guest.transport.write(body)

    # -- asked of the gateway itself

    def _answer_egress(self) -> None:
        """`PUT /egress/<sandbox>?sha256=…` sets a sandbox's rules, `GET` shows them and what became of connections.

        The signature does not cover a body, but it does cover the query, and so the body's digest.
        """
        assert self._own is not None
        assert self._head is not None
        self._own_body += self._request.body()
        if len(self._own_body) > LARGEST_RULES:
            raise HeadRefused(413, "too_large", f"rules have at most {LARGEST_RULES} bytes")
        if not self._request.is_complete:
            return
        host, sandbox_id, digest = self._context.egress, self._own["sandbox"], self._own["digest"]
        try:
            if host is None:
                raise NoSuchSandbox
            if self._head.method == "GET" and digest is None:
                answer = host.shown(sandbox_id)
            elif self._head.method == "PUT" and digest == hashlib.sha256(self._own_body).hexdigest():
                answer = host.rules_set(sandbox_id, json.loads(self._own_body))
            else:
                raise HeadRefused(400, "bad_request", "GET it, or PUT rules with their sha256")
        except NoSuchSandbox:
            raise HeadRefused(404, "no_such_sandbox", f"this node has no sandbox {sandbox_id}") from None
        except (ValueError, TypeError, AttributeError):
            raise HeadRefused(400, "bad_request", "these are no egress rules") from None
        except OSError as error:
            raise HeadRefused(503, "no_resources", f"the rules cannot be kept: {error.strerror}") from None
        self._send(answer_bytes(200, answer))

    # -- to the guest

    async def _open(self, head: bytes) -> None:
        if self._context.egress is not None:
            await self._context.egress.ensure(self._sandbox_id)
        try:
            connection = await self._connect()
        except NoSuchSandbox:
            self._answer(404, "no_such_sandbox", f"this node has no sandbox {self._sandbox_id[:80]}")
            return
        except NoGuest as error:
            if isinstance(error, PlantedSocket):
                log.error("sandbox %s: refused to connect, %s", self._sandbox_id, error)
            self._answer(
                502, "guest_unreachable", f"the guest of sandbox {self._sandbox_id} does not answer: {error}"
            )
            return
        guest = GuestSide(self)
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: guest, sock=connection)
        except BaseException:
            connection.close()
            raise
        if self.transport is None or self.transport.is_closing():
            guest.abort()
            return
        assert guest.transport is not None
        self._guest = guest
        self._context.relayed += 1
        if self._head is not None and self._head.waits_for_100:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            guest.transport.write(head + self._request.body())
        except HeadRefused as refused:
            self._refuse(refused)
            return
        self.release("guest is not there")

    def _opened(self, opening: asyncio.Task[None]) -> None:
        if not opening.cancelled() and (error := opening.exception()) is not None:
            log.error("sandbox %s: the way to its guest failed", self._sandbox_id, exc_info=error)
            self.abort()

    async def _connect(self) -> socket.socket:
        """Raises NoSuchSandbox or NoGuest.

        Waits only while the guest's queue is full, at most `CONNECT_SECONDS`.
        """
        give_up_at = self._now() + CONNECT_SECONDS
        while True:
            try:
                return guest_connect(self._context.sandboxes, self._sandbox_id)
            except GuestBusy:
                if self._now() > give_up_at:
                    raise NoGuest(f"its queue was full for {CONNECT_SECONDS:g} s") from None
            await asyncio.sleep(_RETRY_SECONDS)

    # -- to the client

    def pause_writing(self) -> None:
        if self._guest is not None:
            self._guest.hold("client is slow")

    def resume_writing(self) -> None:
        self._moved_at = self._now()
        if self._guest is not None:
            self._guest.release("client is slow")

    def pass_on(self, data: bytes) -> None:
        self._moved_at = self._now()
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def guest_ended(self, guest: GuestSide) -> None:
        if (
            self._guest is not guest
            or self.transport is None
            or self.transport.is_closing()
            or self._is_answered
        ):
            return
        if not guest.has_answered:
            detail = f"the guest of sandbox {self._sandbox_id} closed without an answer"
            self._answer(502, "guest_unreachable", detail)
        else:
            self._finish()

    def _refuse(self, refused: HeadRefused) -> None:
        if self._guest is not None:
            # The answer has perhaps begun; ours cannot be mixed into it.
            self.abort()
            return
        self._answer(refused.status, refused.code, refused.detail)

    def _answer(self, status: int, code: str, detail: str) -> None:
        self._send(answer_bytes(status, {"code": code, "detail": detail}))

    def _answer_health(self) -> None:
        self._send(
            answer_bytes(
                200,
                {
                    "gateway": "1",
                    "connections": len(self._context.connections),
                    "relayed": self._context.relayed,
                },
            )
        )

    def _send(self, data: bytes) -> None:
        if self.transport is None or self.transport.is_closing():
            return
        self.transport.write(data)
        self._finish()

    def _finish(self) -> None:
        """All that the client will get is written: flush and close, or linger while it is still sending."""
        assert self.transport is not None
        self._is_answered = True
        if self._head is not None and not self._request.is_complete:
            with contextlib.suppress(HeadRefused):
                self._request.body()
        has_sent_all = self._client_has_ended if self._is_tunnel else self._request.is_complete
        if has_sent_all:
            self.transport.close()
            return
        self._moved_at, self._limit_seconds = self._now(), LINGER_SECONDS
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._held_by.clear()
        self.transport.resume_reading()

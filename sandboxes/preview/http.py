"""One HTTP exchange with a server inside: h11 frames it, a tunnel carries it, nothing is held but a piece each way."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final

import h11

from e2a.core.errors import E2AError
from e2a.core.requests import Receive, Scope, Send, forwarded_address
from sandboxes.guest_client import AsyncGuestClient
from sandboxes.preview.headers import answer_headers, request_headers, without_token
from sandboxes.preview.hosts import PreviewHost
from sandboxes.preview.refusals import BadGateway, GatewayTimeout

ANSWER_SECONDS: Final = 300.0
"""A server may think so long before its answer begins."""
LARGEST_HEAD_BYTES: Final = 64 * 1024
_PIECE: Final = 64 * 1024


class ClientGone(Exception):
    """Nobody reads the answer any more."""


def target_of(scope: Scope) -> bytes:
    """Path and query as the server inside is asked for them: as they came, without our token."""
    query = without_token(scope["query_string"])
    path: bytes = scope.get("raw_path") or b"/"
    return path + (b"?" + query if query else b"")


def address_of(scope: Scope) -> str:
    """The caller's IP address."""
    peer = scope["client"][0] if scope.get("client") else ""
    forwarded = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-forwarded-for"]
    return forwarded_address(peer, ", ".join(forwarded))


async def carry(
    client: AsyncGuestClient, preview: PreviewHost, scope: Scope, receive: Receive, send: Send
) -> None:
    """Ask the server inside and pass its answer on. Raises E2AError as long as no answer has begun; an answer that
    breaks off ends without its end, so that the client sees that something is missing."""
    reader, writer = await client.tunnel(preview.port)
    try:
        await _Exchange(preview, scope, receive, send, reader, writer).run()
    finally:
        writer.transport.abort()


class _Exchange:
    def __init__(
        self,
        preview: PreviewHost,
        scope: Scope,
        receive: Receive,
        send: Send,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.preview = preview
        self.scope = scope
        self.receive = receive
        self.send = send
        self.reader = reader
        self.writer = writer
        self.http = h11.Connection(h11.CLIENT, max_incomplete_event_size=LARGEST_HEAD_BYTES)
        self.has_begun = False

    async def run(self) -> None:
        """Send the body and pass the answer on at once: a server may answer before it has read everything."""
        self.writer.write(self.http.send(self._request()) or b"")
        asking = asyncio.create_task(self._ask())
        answering = asyncio.create_task(self._answer())
        try:
            await asyncio.wait({asking, answering}, return_when=asyncio.FIRST_COMPLETED)
            if asking.done() and isinstance(asking.exception(), ClientGone):
                return
            if asking.done():
                asking.result()
            await answering
        finally:
            for task in (asking, answering):
                task.cancel()
            await asyncio.gather(asking, answering, return_exceptions=True)

    def _request(self) -> h11.Request:
        listed: list[tuple[bytes, bytes]] = list(self.scope["headers"])
        headers = request_headers(listed, preview=self.preview, address=address_of(self.scope))
        names = dict(listed)
        if b"transfer-encoding" in names:
            headers.append((b"transfer-encoding", b"chunked"))
        elif b"content-length" in names:
            headers.append((b"content-length", names[b"content-length"]))
        headers.append((b"connection", b"close"))
        try:
            return h11.Request(method=self.scope["method"], target=target_of(self.scope), headers=headers)
        except h11.LocalProtocolError as error:
            raise E2AError("The request is malformed.") from error

    async def _ask(self) -> None:
        """Send the body as it comes, then wait for the client to go away: raises `ClientGone`."""
        is_taken = True
        more = True
        while more:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            more = message.get("more_body", False)
            data = message.get("body", b"")
            if is_taken:
                is_taken = await self._pass(data, is_last=not more)
        while (await self.receive())["type"] != "http.disconnect":
            pass
        raise ClientGone

    async def _pass(self, data: bytes, *, is_last: bool) -> bool:
        """False when the server takes no more: its answer says why."""
        try:
            if data:
                self.writer.write(self.http.send(h11.Data(data=data)) or b"")
            if is_last:
                self.writer.write(self.http.send(h11.EndOfMessage()) or b"")
            await self.writer.drain()
        except (ConnectionError, h11.LocalProtocolError):
            return False
        return True

    async def _answer(self) -> None:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                response = await self._head()
        except TimeoutError:
            raise GatewayTimeout(f"No answer began within {ANSWER_SECONDS:g} s.") from None
        headers = answer_headers(response.headers, preview=self.preview)
        if response.status_code in (204, 304):  # They have no body, whatever length is named.
            headers = [pair for pair in headers if pair[0] != b"content-length"]
        self.has_begun = True
        await self.send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        while True:
            event = await self._event()
            if isinstance(event, h11.Data):
                # uvicorn's own send waits while the client does not read.
                await self.send({"type": "http.response.body", "body": bytes(event.data), "more_body": True})
            elif isinstance(event, h11.EndOfMessage):
                await self.send({"type": "http.response.body", "body": b"", "more_body": False})
                return

    async def _head(self) -> h11.Response:
        while True:
            event = await self._event()
            if isinstance(event, h11.Response):
                return event

    async def _event(self) -> Any:
        """The next thing the server says. Raises `BadGateway` for what is no HTTP."""
        has_closed = False
        while True:
            try:
                event = self.http.next_event()
                if event is not h11.NEED_DATA and event is not h11.PAUSED:
                    return event
                data = b""
                with contextlib.suppress(ConnectionError):
                    data = await self.reader.read(_PIECE)
                has_closed = not data
                self.http.receive_data(data)
            except h11.RemoteProtocolError as error:
                raise BadGateway(
                    f"The server on port {self.preview.port} {self._fault(has_closed)}."
                ) from error

    def _fault(self, has_closed: bool) -> str:
        if self.has_begun:
            return "broke its answer off"
        return (
            "closed the connection without an answer" if has_closed else "answered something that is not HTTP"
        )

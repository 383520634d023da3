"""One WebSocket of a server inside: its handshake is asked for first, then messages go both ways, one at a time."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any, Final

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage, InvalidStatus
from websockets.typing import Subprotocol

from e2a.core.requests import Receive, Scope, Send
from sandboxes.guest_client import AsyncGuestClient
from sandboxes.preview.headers import Header, answer_headers, request_headers
from sandboxes.preview.hosts import PreviewHost
from sandboxes.preview.http import address_of, target_of
from sandboxes.preview.refusals import BadGateway

MESSAGE_BYTES: Final = 2 * 1024 * 1024
"""What the web process takes from a browser too (`manage.py web`)."""
HANDSHAKE_SECONDS: Final = 30.0
CLOSE_SECONDS: Final = 5.0
_OURS: Final = frozenset({b"sec-websocket-accept", b"sec-websocket-protocol", b"sec-websocket-extensions"})


async def carry(
    client: AsyncGuestClient, preview: PreviewHost, scope: Scope, receive: Receive, send: Send
) -> None:
    """Until one side closes; the other is told with which code. Raises E2AError before the handshake is answered."""
    assert (await receive())["type"] == "websocket.connect"
    _, writer = await client.tunnel(preview.port)
    # The library wants a socket: it gets one of its own on this connection, of which nothing was read yet.
    connection = socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno()))
    writer.transport.pause_reading()  # type: ignore[attr-defined]  # asyncio's socket transports have it
    try:
        inside = await _handshake(connection, preview, scope, send)
        if inside is not None:
            await _relay(inside, receive, send)
    finally:
        writer.transport.abort()
        connection.close()


async def _handshake(
    connection: socket.socket, preview: PreviewHost, scope: Scope, send: Send
) -> ClientConnection | None:
    """None when the server inside refused: then its answer is passed on."""
    listed: list[Header] = list(scope["headers"])
    headers = request_headers(listed, preview=preview, address=address_of(scope), is_socket=True)
    origin = next((value.decode("latin-1") for name, value in headers if name == b"origin"), None)
    offered = [Subprotocol(name) for name in scope.get("subprotocols", ())]
    try:
        inside = await connect(
            f"ws://localhost:{preview.port}{target_of(scope).decode('latin-1')}",
            sock=connection,
            proxy=None,
            origin=origin,  # type: ignore[arg-type]  # a str of its own type
            subprotocols=offered or None,
            additional_headers=[
                (name.decode("latin-1"), value.decode("latin-1"))
                for name, value in headers
                if name not in (b"origin", b"user-agent")
            ],
            user_agent_header=next(
                (value.decode("latin-1") for name, value in headers if name == b"user-agent"), None
            ),
            compression=None,
            open_timeout=HANDSHAKE_SECONDS,
            ping_interval=None,  # What is open but silent is the server's own affair.
            close_timeout=CLOSE_SECONDS,
            max_size=MESSAGE_BYTES,
            max_queue=4,
        )
    except InvalidStatus as refused:
        kept = answer_headers(_raw(refused.response.headers), preview=preview)
        body = bytes(refused.response.body or b"")
        kept = [pair for pair in kept if pair[0] != b"content-length"]
        await send(
            {
                "type": "websocket.http.response.start",
                "status": refused.response.status_code,
                "headers": [*kept, (b"content-length", str(len(body)).encode())],
            }
        )
        await send({"type": "websocket.http.response.body", "body": body})
        return None
    except (InvalidHandshake, InvalidMessage, OSError, EOFError, TimeoutError) as error:
        raise BadGateway(f"The server on port {preview.port} does not take WebSockets here.") from error
    assert inside.response is not None
    kept = answer_headers(_raw(inside.response.headers), preview=preview)
    await send(
        {
            "type": "websocket.accept",
            "subprotocol": inside.subprotocol,
            "headers": [pair for pair in kept if pair[0] not in _OURS],
        }
    )
    return inside


def _raw(headers: Any) -> list[Header]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.raw_items()]


async def _relay(inside: ClientConnection, receive: Receive, send: Send) -> None:
    tasks = [asyncio.create_task(_inward(inside, receive)), asyncio.create_task(_outward(inside, send))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _inward(inside: ClientConnection, receive: Receive) -> None:
    """Each message is taken by the server inside before the next one is read."""
    try:
        while True:
            message = await receive()
            if message["type"] == "websocket.disconnect":
                code = message.get("code") or 1000
                await inside.close(code if _may_be_sent(code) else 1001)
                return
            text = message.get("text")
            await inside.send(message.get("bytes") or b"" if text is None else text)
    except ConnectionClosed:
        await asyncio.Event().wait()  # The other direction says with which code.


async def _outward(inside: ClientConnection, send: Send) -> None:
    try:
        while True:
            message = await inside.recv()
            kind = "text" if isinstance(message, str) else "bytes"
            await send({"type": "websocket.send", kind: message})
    except ConnectionClosed as closed:
        told = closed.rcvd
        code = told.code if told is not None and _may_be_sent(told.code) else 1011 if told is None else 1000
        await send({"type": "websocket.close", "code": code, "reason": told.reason if told else ""})


def _may_be_sent(code: int) -> bool:
    """RFC 6455, 7.4: the others stand for what was not said."""
    return (
        code in (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014)
        or 3000 <= code < 5000
    )

"""Connections that serve one call after another: a program's with the gateway, the gateway's with the broker."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from sandboxes.gateway import broker_call, broker_door
from sandboxes.gateway.address import UnixAddress, socket_path
from sandboxes.gateway.broker_door import BrokerDoor
from sessions_app.models import Session
from tests.broker.conftest import NODE_KEY, SANDBOX, Stack, asks
from tests.egress.conftest import opened, until
from tests.model_server import Gate, ModelServer, say

pytestmark = pytest.mark.django_db(transaction=True)

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def request(body: bytes, *more: str, length: int | None = None) -> bytes:
    lines = [
        "POST /llm/anthropic/v1/messages HTTP/1.1", "host: 127.0.0.1:3128", "anthropic-version: 2023-06-01",
        "content-type: application/json", *more,
    ]  # fmt: skip
    if not any(line.startswith("transfer-encoding") for line in more):
        lines.append(f"content-length: {len(body) if length is None else length}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """One answer of a connection that goes on."""
    async with asyncio.timeout(15):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        if "transfer-encoding: chunked" not in head:
            length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
            return int(head.split()[1]), await reader.readexactly(length)
        pieces = []
        while size := int(await reader.readuntil(b"\r\n"), 16):
            pieces.append(await reader.readexactly(size))
            await reader.readexactly(2)
        await reader.readexactly(2)
        return int(head.split()[1]), b"".join(pieces)


def door_of(stack: Stack) -> BrokerDoor:
    assert stack.host.broker is not None
    return stack.host.broker


async def test_calls_of_a_program_follow_each_other_on_one_connection_each(
    session: Session, stack: Stack, vendor: ModelServer
) -> None:
    one = await opened(stack.socket)
    used = set()
    chunked = json.dumps(asks("in pieces")).encode()
    for number, data in enumerate(
        (
            request(json.dumps(asks("one")).encode()),
            request(json.dumps(asks("two", stream=True)).encode()),
            request(b"%x\r\n%b\r\n0\r\n\r\n" % (len(chunked), chunked), "transfer-encoding: chunked"),
        ),
        start=1,
    ):
        await one.send(data)
        status, body = await answer(one.reader)
        assert status == 200
        assert b"Hello from the model." in body or b"event: message_stop" in body
        await until(lambda: len(door_of(stack)._idle) == 1, "the connection to the broker is kept")
        used.add(door_of(stack)._idle[0])
        assert len(vendor.requests) == number
    assert len(used) == 1
    one.writer.close()


async def test_what_is_sent_ahead_is_answered_in_its_order(
    session: Session, stack: Stack, vendor: ModelServer
) -> None:
    vendor.play([say("first"), say("second")])
    one = await opened(stack.socket)
    await one.send(request(json.dumps(asks("a")).encode()) + request(json.dumps(asks("b")).encode()))
    for text in (b"first", b"second"):
        status, body = await answer(one.reader)
        assert status == 200
        assert text in body
    one.writer.close()


async def test_a_body_that_comes_bit_by_bit_arrives_whole(
    session: Session, stack: Stack, vendor: ModelServer
) -> None:
    body = json.dumps(asks("word " * 40_000)).encode()
    one = await opened(stack.socket)
    await one.send(request(b"", "expect: 100-continue", length=len(body)))
    async with asyncio.timeout(10):
        assert (await one.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
    for start in range(0, len(body), 9_999):
        await one.send(body[start : start + 9_999])
        await asyncio.sleep(0)
    assert (await answer(one.reader))[0] == 200
    assert vendor.requests[0].body == json.loads(body)
    one.writer.close()


async def test_a_broker_that_was_replaced_is_asked_anew(
    session: Session, start: Callable[..., Any], vendor: ModelServer
) -> None:
    stack = await start()
    assert (await stack.call(asks())).status == 200
    await until(lambda: len(door_of(stack)._idle) == 1, "a kept connection")
    await stack.end()
    stack = await start()
    assert (await stack.call(asks())).status == 200
    assert len(vendor.requests) == 2


@pytest.fixture
async def plant(stack: Stack, tmp_path: Path) -> AsyncIterator[Callable[[Serve], Awaitable[None]]]:
    """Let the gateway have a kept connection whose other end behaves as told."""
    servers = []

    async def begin(serve: Serve) -> None:
        path = tmp_path / "run" / "other.sock"
        servers.append(await asyncio.start_unix_server(serve, path))
        other = BrokerDoor(UnixAddress(path), NODE_KEY)
        connection = await other.connected()
        door_of(stack).keep(connection)
        assert not connection.is_fresh

    yield begin
    for server in servers:
        server.close()


async def test_a_kept_connection_that_dies_unanswered_is_replaced(
    session: Session, stack: Stack, vendor: ModelServer, plant: Callable[[Serve], Awaitable[None]]
) -> None:
    heard = []

    async def dies(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        writer.transport.abort()

    await plant(dies)
    assert (await stack.call(asks())).status == 200
    assert len(heard) == len(vendor.requests) == 1


async def test_one_that_dies_when_it_has_begun_to_answer_is_not(
    session: Session, stack: Stack, vendor: ModelServer, plant: Callable[[Serve], Awaitable[None]]
) -> None:
    async def breaks_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nbegun\r\n")
        await writer.drain()
        writer.close()

    await plant(breaks_off)
    begun = await stack.call(asks())
    assert (begun.status, begun.body, begun.is_whole) == (200, b"begun", False)
    assert vendor.requests == []


async def test_a_request_that_is_still_coming_cannot_be_sent_twice(
    session: Session, stack: Stack, vendor: ModelServer, plant: Callable[[Serve], Awaitable[None]]
) -> None:
    async def dies(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.abort()

    await plant(dies)
    one = await opened(stack.socket)
    await one.send(request(b"{", length=1000))
    status, body = await answer(one.reader)
    assert (status, json.loads(body)["code"]) == (502, "bad_gateway")
    one.writer.close()


async def test_what_was_not_used_for_a_minute_is_not_used_again(
    session: Session, stack: Stack, vendor: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stack.call(asks())
    await until(lambda: len(door_of(stack)._idle) == 1, "a kept connection")
    (kept,) = door_of(stack)._idle
    monkeypatch.setattr(broker_door, "IDLE_SECONDS", 0.0)
    await stack.call(asks())
    await until(lambda: kept.is_lost, "the old one is closed")
    assert door_of(stack)._idle[0] is not kept


async def test_an_answer_waits_for_a_program_that_does_not_read(
    session: Session, stack: Stack, vendor: ModelServer
) -> None:
    vendor.play([say("x" * 6_000_000)])
    one = await opened(stack.socket)
    await one.send(request(json.dumps(asks()).encode()))
    (connection,) = stack.host._found[SANDBOX].connections
    await until(lambda: connection._writer.transport.get_write_buffer_size() > 0, "more than it takes")
    before = -1
    while (now := connection._writer.transport.get_write_buffer_size()) != before:
        before = now
        await asyncio.sleep(0.1)
    assert now <= 4 * broker_call.WAITING_BYTES
    status, body = await answer(one.reader)
    assert status == 200
    assert json.loads(body)["content"][0]["text"] == "x" * 6_000_000
    one.writer.close()


async def test_a_large_answer_flows_to_a_program_that_reads(
    session: Session, stack: Stack, vendor: ModelServer, plant: Callable[[Serve], Awaitable[None]]
) -> None:
    """What was held back for it goes on also when it had taken all before anybody looked."""
    large = b"y" * 130_000

    async def bursts(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (200 * len(large)))
        for _ in range(200):
            writer.write(large)
            await writer.drain()
            await asyncio.sleep(0)

    await plant(bursts)
    one = await opened(stack.socket)
    await one.send(request(json.dumps(asks()).encode()))
    status, body = await answer(one.reader)
    assert (status, len(body)) == (200, 200 * len(large))
    one.writer.close()


async def test_a_connection_whose_answer_was_held_back_to_its_end_serves_the_next(
    session: Session, stack: Stack, vendor: ModelServer, plant: Callable[[Serve], Awaitable[None]]
) -> None:
    served = []

    async def twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]))
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 400000\r\n\r\n" + b"z" * 400_000)
            served.append(head)

    await plant(twice)
    loop = asyncio.get_running_loop()
    # A bare socket: streams would read ahead.
    with socket.socket(socket.AF_UNIX) as one, socket_path(stack.socket) as name:
        one.setblocking(False)
        await loop.sock_connect(one, name)
        for count in (1, 2):
            await loop.sock_sendall(one, request(json.dumps(asks()).encode()))
            await until(
                lambda: (
                    len(served) == count  # noqa: B023
                    and [held._call for held in stack.host._found[SANDBOX].connections] == [None]
                ),
                "all of it waits for the program",
            )
            body = b""
            async with asyncio.timeout(10):
                while not body.endswith(b"z" * 400_000):
                    body += await loop.sock_recv(one, 65536)
    assert vendor.requests == []


async def test_a_program_that_left_before_its_call_began_costs_nothing(
    session: Session, stack: Stack, vendor: ModelServer
) -> None:
    gate = Gate()
    vendor.play([say("never heard", gate=gate)])
    one = await opened(stack.socket)
    await one.send(request(json.dumps(asks(stream=True)).encode()))
    one.writer.close()
    await until(
        lambda: not stack.host._found[SANDBOX].connections and not stack.broker._open, "the call is ended"
    )
    assert all(request.hung_up.wait(5) for request in vendor.requests)
    assert door_of(stack)._idle == []


async def test_what_speaks_an_older_http_is_told_so(
    session: Session, stack: Stack, vendor: ModelServer
) -> None:
    one = await opened(stack.socket)
    await one.send(request(b"{}").replace(b"HTTP/1.1", b"HTTP/1.0", 1))
    status, body = await answer(one.reader)
    assert status == 505
    assert "HTTP/1.1" in json.loads(body)["detail"]
    one.writer.close()

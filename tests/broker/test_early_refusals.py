"""A refusal that is decided before the request has come."""

from __future__ import annotations

import asyncio
import json

import h11
import pytest

from sandboxes.gateway.address import UnixAddress, socket_path
from sandboxes.gateway.broker_door import BrokerDoor
from sandboxes.models import Sandbox, SandboxState
from sessions_app.broker import exchange
from tests.broker.conftest import SANDBOX, Stack, asks

pytestmark = pytest.mark.django_db(transaction=True)

TARGET = f"/{SANDBOX}/llm/anthropic/v1/messages"


@pytest.fixture
def refused_sandbox(sandbox: Sandbox) -> None:
    Sandbox.objects.filter(pk=sandbox.pk).update(state=SandboxState.STOPPING)


async def begun(
    door: BrokerDoor, body: bytes, count: int
) -> tuple[h11.Connection, asyncio.StreamReader, asyncio.StreamWriter]:
    """A call as the gateway makes it, with so many bytes of its body sent."""
    http = h11.Connection(h11.CLIENT)
    headers = [
        (b"host", b"gateway"), (b"content-length", b"%d" % len(body)), (b"connection", b"close"),
        *door.signed("POST", TARGET, str(len(body))),
    ]  # fmt: skip
    assert isinstance(door.address, UnixAddress)
    with socket_path(door.address.path) as name:
        reader, writer = await asyncio.open_unix_connection(name)
    writer.write(http.send(h11.Request(method="POST", target=TARGET, headers=headers)) or b"")
    writer.write(http.send(h11.Data(data=body[:count])) or b"")
    return http, reader, writer


async def test_it_is_heard_although_the_request_is_still_being_sent(
    refused_sandbox: None, stack: Stack
) -> None:
    """A connection that is closed over an unread rest is reset: who is sending fails, and never reads the answer."""
    assert stack.host.broker is not None
    body = json.dumps(asks("x" * 50_000)).encode()
    http, reader, writer = await begun(stack.host.broker, body, 20_000)
    async with asyncio.timeout(10):
        http.receive_data(await reader.readuntil(b"\r\n\r\n"))
    refused = http.next_event()
    assert isinstance(refused, h11.Response)
    assert refused.status_code == 403
    for start in range(20_000, len(body), 10_000):
        writer.write(body[start : start + 10_000])
        await writer.drain()  # Raises once the other side has closed.
        await asyncio.sleep(0)
    async with asyncio.timeout(10):
        assert json.loads(await reader.read())["error"]["type"] == "permission_error"
    writer.close()


async def test_what_is_sent_after_it_is_not_heard_for_ever(
    refused_sandbox: None, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "LINGER_SECONDS", 0.2)
    assert stack.host.broker is not None
    _, reader, writer = await begun(stack.host.broker, b"x" * 1000, 4)
    async with asyncio.timeout(5):
        answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 403 ")
    assert b"permission_error" in answer
    writer.close()

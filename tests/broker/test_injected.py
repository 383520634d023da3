"""Secrets that never enter a sandbox (CONTRACT 4, `inject`): the header is added outside, for its hosts only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import sync_to_async

from e2a.core.addresses import IPAddress
from sandboxes.models import Sandbox, SandboxState
from secrets_vault.services import bundle_patch, holder_environment
from tests.broker.conftest import SANDBOX, Stack
from tests.egress.conftest import Heard, serving
from tests.outbound.servers import PUBLIC, certificate

pytestmark = pytest.mark.django_db(transaction=True)

TOKEN = "ghp_a-token-that-stays-outside"
HOST = "api.example.com"


def injected(
    value: str = TOKEN, *, hosts: tuple[str, ...] = (HOST,), header: str = "Authorization: Bearer {value}"
) -> Any:
    return {"value": value, "inject": {"hosts": list(hosts), "header": header}}


@dataclass
class World:
    """The sandbox's stack, and the one server that every public name leads to, over TLS."""

    stack: Stack
    heard: Heard
    dialled: list[tuple[str, int]]

    async def call(self, target: str, body: bytes = b"", *, method: str = "GET", **headers: str) -> Any:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        program = self.stack.program()
        try:
            return await program.rest(await program.begin(target, body, given, method=method))
        finally:
            program.leave()

    def allow(self, *rules: str) -> None:
        self.stack.host.rules_set(SANDBOX, {"allow": list(rules), "deny": []})

    def headers(self, number: int = -1) -> dict[str, str]:
        lines = self.heard.requests[number].decode().split("\r\n")[1:-2]
        return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: Heard) -> None:
    """Answers with what it was sent, as many services do in an error."""
    head = await reader.readuntil(b"\r\n\r\n")
    heard.requests.append(head)
    body = b""
    if b"transfer-encoding: chunked" in head.lower():
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
    else:
        lengths = [
            int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")
        ]
        body = await reader.readexactly(sum(lengths))
    heard.bodies.append(body)
    told = head + body
    writer.write(
        b"HTTP/1.1 201 Created\r\nX-Sent: %s\r\nContent-Length: %d\r\n" % (TOKEN.encode(), len(told))
    )
    writer.write(b"Connection: close\r\n\r\n" + (b"" if head.startswith(b"HEAD") else told))
    await writer.drain()


@pytest.fixture
async def world(
    start: Callable[..., Any], sandbox: Sandbox, alice: Any, tmp_path: Path
) -> AsyncIterator[World]:
    await put(alice, GITHUB_TOKEN=injected())
    server_tls, client_tls = certificate(tmp_path, HOST)
    dialled: list[tuple[str, int]] = []
    async with serving(_echo, tls=server_tls) as heard:

        async def dial(address: IPAddress, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            dialled.append((str(address), port))
            return await asyncio.open_connection("127.0.0.1", heard.port)

        stack = await start(resolver=lambda host, port: [PUBLIC], dial=dial, ssl_context=client_tls)
        found = World(stack, heard, dialled)
        found.allow(HOST, "*.example.com", "other.example.org")
        yield found


async def put(alice: Any, **values: Any) -> None:
    await sync_to_async(bundle_patch)(tenant=alice.tenant, name="main", values=values)


async def test_the_header_is_added_outside_and_what_comes_back_is_redacted(world: World) -> None:
    answer = await world.call(
        f"/{HOST}/repos/one?page=2", b'{"a": 1}', method="POST", authorization="Bearer from-inside", x_own="kept",
        accept="application/json",
    )  # fmt: skip
    assert (answer.status, answer.is_whole) == (201, True)
    assert world.heard.requests[0].startswith(b"POST /repos/one?page=2 HTTP/1.1\r\n")
    sent = world.headers()
    assert (sent["host"], sent["authorization"], sent["x-own"]) == (HOST, f"Bearer {TOKEN}", "kept")
    assert world.heard.bodies == [b'{"a": 1}']
    assert "from-inside" not in str(sent)
    assert not [name for name in sent if name.startswith("x-e2a-")]
    assert world.dialled == [(PUBLIC, 443)]
    assert TOKEN.encode() not in answer.body
    assert b"Bearer [redacted:GITHUB_TOKEN]" in answer.body
    assert answer.headers["x-sent"] == "[redacted:GITHUB_TOKEN]"


async def test_by_name_through_the_proxy_as_well(world: World) -> None:
    answer = await world.call(f"http://gateway.e2a/{HOST}/x", host="gateway.e2a")
    assert answer.status == 201
    assert world.headers()["authorization"] == f"Bearer {TOKEN}"


async def test_bodies_stream_both_ways_and_head_has_none(world: World) -> None:
    answer = await world.call(f"/{HOST}/up", b"x" * 300_000, method="POST", transfer_encoding="chunked")
    assert (answer.status, world.heard.bodies[-1]) == (201, b"x" * 300_000)
    head = await world.call(f"/{HOST}/up", method="HEAD")
    assert (head.status, head.body) == (201, b"")
    assert int(head.headers["content-length"]) > 0


async def test_no_value_reaches_the_environment(world: World, sandbox: Sandbox) -> None:
    values, _ = await sync_to_async(holder_environment)(SANDBOX)
    assert values == {}


@pytest.mark.parametrize(
    ("target", "code"),
    [
        ("/other.example.org/x", "not_injected"),
        (f"/{HOST}:8443/x", "egress_denied"),
        ("/api.example.net/x", "egress_denied"),
        ("/evilapi.example.com/x", "not_injected"),
        (f"/{HOST}", "bad_request"),
        ("/127.0.0.1/x", "egress_denied"),
        ("/localhost/x", "bad_request"),
    ],
)
async def test_another_host_gets_nothing(world: World, target: str, code: str) -> None:
    answer = await world.call(target)
    assert answer.json()["code"] == code
    assert (world.heard.connections, world.dialled) == (0, [])


async def test_egress_rules_come_first_and_their_verdicts_are_kept(world: World) -> None:
    world.allow()
    assert (await world.call(f"/{HOST}/x")).status == 403
    world.allow(HOST)
    assert (await world.call(f"/{HOST}/x")).status == 201
    seen = [(one["host"], one["port"], one["is_allowed"]) for one in world.stack.host.shown(SANDBOX)["seen"]]
    assert seen == [(HOST, 443, True), (HOST, 443, False)]


async def test_wildcards_ports_and_several_secrets(world: World, alice: Any) -> None:
    await put(
        alice,
        GITHUB_TOKEN=injected(hosts=("*.example.com:8443",)),
        SECOND=injected("another-value-outside", hosts=(HOST,), header="X-Api-Key: {value}"),
    )
    world.allow(HOST, f"{HOST}:8443")
    assert (await world.call(f"/{HOST}/x")).status == 201
    assert "authorization" not in world.headers()
    assert world.headers()["x-api-key"] == "another-value-outside"
    assert (await world.call(f"/{HOST}:8443/x")).status == 201
    assert world.headers()["authorization"] == f"Bearer {TOKEN}"
    assert world.headers()["host"] == f"{HOST}:8443"
    assert "x-api-key" not in world.headers()


async def test_two_secrets_with_one_header_are_one_header(world: World, alice: Any) -> None:
    await put(alice, SECOND=injected("another-value-outside", header="authorization: token {value}"))
    assert (await world.call(f"/{HOST}/x")).status == 201
    lines = [
        line for line in world.heard.requests[-1].lower().split(b"\r\n") if line.startswith(b"authorization")
    ]
    assert lines == [b"authorization: bearer " + TOKEN.encode()]


async def test_a_replaced_value_counts_from_the_next_call(world: World, alice: Any) -> None:
    await world.call(f"/{HOST}/x")
    await put(alice, GITHUB_TOKEN=injected("ghp_the-second-token-outside"))
    await world.call(f"/{HOST}/x")
    assert world.headers()["authorization"] == "Bearer ghp_the-second-token-outside"
    await put(alice, GITHUB_TOKEN=None)
    assert (await world.call(f"/{HOST}/x")).json()["code"] == "not_injected"


async def test_a_private_address_is_not_called(world: World) -> None:
    world.stack.broker._resolver = lambda host, port: ["10.0.0.1"]
    answer = await world.call(f"/{HOST}/x")
    assert (answer.status, answer.json()["detail"]) == (502, "The host could not be reached.")
    assert world.dialled == []


async def test_one_that_is_gone_or_that_traces_gets_nothing(world: World, sandbox: Sandbox) -> None:
    assert (await world.call(f"/{HOST}/x", method="TRACE")).status == 400
    await sync_to_async(Sandbox.objects.filter(pk=sandbox.pk).update)(state=SandboxState.STOPPING)
    assert (await world.call(f"/{HOST}/x")).json()["code"] == "permission_error"
    assert world.heard.connections == 0


async def test_a_redirect_is_for_the_program_to_follow(
    start: Callable[..., Any], sandbox: Sandbox, alice: Any, tmp_path: Path
) -> None:
    await put(alice, GITHUB_TOKEN=injected())
    server_tls, client_tls = certificate(tmp_path, HOST)

    async def moved(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: Heard) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 302 Found\r\nLocation: https://elsewhere.example.org/\r\nContent-Length: 0\r\n\r\n"
        )

    async with serving(moved, tls=server_tls) as heard:

        async def dial(address: IPAddress, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            return await asyncio.open_connection("127.0.0.1", heard.port)

        stack = await start(resolver=lambda host, port: [PUBLIC], dial=dial, ssl_context=client_tls)
        one = World(stack, heard, [])
        one.allow(HOST)
        answer = await one.call(f"/{HOST}/x")
        assert (answer.status, answer.headers["location"]) == (302, "https://elsewhere.example.org/")
        assert heard.connections == 1


@pytest.mark.parametrize("end", ["the program leaves", "the rule is taken away"])
async def test_a_call_ends_with_its_program_and_with_its_rule(
    start: Callable[..., Any], sandbox: Sandbox, alice: Any, tmp_path: Path, end: str
) -> None:
    await put(alice, GITHUB_TOKEN=injected())
    server_tls, client_tls = certificate(tmp_path, HOST)
    left = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: Heard) -> None:
        heard.requests.append(await reader.readuntil(b"\r\n\r\n"))
        arrived.set()
        await reader.read()
        left.set()

    arrived = asyncio.Event()
    async with serving(silent, tls=server_tls) as heard:

        async def dial(address: IPAddress, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            return await asyncio.open_connection("127.0.0.1", heard.port)

        stack = await start(resolver=lambda host, port: [PUBLIC], dial=dial, ssl_context=client_tls)
        stack.host.rules_set(SANDBOX, {"allow": [HOST], "deny": []})
        program = stack.program()
        asking = asyncio.create_task(program.begin(f"/{HOST}/x", b"", method="GET"))
        await asyncio.wait_for(arrived.wait(), 10)
        if end == "the program leaves":
            program.leave()
        else:
            stack.host.rules_set(SANDBOX, {"allow": [], "deny": []})
        await asyncio.wait_for(left.wait(), 10)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

"""The proxy of a sandbox (SECURITY 5.7, 6.2 to 6.5): who gets out, where to, and what is written down of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from pathlib import Path
from typing import Any

import pytest

from sandboxes.gateway import egress as egress_module
from sandboxes.gateway.egress import EgressHost
from sandboxes.gateway.guest_socket import NoSuchSandbox
from tests.egress.conftest import (
    ONE,
    PUBLIC,
    TWO,
    Client,
    Heard,
    Running,
    Start,
    World,
    client,
    hello,
    opened,
    refusing_early,
    serving,
    until,
)
from tests.outbound.servers import certificate


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: Heard) -> None:
    """Sends everything back."""
    while piece := await reader.read(65536):
        heard.raw += piece
        writer.write(piece)
        await writer.drain()


async def speak_tls(one: Client, context: ssl.SSLContext, name: str | None) -> None:
    async with asyncio.timeout(15):
        await one.writer.start_tls(context, server_hostname=name)


# -- plain HTTP


async def test_without_rules_nothing_gets_out(egress: Running, world: World) -> None:
    world.names["api.example.com"] = [PUBLIC]
    async with serving(hello) as heard:
        world.ports[80] = world.ports[443] = heard.port
        async with client(egress.socket()) as one:
            status, body = await one.get("http://api.example.com/")
        async with client(egress.socket()) as one:
            assert (await one.connect("api.example.com:443"))[0] == 403
    assert status == 403
    assert json.loads(body)["code"] == "egress_denied"
    assert (heard.connections, world.asked, world.dialled) == (0, [], [])
    assert egress.seen() == [
        ("api.example.com", 443, False, "not_allowed", 1), ("api.example.com", 80, False, "not_allowed", 1),
    ]  # fmt: skip


async def test_what_a_rule_allows_gets_out_and_its_answer_back(egress: Running, world: World) -> None:
    world.names["api.example.com"] = [PUBLIC]
    egress.allow("api.example.com")
    async with serving(hello) as heard:
        world.ports[80] = heard.port
        async with client(egress.socket()) as one:
            more = (
                "Proxy-Authorization: Basic c2VjcmV0\r\nProxy-Connection: keep-alive\r\nConnection: x-own\r\n"
                "X-Own: 1\r\nX-Kept: 2\r\n"
            )
            assert await one.get("http://API.example.com/a?b=c", more=more) == (200, b'{"at": "/a?b=c"}')
            # The connection is kept: the next request goes to its own target.
            assert await one.get("http://api.example.com/d") == (200, b'{"at": "/d"}')
    lines = heard.requests[0].decode().lower().split("\r\n")
    assert lines[0] == "get /a?b=c http/1.1"
    assert "host: api.example.com" in lines
    assert "x-kept: 2" in lines
    assert not [line for line in lines if line.startswith(("proxy-", "x-own"))]
    assert world.dialled == [(PUBLIC, 80)] * 2
    assert egress.seen() == [("api.example.com", 80, True, "allowed", 2)]


async def test_bodies_flow_both_ways_with_and_without_a_length(egress: Running, world: World) -> None:
    world.names["api.example.com"] = [PUBLIC]
    egress.allow("api.example.com")
    large = bytes(range(256)) * 8192  # 2 MiB

    async def mirror(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: Heard) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        heard.requests.append(head)
        chunked = b"transfer-encoding: chunked" in head.lower()
        body = b""
        if chunked:
            while size := int(await reader.readline(), 16):
                body += await reader.readexactly(size)
                await reader.readexactly(2)
        else:
            body = await reader.readexactly(len(large))
        heard.bodies.append(body)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for at in range(0, len(body), 70_000):
            piece = body[at : at + 70_000]
            writer.write(b"%x\r\n" % len(piece) + piece + b"\r\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    async with serving(mirror) as heard:
        world.ports[80] = heard.port
        async with client(egress.socket()) as one:
            head = (
                "POST http://api.example.com/ HTTP/1.1\r\nHost: api.example.com\r\nExpect: 100-continue\r\n"
            )
            for framing, sent in (
                (f"Content-Length: {len(large)}", large),
                ("Transfer-Encoding: chunked", b"%x\r\n" % len(large) + large + b"\r\n0\r\n\r\n"),
            ):
                one.writer.write(f"{head}{framing}\r\n\r\n".encode())
                assert (await one.head())[0] == 100
                await one.send(sent)
                status, headers = await one.head()
                assert (status, headers["transfer-encoding"]) == (200, "chunked")
                body = b""
                while size := int(await one.reader.readline(), 16):
                    body += await one.reader.readexactly(size)
                    await one.reader.readexactly(2)
                await one.reader.readexactly(2)
                assert body == large
    assert heard.bodies == [large, large]
    entry = egress.host.shown(ONE)["seen"][0]
    assert (entry["bytes_out"], entry["bytes_in"]) == (2 * len(large), 2 * len(large))


async def test_a_host_that_refuses_an_upload_early_is_heard(egress: Running, world: World) -> None:
    """It answers after the head and closes over what is still coming, which resets its connection."""
    refused = asyncio.Event()

    async with serving(refusing_early(refused)) as server:
        world.names["api.example.com"], world.ports[80] = [PUBLIC], server.port
        egress.allow("api.example.com")
        for _ in range(20):
            refused.clear()
            one = await opened(egress.socket())
            await one.send(
                b"POST http://api.example.com/ HTTP/1.1\r\nHost: api.example.com\r\nContent-Length: 500000\r\n\r\n"
                + b"x" * 1000
            )
            await refused.wait()
            with contextlib.suppress(OSError):  # The gateway may be done already.
                for _ in range(20):
                    await one.send(b"x" * 10_000)
            async with asyncio.timeout(10):
                answer = await one.reader.readuntil(b"no")
            assert answer.startswith(b"HTTP/1.1 413 ")
            one.writer.close()


async def test_an_answer_that_is_cut_is_not_taken_for_whole(egress: Running, world: World) -> None:
    world.names["api.example.com"] = [PUBLIC]
    egress.allow("api.example.com")

    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: Heard) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")

    async with serving(cut) as heard:
        world.ports[80] = heard.port
        async with client(egress.socket()) as one:
            await one.send(b"GET http://api.example.com/ HTTP/1.1\r\nHost: api.example.com\r\n\r\n")
            assert (await one.head())[0] == 200
            assert not (await one.rest()).endswith(b"0\r\n\r\n")


async def test_6_5_a_redirect_is_passed_on_and_never_followed(egress: Running, world: World) -> None:
    world.names["api.example.com"] = [PUBLIC]
    egress.allow("api.example.com")

    async def redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: Heard) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n")

    async with serving(redirect) as heard:
        world.ports[80] = heard.port
        async with client(egress.socket()) as one:
            assert (await one.get("http://api.example.com/"))[0] == 302
    assert world.dialled == [(PUBLIC, 80)]


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: api.example.com\r\n\r\n",
        b"GET https://api.example.com/ HTTP/1.1\r\nHost: api.example.com\r\n\r\n",
        b"GET ftp://api.example.com/ HTTP/1.1\r\nHost: api.example.com\r\n\r\n",
        b"GET http://api.example.com/ HTTP/1.1\r\nHost: other.example.com\r\n\r\n",
        b"GET http://api.example.com/ HTTP/1.1\r\nHost: api.example.com:8080\r\n\r\n",
        b"GET http://user@api.example.com/ HTTP/1.1\r\nHost: api.example.com\r\n\r\n",
        b"GET http://api.example.com:0/ HTTP/1.1\r\nHost: api.example.com:0\r\n\r\n",
        b"GET http://2130706433/ HTTP/1.1\r\nHost: api.example.com\r\n\r\n",
        b"CONNECT api.example.com HTTP/1.1\r\nHost: api.example.com\r\n\r\n",
        b"CONNECT api.example.com:65536 HTTP/1.1\r\nHost: api.example.com:65536\r\n\r\n",
        b"CONNECT [::1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET http://a.example.com/ HTTP/1.1\r\nHost: a.example.com\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET http://api.example.com/ HTTP/1.1\r\nHost: api.example.com\r\nX: " + b"x" * 70_000,
    ],
)
async def test_what_is_no_proxy_request_is_refused_and_reaches_nobody(
    egress: Running, world: World, sent: bytes
) -> None:
    world.names["api.example.com"] = [PUBLIC]
    egress.allow("*", "*:8080")
    async with client(egress.socket()) as one:
        await one.send(sent)
        status, body = await one.answer()
        assert status in (400, 431), body
        assert await one.rest() == b""
    assert world.dialled == []


# -- addresses


@pytest.mark.parametrize(
    "addresses",
    [
        ["10.0.0.1"], ["127.0.0.1"], ["169.254.169.254"], ["100.100.100.200"], ["100.64.0.1"], ["192.168.1.1"],
        ["::1"], ["::ffff:10.0.0.1"], ["64:ff9b::a9fe:a9fe"], ["2002:7f00:1::"], ["fd00:ec2::254"], ["fe80::1"],
        [PUBLIC, "10.0.0.1"], ["2606:2800:21f:cb07:6820:80da:af6b:8b2c", "::1"],
    ],
)  # fmt: skip
async def test_6_3_a_name_with_an_address_inside_is_refused_whatever_the_rule_says(
    egress: Running, world: World, addresses: list[str]
) -> None:
    world.names["api.example.com"] = addresses
    egress.allow("api.example.com", "*")
    async with client(egress.socket()) as one:
        assert (await one.connect("api.example.com:443"))[0] == 403
    assert world.dialled == []
    assert egress.seen() == [("api.example.com", 443, False, "private_address", 1)]


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "169.254.169.254", "10.1.2.3", "[::1]", "[::ffff:127.0.0.1]"]
)
async def test_6_2_a_private_address_is_refused_also_when_a_rule_names_it(
    egress: Running, world: World, address: str
) -> None:
    egress.allow(address, "*")
    async with client(egress.socket()) as one:
        assert (await one.connect(f"{address}:443"))[0] == 403
    assert world.dialled == []


async def test_an_address_is_reached_only_when_a_rule_names_it(egress: Running, world: World) -> None:
    egress.allow("*")
    async with client(egress.socket()) as one:
        assert (await one.get(f"http://{PUBLIC}/"))[0] == 403
    egress.allow(PUBLIC)
    async with serving(hello) as heard:
        world.ports[80] = heard.port
        async with client(egress.socket()) as one:
            assert (await one.get(f"http://{PUBLIC}/"))[0] == 200


async def test_6_7_the_operator_may_list_a_private_host_and_a_rule_must_allow_it(
    start: Start, world: World
) -> None:
    egress = await start(allow_private=frozenset({"10.0.0.5:8080"}))
    async with serving(hello) as heard:
        world.ports[8080] = heard.port
        async with client(egress.socket()) as one:
            assert (await one.get("http://10.0.0.5:8080/"))[0] == 403
        egress.allow("10.0.0.5:8080", "10.0.0.6:8080")
        async with client(egress.socket()) as one:
            assert (await one.get("http://10.0.0.5:8080/"))[0] == 200
        async with client(egress.socket()) as one:
            assert (await one.get("http://10.0.0.6:8080/"))[0] == 403


async def test_6_4_each_connection_asks_once_and_dials_what_it_checked(egress: Running, world: World) -> None:
    """A name that points inside the second time it is asked: there is no second time."""
    answers = iter([[PUBLIC], ["127.0.0.1"], [PUBLIC], ["127.0.0.1"]])

    def rebind(host: str, port: int) -> list[str]:
        return next(answers)

    egress.host.resolver = rebind
    egress.allow("api.example.com")
    async with serving(hello) as heard:
        world.ports[80] = heard.port
        statuses = []
        for _ in range(4):
            async with client(egress.socket()) as one:
                statuses.append((await one.get("http://api.example.com/"))[0])
    assert statuses == [200, 403, 200, 403]
    assert world.dialled == [(PUBLIC, 80)] * 2


async def test_no_address_and_nobody_there_are_told_apart_from_a_rule(egress: Running, world: World) -> None:
    world.names["quiet.example.com"] = [PUBLIC]
    egress.allow("*.example.com")
    async with client(egress.socket()) as one:
        status, body = await one.get("http://none.example.com/")
        assert (status, json.loads(body)["code"]) == (502, "no_address")
    async with client(egress.socket()) as one:
        status, body = await one.get("http://quiet.example.com/")
        assert (status, json.loads(body)["code"]) == (502, "unreachable")
    assert [entry[3] for entry in egress.seen()] == ["unreachable", "no_address"]


# -- CONNECT


async def test_a_tunnel_carries_tls_to_the_named_host(egress: Running, world: World, tmp_path: Path) -> None:
    server, trusted = certificate(tmp_path, "api.example.com")
    world.names["api.example.com"] = [PUBLIC]
    egress.allow("*.example.com")
    async with serving(echo, tls=server) as heard:
        world.ports[443] = heard.port
        async with client(egress.socket()) as one:
            assert (await one.connect("API.example.com.:443"))[0] == 200
            await speak_tls(one, trusted, "api.example.com")
            large = bytes(range(256)) * 4096
            one.writer.write(large)
            async with asyncio.timeout(15):
                assert await one.reader.readexactly(len(large)) == large
    await until(lambda: egress.host.shown(ONE)["seen"][0]["bytes_in"] > 2**20, "what it moved")
    entry = egress.host.shown(ONE)["seen"][0]
    assert (entry["host"], entry["reason"], entry["rule"]) == ("api.example.com", "allowed", "*.example.com")
    assert entry["bytes_out"] > 2**20


@pytest.mark.parametrize("name", ["other.example.com", None])
async def test_5_7_another_name_in_sni_reaches_nobody(
    egress: Running, world: World, tmp_path: Path, name: str | None
) -> None:
    world.names["api.example.com"] = [PUBLIC]
    egress.allow("api.example.com", "other.example.com")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    async with serving(echo) as heard:
        world.ports[443] = heard.port
        async with client(egress.socket()) as one:
            assert (await one.connect("api.example.com:443"))[0] == 200
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            with contextlib.suppress(ssl.SSLWantReadError):
                context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
            await one.send(outgoing.read())
            assert await one.rest() == b""
    assert heard.raw == b""
    assert egress.seen()[0] == ("api.example.com", 443, False, "sni_mismatch", 1)


@pytest.mark.parametrize("sent", [b"SSH-2.0-OpenSSH_9.2\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\0\0"])
async def test_5_7_what_is_not_tls_reaches_nobody(egress: Running, world: World, sent: bytes) -> None:
    world.names["api.example.com"] = [PUBLIC]
    egress.allow("api.example.com")
    async with serving(echo) as heard:
        world.ports[443] = heard.port
        async with client(egress.socket()) as one:
            assert (await one.connect("api.example.com:443"))[0] == 200
            await one.send(sent)
            assert await one.rest() == b""
    assert heard.raw == b""
    assert egress.seen()[0][3] == "not_tls"


# -- rules that change, gateways that restart


async def tunnel(egress: Running, sandbox: str = ONE) -> Any:
    """An open tunnel through TLS's first message, to a server that sends everything back."""
    one = await opened(egress.socket(sandbox))
    assert (await one.connect("api.example.com:443"))[0] == 200
    context = ssl.create_default_context()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="api.example.com").do_handshake()
    first = outgoing.read()
    await one.send(first)
    async with asyncio.timeout(15):
        assert await one.reader.readexactly(len(first)) == first
    return one


async def test_5_7_a_change_cuts_what_is_open_and_not_allowed_any_more(egress: Running, world: World) -> None:
    world.names["api.example.com"] = [PUBLIC]
    egress.allow("api.example.com")
    egress.allow("api.example.com", sandbox=TWO)
    async with serving(echo) as heard:
        world.ports[443] = heard.port
        one, others = await tunnel(egress), await tunnel(egress, TWO)
        egress.allow("api.example.com", "more.example.com")
        await one.send(b"still here")
        assert await one.reader.readexactly(10) == b"still here"
        egress.allow("*.example.com", deny=("api.example.com",))
        assert await one.rest() == b""
        # The neighbour's rules are its own.
        await others.send(b"still here")
        assert await others.reader.readexactly(10) == b"still here"
        async with client(egress.socket()) as again:
            assert (await again.connect("api.example.com:443"))[0] == 403
        one.writer.close()
        others.writer.close()
    assert [entry[3] for entry in egress.seen()] == ["denied", "revoked", "allowed"]


async def test_a_restarted_gateway_goes_on_with_the_rules_and_what_was_seen(
    start: Start, world: World
) -> None:
    world.names["api.example.com"] = [PUBLIC]
    first = await start()
    first.allow("api.example.com")
    async with serving(hello) as heard:
        world.ports[80] = heard.port
        async with client(first.socket()) as one:
            assert (await one.get("http://api.example.com/"))[0] == 200
        second = await start()
        async with client(second.socket()) as one:
            assert (await one.get("http://api.example.com/"))[0] == 200
        async with client(second.socket(TWO)) as one:
            assert (await one.get("http://api.example.com/"))[0] == 403
    assert second.seen() == [("api.example.com", 80, True, "allowed", 2)]


async def test_rules_that_cannot_be_read_are_none(start: Start, world: World) -> None:
    egress = await start()
    (egress.folder / ONE / "egress.json").write_text('{"allow": ["*"')
    world.names["api.example.com"] = [PUBLIC]
    egress = await start()
    async with client(egress.socket()) as one:
        assert (await one.get("http://api.example.com/"))[0] == 403


async def test_a_sandbox_that_is_gone_is_forgotten_and_a_new_one_found(egress: Running) -> None:
    import shutil

    third = "sbx_" + "c4" * 13
    (egress.folder / third / "host").mkdir(parents=True)
    await until(egress.socket(third).exists, "the new one's socket")
    shutil.rmtree(egress.folder / TWO)
    await until(lambda: TWO not in egress.host._found, "the old one is forgotten")


async def test_5_8_connections_and_entries_are_bounded(
    egress: Running, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(egress_module, "CONNECTIONS_A_SANDBOX", 5)
    eight = [await opened(egress.socket()) for _ in range(8)]
    await until(lambda: len(egress.state().connections) == 5, "five are served")
    ended = [one for one in eight if await ends_soon(one.reader)]
    assert len(ended) == 3
    for one in eight:
        one.writer.close()
    await until(lambda: not egress.state().connections, "all are gone")
    for number in range(510):
        egress.state().seen.note(f"h{number}.example.com", 443, is_allowed=False, reason="not_allowed")
    assert len(egress.seen()) == 500
    assert egress.seen()[0][0] == "h509.example.com"


async def ends_soon(reader: asyncio.StreamReader) -> bool:
    try:
        async with asyncio.timeout(0.3):
            return await reader.read(1) == b""
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True


def test_rules_are_taken_for_sandboxes_of_this_host_only(tmp_path: Path) -> None:
    host = EgressHost(tmp_path)
    for wrong in (ONE, "..", "sbx_../../x", ""):
        with pytest.raises(NoSuchSandbox):
            host.rules_set(wrong, {"allow": []})

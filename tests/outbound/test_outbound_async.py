"""SECURITY.md 6.3 to 6.6 for the way out on an event loop: the same promises as of the client that blocks."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpcore2
import pytest

from e2a.core import outbound_async
from e2a.core.addresses import IPAddress
from e2a.core.outbound import Timeouts, refused_address
from e2a.core.outbound_async import OutboundPool
from e2a.core.outbound_wire import BadAnswer
from tests.egress.conftest import Heard, hello, refusing_early, serving
from tests.outbound.servers import OTHER_PUBLIC, PUBLIC, Lookups, certificate, raw_server

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
HOST = "models.example.com"


@dataclass
class Dialled:
    """Notes every address and leads to a local port instead of the internet."""

    port: int
    addresses: list[str] = field(default_factory=list)

    async def __call__(
        self, address: IPAddress, port: int
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        self.addresses.append(str(address))
        if address.version == 6:
            raise ConnectionRefusedError("no IPv6 here")
        return await asyncio.open_connection("127.0.0.1", self.port)


async def got(
    pool: OutboundPool,
    host: str = HOST,
    *,
    scheme: str = "https",
    port: int = 443,
    target: str = "/v1",
    **more: Any,
) -> tuple[int, bytes]:
    """One exchange, whole."""
    async with asyncio.timeout(20):
        async with pool.stream(
            "POST",
            scheme=scheme,
            host=host,
            port=port,
            target=target,
            headers=more.pop("headers", []),
            **more,
        ) as answer:
            return answer.status, b"".join([chunk async for chunk in answer.chunks])


async def test_the_checked_address_is_dialled_and_tls_and_host_keep_the_name(tmp_path: Path) -> None:
    server_tls, client_tls = certificate(tmp_path, HOST)
    with raw_server(OK, tls=server_tls) as server:
        dial = Dialled(server.port)
        pool = OutboundPool(resolver=Lookups([[PUBLIC]]), dial=dial, ssl_context=client_tls)
        assert await got(pool) == (200, b"ok")
        pool.close()
    assert dial.addresses == [PUBLIC]
    assert server.server_names == [HOST]
    head = server.received[0].lower()
    assert b"host: models.example.com\r\n" in head
    assert b"accept-encoding: identity\r\n" in head


async def test_a_certificate_of_another_name_is_refused(tmp_path: Path) -> None:
    server_tls, client_tls = certificate(tmp_path, "other.example.com")
    with raw_server(OK, tls=server_tls) as server:
        pool = OutboundPool(resolver=Lookups([[PUBLIC]]), dial=Dialled(server.port), ssl_context=client_tls)
        with pytest.raises(httpcore2.ConnectError):
            await got(pool)
        assert server.received == []


async def test_a_host_that_speaks_no_tls_is_not_spoken_with(tmp_path: Path) -> None:
    with raw_server(b"220 mail\r\n") as server:
        context = ssl.create_default_context()
        pool = OutboundPool(resolver=Lookups([[PUBLIC]]), dial=Dialled(server.port), ssl_context=context)
        with pytest.raises(httpcore2.ConnectError):
            await got(pool, body=b"the secret")
        assert not any(b"the secret" in data for data in server.received)


@pytest.mark.parametrize(
    "answers",
    [
        [["127.0.0.1"]],
        [[PUBLIC, "127.0.0.1"]],
        [[PUBLIC, "::1"]],
        [["::ffff:127.0.0.1"]],
        [["169.254.169.254"]],
    ],
)
async def test_a_name_with_any_address_inside_is_not_dialled(answers: Sequence[Sequence[str]]) -> None:
    with raw_server(OK) as server:
        dial = Dialled(server.port)
        pool = OutboundPool(resolver=Lookups(answers), dial=dial)
        with pytest.raises(httpcore2.ConnectError) as refused:
            await got(pool)
        assert (dial.addresses, server.received) == ([], [])
        assert refused_address(refused.value)


async def test_a_rebinding_name_never_gets_inside_in_1000_tries(tmp_path: Path) -> None:
    """The name is public when it is checked and inside when it is asked again: it is not asked again."""
    server_tls, client_tls = certificate(tmp_path, HOST)
    closing = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok"

    async def refused(address: IPAddress, port: int) -> Any:
        dialled.append(str(address))
        raise ConnectionRefusedError

    dialled: list[str] = []
    lookups = Lookups([[PUBLIC], ["127.0.0.1"]] * 500)
    pool = OutboundPool(resolver=lookups, dial=refused, ssl_context=client_tls)
    for _ in range(1000):
        with pytest.raises(httpcore2.ConnectError):
            await got(pool)
    assert set(dialled) == {PUBLIC}
    assert len(dialled) == 500
    with raw_server(closing, tls=server_tls) as server:
        dial = Dialled(server.port)
        pool = OutboundPool(resolver=Lookups([[PUBLIC], ["10.0.0.1"]]), dial=dial, ssl_context=client_tls)
        assert (await got(pool))[0] == 200
        with pytest.raises(httpcore2.ConnectError):
            await got(pool)  # A new connection is checked anew.
        assert (dial.addresses, server.connections) == ([PUBLIC], 1)


async def test_the_next_address_is_tried_when_one_is_closed(tmp_path: Path) -> None:
    server_tls, client_tls = certificate(tmp_path, HOST)
    with raw_server(OK, tls=server_tls) as server:
        dial = Dialled(server.port)
        pool = OutboundPool(resolver=Lookups([[OTHER_PUBLIC, PUBLIC]]), dial=dial, ssl_context=client_tls)
        assert (await got(pool))[0] == 200
        assert dial.addresses == [OTHER_PUBLIC, PUBLIC]
        pool.close()


@pytest.mark.parametrize(
    ("scheme", "host", "port"),
    [
        ("http", HOST, 80), ("https", HOST, 8443), ("https", "127.0.0.1", 443), ("https", "localhost", 443),
        ("https", "a.10.0.0.1.nip.io", 443), ("https", "::1", 443), ("https", "2130706433", 443),
    ],
)  # fmt: skip
async def test_every_target_is_checked_by_its_form(scheme: str, host: str, port: int) -> None:
    dial = Dialled(9)
    pool = OutboundPool(resolver=Lookups([[PUBLIC]]), dial=dial)
    with pytest.raises(httpcore2.ConnectError):
        await got(pool, host, scheme=scheme, port=port)
    assert dial.addresses == []


async def test_another_port_only_where_whoever_calls_decided_on_it() -> None:
    dial = Dialled(9)
    pool = OutboundPool(resolver=Lookups([[PUBLIC]]), dial=dial, any_port=True)
    with pytest.raises(httpcore2.ConnectError):
        await got(pool, port=8443)
    assert dial.addresses == [PUBLIC]
    for host, scheme in (("10.0.0.1", "https"), (HOST, "http")):
        with pytest.raises(httpcore2.ConnectError):
            await got(pool, host, scheme=scheme, port=8443)
    assert dial.addresses == [PUBLIC]


async def test_what_the_operator_lists_may_be_private_and_plain_but_never_metadata() -> None:
    with raw_server(OK) as server:
        pool = OutboundPool(allow_private={f"127.0.0.1:{server.port}", "169.254.169.254"})
        assert await got(pool, "127.0.0.1", scheme="http", port=server.port) == (200, b"ok")
        with pytest.raises(httpcore2.ConnectError):
            await got(pool, "169.254.169.254", scheme="http", port=80)
        pool.close()


async def test_a_redirect_is_an_ordinary_answer() -> None:
    moved = b"HTTP/1.1 307 Moved\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n"
    with raw_server(moved) as server:
        pool = OutboundPool(allow_private={f"127.0.0.1:{server.port}"})
        assert (await got(pool, "127.0.0.1", scheme="http", port=server.port))[0] == 307
        pool.close()


@pytest.mark.parametrize(
    ("answer", "timeouts", "error"),
    [
        (b"", Timeouts(first_byte=0.1), httpcore2.ReadTimeout),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok", Timeouts(idle=0.1), httpcore2.ReadTimeout),
        (b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\n\r\n", Timeouts(), BadAnswer),
        (b"HTTP/1.1 200 OK\r\nx: " + b"a" * 40_000 + b"\r\n\r\n", Timeouts(), BadAnswer),
        (b"HTTP/1.1 200 OK\r\nx: " + b"a" * 90_000, Timeouts(), BadAnswer),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n", Timeouts(), BadAnswer),
        (b"HTTP/1.1 101 Go\r\nconnection: upgrade\r\nupgrade: other\r\n\r\n", Timeouts(), BadAnswer),
        (OK + OK, Timeouts(), BadAnswer),
        (b"220 mail.example.com ESMTP\r\n", Timeouts(), httpcore2.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nx: a\rb: c\r\n\r\n", Timeouts(), httpcore2.RemoteProtocolError),
        (
            b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\nok",
            Timeouts(),
            httpcore2.RemoteProtocolError,
        ),
        (
            b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok",
            Timeouts(),
            httpcore2.RemoteProtocolError,
        ),
        (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
            Timeouts(),
            httpcore2.RemoteProtocolError,
        ),
    ],
)
async def test_silence_and_what_is_no_answer_end_the_exchange(
    answer: bytes, timeouts: Timeouts, error: type[Exception]
) -> None:
    with raw_server(answer, keep_open=True) as server:
        pool = OutboundPool(allow_private={f"127.0.0.1:{server.port}"}, timeouts=timeouts)
        with pytest.raises(error):
            await got(pool, "127.0.0.1", scheme="http", port=server.port)
        pool.close()


async def test_a_resolver_that_does_not_answer_is_given_up() -> None:
    ends = asyncio.Event()
    loop = asyncio.get_running_loop()

    def silent(host: str, port: int) -> list[str]:
        asyncio.run_coroutine_threadsafe(ends.wait(), loop).result(20)
        return [PUBLIC]

    pool = OutboundPool(resolver=silent, dial=Dialled(9), timeouts=Timeouts(dns=0.1))
    with pytest.raises(httpcore2.ConnectError):
        await got(pool)
    ends.set()


async def test_a_kept_connection_that_hung_up_is_not_used_again() -> None:
    """The server closes after each answer without saying so; the second call must not be lost on the first's socket."""
    async with serving(hello) as server:
        pool = OutboundPool(allow_private={f"127.0.0.1:{server.port}"})
        for count in (1, 2, 3):
            assert (await got(pool, "127.0.0.1", scheme="http", port=server.port))[0] == 200
            async with asyncio.timeout(10):
                while not all(wire.is_readable() for wires in pool._idle.values() for wire in wires):
                    await asyncio.sleep(0.005)  # Until its end is here.
            assert server.connections == count
        pool.close()


@pytest.mark.parametrize(
    ("answer", "is_kept"),
    [
        (OK, True),
        (b"HTTP/1.1 103 Early\r\nlink: a\r\n\r\n" + OK, True),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-trailer: a\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok", False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", False),
    ],
)
async def test_a_connection_is_kept_for_the_next_call(answer: bytes, is_kept: bool) -> None:
    with raw_server(answer) as server:
        pool = OutboundPool(allow_private={f"127.0.0.1:{server.port}"})
        for _ in range(3):
            assert await got(pool, "127.0.0.1", scheme="http", port=server.port) == (200, b"ok")
            assert pool.idle == is_kept
        pool.close()
        assert pool.idle == 0


async def test_one_that_is_not_used_for_half_a_minute_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    with raw_server(OK) as server:
        pool = OutboundPool(allow_private={f"127.0.0.1:{server.port}"})
        await got(pool, "127.0.0.1", scheme="http", port=server.port)
        pool.sweep()
        assert pool.idle == 1
        monkeypatch.setattr(outbound_async, "IDLE_CONNECTION_SECONDS", 0.0)
        pool.sweep()
        assert pool.idle == 0


@pytest.mark.parametrize(("said", "is_whole"), [(b"", True), (b"content-length: 3\r\n", False)])
async def test_only_an_answer_without_a_length_ends_with_its_connection(said: bytes, is_whole: bool) -> None:
    async def until_closed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: Heard) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n" + said + b"\r\nok")
        writer.close()

    async with serving(until_closed) as server:
        pool = OutboundPool(allow_private={f"127.0.0.1:{server.port}"})
        if is_whole:
            assert await got(pool, "127.0.0.1", scheme="http", port=server.port) == (200, b"ok")
        else:
            with pytest.raises(httpcore2.RemoteProtocolError, match="middle"):
                await got(pool, "127.0.0.1", scheme="http", port=server.port)
        assert pool.idle == 0


async def test_the_answer_to_head_has_no_body() -> None:
    with raw_server(b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n", keep_open=True) as server:
        pool = OutboundPool(allow_private={f"127.0.0.1:{server.port}"})
        async with asyncio.timeout(5):
            async with pool.stream(
                "HEAD", scheme="http", host="127.0.0.1", port=server.port, target="/", headers=[]
            ) as answer:
                assert [chunk async for chunk in answer.chunks] == []
        assert pool.idle == 0


async def test_a_header_cannot_end_its_line_nor_a_target_the_request() -> None:
    with raw_server(OK) as server:
        pool = OutboundPool(allow_private={f"127.0.0.1:{server.port}"})
        for wrong in (
            {"headers": [(b"x-api-key", b"a\r\nhost: other")]}, {"headers": [(b"x\r\ny", b"a")]},
            {"target": "/ HTTP/1.1\r\nhost: other"}, {"target": ""},
        ):  # fmt: skip
            with pytest.raises(httpcore2.LocalProtocolError):
                await got(pool, "127.0.0.1", scheme="http", port=server.port, **wrong)
        assert server.received == []
        pool.close()


async def test_an_answer_that_comes_before_the_request_is_sent_is_heard() -> None:
    """The host refuses after the head, and closes over what is still coming: the connection is reset."""

    async def body() -> AsyncIterator[bytes]:
        yield b"x" * 1000
        await refused.wait()
        for _ in range(200):
            yield b"x" * 10_000
            await asyncio.sleep(0)

    refused = asyncio.Event()
    async with serving(refusing_early(refused)) as server:
        pool = OutboundPool(allow_private={f"127.0.0.1:{server.port}"})
        answer = await got(pool, "127.0.0.1", scheme="http", port=server.port, body=body(), length=2_001_000)
        assert answer == (413, b"no")


async def test_connections_that_are_kept_are_bounded_over_all_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound_async, "MOST_IDLE", 2)
    with raw_server(OK) as one, raw_server(OK) as two, raw_server(OK) as three:
        ports = (one.port, two.port, three.port)
        pool = OutboundPool(allow_private={f"127.0.0.1:{port}" for port in ports})
        for port in ports:
            assert await got(pool, "127.0.0.1", scheme="http", port=port) == (200, b"ok")
        assert pool.idle == 2
        pool.close()

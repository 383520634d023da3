"""Tunnels to servers inside: client, gateway and guest all real, over both kinds of gateway address."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2a.core.errors import GuestError, GuestUnreachable
from sandboxes.gateway.address import TcpAddress, UnixAddress
from sandboxes.guest_client import AsyncGuestClient, GuestClient
from tests.gateway.conftest import free_port
from tests.gateway.doubles import NODE_KEY, SANDBOX, gateway_in_thread, until
from tests.gateway.test_with_guest import RealGuest

MIB = 1024 * 1024


@pytest.fixture(params=["unix", "tcp"])
def real(request: pytest.FixtureRequest) -> Iterator[tuple[RealGuest, str]]:
    with tempfile.TemporaryDirectory(prefix="e2a-") as name:
        folder = Path(name)
        guest = RealGuest(folder)
        unix = UnixAddress(folder / "run" / "gateway.sock")
        try:
            address = unix if request.param == "unix" else TcpAddress("127.0.0.1", free_port())
            with gateway_in_thread(folder, address) as where:
                yield guest, where
        finally:
            guest.process.terminate()
            guest.process.wait(10)


@pytest.fixture
def client(real: tuple[RealGuest, str]) -> AsyncGuestClient:
    return AsyncGuestClient(SANDBOX, real[1], NODE_KEY)


@pytest.fixture
def stats(real: tuple[RealGuest, str]) -> GuestClient:
    return GuestClient(SANDBOX, real[1], NODE_KEY)


@contextlib.contextmanager
def served(behave: Callable[[socket.socket], None], *, family: int = socket.AF_INET) -> Iterator[int]:
    """A server on a loopback port, a thread a connection."""
    host = "::1" if family == socket.AF_INET6 else "127.0.0.1"
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.bind((host, 0))
        listener.listen(200)

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=behave, args=(connection,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield int(listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)


def echo(connection: socket.socket) -> None:
    """What comes goes back, until the end, which goes back too."""
    with connection, contextlib.suppress(OSError):
        while piece := connection.recv(65536):
            connection.sendall(piece)


def test_bytes_go_both_ways_and_the_end_of_one_way_leaves_the_other(client: AsyncGuestClient) -> None:
    sent = bytes(range(256)) * (4 * MIB // 256)

    async def talk() -> bytes:
        reader, writer = await client.tunnel(port)

        async def send() -> None:
            for start in range(0, len(sent), 100_000):
                writer.write(sent[start : start + 100_000])
                await writer.drain()
            writer.write_eof()

        sending = asyncio.create_task(send())
        back = await reader.read(-1)
        await sending
        writer.close()
        return back

    with served(echo) as port:
        assert asyncio.run(talk()) == sent


def test_a_server_that_ends_first_is_still_sent_the_rest(client: AsyncGuestClient) -> None:
    received: list[bytes] = []
    done = threading.Event()

    def behave(connection: socket.socket) -> None:
        with connection:
            connection.sendall(b"bye")
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65536):
                received.append(piece)
        done.set()

    async def talk() -> None:
        reader, writer = await client.tunnel(port)
        assert await reader.read(-1) == b"bye"
        writer.write(b"x" * MIB)
        await writer.drain()
        writer.write_eof()
        assert await asyncio.to_thread(done.wait, 30)
        writer.close()

    with served(behave) as port:
        asyncio.run(talk())
    assert b"".join(received) == b"x" * MIB


def test_what_a_server_says_before_it_refuses_the_rest_arrives(client: AsyncGuestClient) -> None:
    """It closes with much unread, which resets the connection: its answer is not lost, and writing goes on unharmed."""

    def refuse(connection: socket.socket) -> None:
        with connection:
            connection.recv(1)
            connection.sendall(b"refused")

    async def once(port: int, pause: float) -> bytes:
        reader, writer = await client.tunnel(port)
        try:
            for _ in range(24):
                writer.write(b"x" * (MIB // 8))
                await writer.drain()
                await asyncio.sleep(pause)  # The reset meets the upload in another place each time.
            async with asyncio.timeout(10):
                return await reader.read()
        finally:
            writer.transport.abort()

    async def scenario() -> None:
        with served(refuse) as port:
            for attempt in range(40):
                assert await once(port, attempt % 4 * 0.001) == b"refused", attempt

    asyncio.run(scenario())


def test_a_server_on_ipv6_only_is_found(client: AsyncGuestClient) -> None:
    async def talk() -> bytes:
        reader, writer = await client.tunnel(port)
        writer.write(b"six")
        writer.write_eof()
        answer = await reader.read(-1)
        writer.close()
        return answer

    with served(echo, family=socket.AF_INET6) as port:
        assert asyncio.run(talk()) == b"six"


def test_where_nothing_listens_the_answer_says_so(client: AsyncGuestClient) -> None:
    port = free_port()
    with pytest.raises(GuestError, match=f"nothing listens on port {port} of the sandbox") as refused:
        asyncio.run(client.tunnel(port))
    assert (refused.value.code, refused.value.guest_status) == ("port_closed", 409)


@pytest.mark.parametrize("port", [0, 65536])
def test_what_is_no_port_is_refused(client: AsyncGuestClient, port: int) -> None:
    with pytest.raises(GuestError) as refused:
        asyncio.run(client.tunnel(port))
    assert refused.value.code == "bad_port"


def test_a_server_hears_that_its_client_is_gone(client: AsyncGuestClient) -> None:
    gone = threading.Event()

    def behave(connection: socket.socket) -> None:
        with connection:
            connection.sendall(b"hello")
            while connection.recv(1000):
                pass
        gone.set()

    async def talk() -> None:
        reader, writer = await client.tunnel(port)
        assert await reader.readexactly(5) == b"hello"
        writer.transport.abort()
        assert await asyncio.to_thread(gone.wait, 30), "the server still has a connection"

    with served(behave) as port:
        asyncio.run(talk())


def test_what_moves_counts_and_an_open_tunnel_that_is_silent_does_not(
    client: AsyncGuestClient, stats: GuestClient
) -> None:
    async def talk() -> None:
        reader, writer = await client.tunnel(port)
        writer.write(b"x" * 1000)
        assert await reader.readexactly(1000) == b"x" * 1000
        until(lambda: stats.stats().bytes_in >= 1000 and stats.stats().bytes_out >= 1000, "counted")
        until(lambda: stats.stats().last_activity_seconds > 0.2, "idle again")
        writer.close()

    with served(echo) as port:
        asyncio.run(talk())


def test_there_is_a_limit_and_an_end_makes_room(client: AsyncGuestClient) -> None:
    async def talk() -> None:
        opened = [await client.tunnel(port) for _ in range(128)]
        with pytest.raises(GuestError) as refused:
            await client.tunnel(port)
        assert (refused.value.code, refused.value.guest_status) == ("busy", 503)
        for reader, writer in opened:
            writer.write(b"still here")
            assert await reader.readexactly(10) == b"still here"
        opened[0][1].transport.abort()
        async with asyncio.timeout(30):
            while True:
                try:
                    reader, writer = await client.tunnel(port)
                    break
                except GuestError:
                    await asyncio.sleep(0.05)
        for _, each in [*opened[1:], (reader, writer)]:
            each.transport.abort()

    with served(echo) as port:
        asyncio.run(talk())


def test_a_reader_that_does_not_read_stops_its_server_and_nobody_elses(
    real: tuple[RealGuest, str], client: AsyncGuestClient
) -> None:
    sent = 0

    def flood(connection: socket.socket) -> None:
        nonlocal sent
        with connection, contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
            while True:
                sent += connection.send(b"x" * 65536)

    async def talk() -> None:
        slow, slow_writer = await client.tunnel(port)
        async with asyncio.timeout(30):
            before = -1
            while before != sent or not sent:
                before = sent
                await asyncio.sleep(0.3)  # A flood is over when nothing more goes in for a while.
        assert sent < 16 * MIB, "it is held somewhere"
        reader, writer = await client.tunnel(other)
        writer.write(b"quick")
        assert await asyncio.wait_for(reader.readexactly(5), 30) == b"quick"
        assert len(await slow.readexactly(MIB)) == MIB
        for each in (writer, slow_writer):
            each.transport.abort()

    with served(flood) as port, served(echo) as other:
        asyncio.run(talk())


def test_code_inside_that_kills_the_carrier_ends_tunnels_and_the_next_one_works(
    real: tuple[RealGuest, str], client: AsyncGuestClient
) -> None:
    def carriers() -> list[int]:
        listed = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(real[0].process.pid)], capture_output=True, text=True
        )
        return [int(pid) for pid in listed.stdout.split()]

    async def talk() -> None:
        reader, writer = await client.tunnel(port)
        writer.write(b"one")
        assert await reader.readexactly(3) == b"one"
        for pid in carriers():
            subprocess.run(["kill", "-9", str(pid)], check=True)
        assert await asyncio.wait_for(reader.read(10), 30) == b""
        writer.close()
        reader, writer = await client.tunnel(port)
        writer.write(b"two")
        assert await reader.readexactly(3) == b"two"
        writer.close()

    with served(echo) as port:
        asyncio.run(talk())


def test_a_gone_guest_is_unreachable(real: tuple[RealGuest, str], client: AsyncGuestClient) -> None:
    real[0].process.terminate()
    real[0].process.wait(10)
    with pytest.raises(GuestUnreachable):
        asyncio.run(client.tunnel(80))

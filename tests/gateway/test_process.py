"""`manage.py gateway` as a process: its memory, its end, its heirs."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandboxes.guest_client import Exit, GuestClient, Output
from tests.gateway.doubles import (
    NODE_KEY,
    SANDBOX,
    BareClient,
    FakeGuest,
    GatewayProcess,
    GuestSocket,
    Script,
    answered,
    exit_frame,
    frame,
    signed_request,
    until,
    until_still,
)

MakeGuest = Callable[[Script], FakeGuest]
GIB = 1024**3


@pytest.fixture
def running(gateway_process: Callable[[], GatewayProcess]) -> Iterator[GatewayProcess]:
    process = gateway_process()
    process.wait_ready()
    yield process


def test_a_gib_for_a_slow_reader_is_not_kept_in_memory(running: GatewayProcess, guest: MakeGuest) -> None:
    piece = b"x" * 262_144

    def script(one: GuestSocket) -> None:
        one.read_head()
        one.answer_stream()
        for at in range(0, GIB, len(piece)):
            one.send(frame(1, at, piece))
        one.send(exit_frame(GIB))

    one = guest(script)
    client = GuestClient(SANDBOX, running.address, NODE_KEY)
    assert client is not None
    before = running.rss_kib()
    with client.process_follow("p1") as stream:
        sent = until_still(lambda: one.connections[0].sent)
        assert 0 < sent < 2 * 1024 * 1024
        size, most, exits = 0, before, 0
        for number, found in enumerate(stream):
            if isinstance(found, Output):
                assert found.offset == size
                size += len(found.data)
            exits += isinstance(found, Exit)
            if number % 200 == 0:
                most = max(most, running.rss_kib())
    assert (size, exits) == (GIB, 1)
    assert most - before < 4 * 1024


def test_500_slow_readers_cost_bounded_memory(running: GatewayProcess, guest: MakeGuest) -> None:
    def script(one: GuestSocket) -> None:
        one.read_head()
        one.answer_stream()
        while True:
            one.send(b"x" * 65536)

    one = guest(script)
    before = running.rss_kib()
    clients = [BareClient(running.address).send(signed_request()) for _ in range(500)]
    until_still(lambda: sum(each.sent for each in one.connections))
    assert len(one.connections) == 500
    # At most 64 KiB waiting and one read of 64 KiB each, and what objects cost.
    assert running.rss_kib() - before < 500 * 160
    for client in clients:
        client.raw.close()
    until(lambda: one.finished == 500, "the end of all connections")


def test_sigterm_ends_it_cleanly(running: GatewayProcess, guest: MakeGuest, data_dir: Path) -> None:
    def script(one: GuestSocket) -> None:
        one.read_head()
        one.answer_stream(b"x")
        one.read_to_end()

    one = guest(script)
    with BareClient(running.address) as client:
        client.send(signed_request())
        until(lambda: one.connections and one.connections[0].sent, "the stream")
        assert running.terminate() == 0
        assert client.read_all().endswith(b"x")
    until(lambda: one.finished, "the end of the guest's connection")
    assert not (data_dir / "run" / "gateway.sock").exists()


def test_a_killed_gateway_has_an_heir(
    running: GatewayProcess, gateway_process: Callable[[], GatewayProcess], guest: MakeGuest, data_dir: Path
) -> None:
    guest(answered(200, {"guest": "1", "configured": True, "uptime_ms": 1, "processes": 0}))
    running.kill()
    assert (data_dir / "run" / "gateway.sock").exists()
    heir = gateway_process()
    heir.wait_ready()
    assert GuestClient(SANDBOX, heir.address, NODE_KEY).health().guest == "1"


def test_a_second_gateway_says_that_there_is_one(
    running: GatewayProcess, gateway_process: Callable[[], GatewayProcess]
) -> None:
    second = gateway_process()
    _, errors = second.process.communicate(timeout=30)
    assert second.process.returncode == 1
    assert "another gateway serves unix:" in errors
    with socket.socket(socket.AF_UNIX), BareClient(running.address) as client:
        assert client.send(signed_request(signed=False)).answer()[0] == 401

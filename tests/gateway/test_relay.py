"""What the gateway lets through, what it answers itself, and how connections end."""

from __future__ import annotations

import logging
import os
import select
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sandboxes.gateway import relay, server
from sandboxes.gateway.address import TcpAddress, UnixAddress, address_parse
from sandboxes.gateway.listening import AddressTaken
from tests.gateway.doubles import (
    LIMIT_SECONDS,
    NODE_KEY,
    SANDBOX,
    BareClient,
    FakeGuest,
    GuestSocket,
    Script,
    answered,
    gateway_in_thread,
    signed_request,
    until,
)

MakeGuest = Callable[[Script], FakeGuest]

# -- what goes through


def test_a_request_and_its_answer_pass_unchanged(gateway: str, guest: MakeGuest) -> None:
    answer = b"HTTP/1.1 207 Odd\r\nX-Own: \xe9\r\nconnection: close\r\n\r\n" + bytes(range(256))
    heard: list[bytes] = []

    def script(one: GuestSocket) -> None:
        heard.extend((one.read_head(), one.read_body()))
        one.send(answer)

    guest(script)
    with BareClient(gateway) as client:
        client.send(signed_request("PUT", "/files?path=a%2Fb", body=b"\0\r\n\xff"))
        assert client.read_all() == answer
    assert heard == [
        b"PUT /files?path=a%2Fb HTTP/1.1\r\nhost: guest\r\nconnection: close\r\ncontent-length: 4\r\n\r\n",
        b"\0\r\n\xff",
    ]


def test_a_head_that_comes_byte_by_byte_is_a_head(gateway: str, guest: MakeGuest) -> None:
    guest(answered(200, {"guest": "1"}))
    with BareClient(gateway) as client:
        for byte in signed_request():
            client.send(bytes((byte,)))
        assert client.answer() == (200, {"guest": "1"})


def test_curl_may_wait_for_a_100_before_it_sends(gateway: str, guest: MakeGuest) -> None:
    guest(answered(200, {"size": 3}))
    with BareClient(gateway) as client:
        client.send(signed_request("PUT", "/files", length=3, extra="Expect: 100-continue\r\n"))
        assert client.raw.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(b"abc")
        assert client.answer() == (200, {"size": 3})


def test_tcp_carries_the_same(tcp_gateway: str, guest: MakeGuest) -> None:
    guest(answered(200, {"guest": "1"}))
    with BareClient(tcp_gateway) as client:
        assert client.send(signed_request()).answer() == (200, {"guest": "1"})


def test_500_streams_run_at_once(gateway: str, guest: MakeGuest) -> None:
    def script(one: GuestSocket) -> None:
        one.read_head()
        one.answer_stream(b"first")
        one.send(b"last" if one.raw.recv(1) == b"" else b"?")

    guest(script)
    clients = [BareClient(gateway).send(signed_request()) for _ in range(500)]
    for client in clients:
        assert client.raw.recv(65536)
    with BareClient(gateway) as healthy:
        assert healthy.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").answer() == (
            200,
            {"gateway": "1", "connections": 501, "relayed": 500},
        )
    for client in clients:
        client.raw.shutdown(socket.SHUT_WR)
        assert client.read_all().endswith(b"last")
        client.raw.close()


# -- what does not


def test_health_needs_no_signature_and_says_little(gateway: str) -> None:
    with BareClient(gateway) as client:
        client.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.answer() == (200, {"gateway": "1", "connections": 1, "relayed": 0})


def test_an_unsigned_request_is_refused_whether_the_sandbox_is_there_or_not(
    gateway: str, guest: MakeGuest
) -> None:
    one = guest(answered(200, {}))
    answers = []
    for sandbox in (SANDBOX, "sbx_" + "b" * 26, "nonsense"):
        for options in ({"signed": False}, {"key": b"j" * 32}):
            with BareClient(gateway) as client:
                answers.append(client.send(signed_request(sandbox=sandbox, **options)).read_all())
    assert len(set(answers)) == 1
    assert answers[0].startswith(b"HTTP/1.1 401 ")
    assert one.connections == []


def test_the_same_request_twice_is_refused(gateway: str, guest: MakeGuest) -> None:
    one = guest(answered(200, {}))
    same = signed_request("DELETE", "/processes/p1")
    with BareClient(gateway) as client:
        assert client.send(same).answer()[0] == 200
    with BareClient(gateway) as client:
        assert client.send(same).answer()[0] == 401
    assert len(one.connections) == 1


def test_a_missing_sandbox_and_a_missing_guest_are_told_apart(gateway: str) -> None:
    with BareClient(gateway) as client:
        status, problem = client.send(signed_request(sandbox="sbx_" + "b" * 26)).answer()
        assert (status, problem["code"]) == (404, "no_such_sandbox")
    with BareClient(gateway) as client:
        status, problem = client.send(signed_request()).answer()
        assert (status, problem["code"]) == (502, "guest_unreachable")
        assert SANDBOX in problem["detail"]


def test_a_planted_link_gives_no_connection_and_a_line_in_the_log(
    gateway: str, guest_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as docker:
        docker.bind(str(tmp_path / "d"))
        docker.listen()
        docker.setblocking(False)
        (guest_folder / "guest.sock").symlink_to(tmp_path / "d")
        with caplog.at_level(logging.ERROR), BareClient(gateway) as client:
            assert client.send(signed_request()).answer()[0] == 502
        with pytest.raises(BlockingIOError):
            docker.accept()
    assert f"sandbox {SANDBOX}: refused to connect" in caplog.text


def test_a_guest_that_closes_without_an_answer_is_unreachable(gateway: str, guest: MakeGuest) -> None:
    guest(lambda one: one.read_head())
    with BareClient(gateway) as client:
        status, problem = client.send(signed_request()).answer()
    assert (status, problem["code"]) == (502, "guest_unreachable")


def test_bytes_after_the_request_never_reach_the_guest(gateway: str, guest: MakeGuest) -> None:
    heard: list[bytes] = []

    def script(one: GuestSocket) -> None:
        one.read_head()
        one.send(b"HTTP/1.1 200 OK\r\n\r\n")
        heard.append(one.read_to_end())

    one = guest(script)
    with BareClient(gateway) as client:
        client.send(signed_request())
        assert client.raw.recv(19)
        client.send(b"GET /stats HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: one.finished, "the end of the guest's connection")
    assert heard == [b""]


def test_a_client_that_sends_no_head_is_let_go(gateway: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "HEAD_SECONDS", 0.1)
    with BareClient(gateway) as client:
        client.send(b"GET /hea")
        status, problem = client.answer()
    assert (status, problem["code"]) == (408, "head_late")


def test_a_connection_on_which_nothing_moves_is_cut(
    gateway: str, guest: MakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "IDLE_SECONDS", 0.1)
    one = guest(lambda one: one.read_head() + one.read_to_end())
    with BareClient(gateway) as client:
        assert client.send(signed_request()).raw.recv(1) == b""
    until(lambda: one.finished, "the end of the guest's connection")


def test_more_connections_than_the_limit_are_told_so(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "LARGEST_CONNECTIONS", 2)
    address = UnixAddress(data_dir / "run" / "gateway.sock")
    with gateway_in_thread(data_dir, address) as name, BareClient(name) as first, BareClient(name):
        with BareClient(name) as third:
            status, problem = third.answer()
            assert (status, problem["code"]) == (503, "too_many_connections")
        first.raw.close()

        def healthy() -> bool:
            with BareClient(name) as again:
                return again.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").answer()[0] == 200

        assert until(healthy, "a free place")


def test_a_guest_whose_queue_is_full_is_waited_for(gateway: str, guest_folder: Path) -> None:
    one = FakeGuest(guest_folder / "guest.sock", answered(200, {"guest": "1"}), backlog=0)
    try:
        clients = [BareClient(gateway).send(signed_request()) for _ in range(50)]
        for client in clients:
            assert client.answer() == (200, {"guest": "1"})
            client.raw.close()
    finally:
        one.close()


# -- how connections end


@pytest.mark.parametrize("way", ["gateway", "tcp_gateway"])
def test_a_client_that_goes_away_takes_the_guest_s_connection_with_it(
    way: str, guest: MakeGuest, request: pytest.FixtureRequest
) -> None:
    def script(one: GuestSocket) -> None:
        one.read_head()
        one.answer_stream()
        assert one.raw.recv(1) == b""

    one = guest(script)

    with BareClient(request.getfixturevalue(way)) as client:
        client.send(signed_request())
        assert client.raw.recv(65536)
    until(lambda: one.finished, "the end of the guest's connection", 2)


def test_a_client_that_goes_away_while_it_is_not_reading_takes_it_too(gateway: str, guest: MakeGuest) -> None:
    def script(one: GuestSocket) -> None:
        one.read_head()
        one.answer_stream()
        while True:
            one.send(b"x" * 65536)

    one = guest(script)
    with BareClient(gateway) as client:
        client.send(signed_request())
        until(lambda: one.connections and one.connections[0].sent > 200_000, "a full pipe")
    until(lambda: one.finished, "the end of the guest's connection", 2)


def test_over_tcp_the_end_of_sending_is_a_close(tcp_gateway: str, guest: MakeGuest) -> None:
    def script(one: GuestSocket) -> None:
        one.read_head()
        one.answer_stream()
        one.raw.setblocking(True)
        poll = select.poll()
        poll.register(one.raw, 0)  # Hang-up only, as our guest looks for it.
        assert poll.poll(LIMIT_SECONDS * 1000)[0][1] & select.POLLHUP

    one = guest(script)
    with BareClient(tcp_gateway) as client:
        client.send(signed_request())
        assert client.raw.recv(65536)
        client.raw.shutdown(socket.SHUT_WR)
        until(lambda: one.finished, "the end of the guest's connection", 2)


def test_half_a_close_ends_only_that_half(gateway: str, guest: MakeGuest) -> None:
    def script(one: GuestSocket) -> None:
        one.read_head()
        assert one.read_to_end() == b"abc"
        one.answer_stream(b"heard")

    guest(script)
    with BareClient(gateway) as client:
        client.send(signed_request("PUT", "/files", body=b"abc"))
        client.raw.shutdown(socket.SHUT_WR)
        assert client.read_all().endswith(b"heard")


@pytest.mark.parametrize("chunked", [False, True])
def test_an_upload_that_breaks_off_is_not_made_whole(chunked: bool, gateway: str, guest: MakeGuest) -> None:
    heard: list[bytes] = []

    def script(one: GuestSocket) -> None:
        one.read_head()
        heard.append(one.read_to_end())

    one = guest(script)
    with BareClient(gateway) as client:
        head = signed_request("PUT", "/files", chunked=chunked, length=9)
        client.send(head + (b"3\r\nabc\r\n" if chunked else b"abc"))
        until(lambda: one.connections, "the guest's connection")
    until(lambda: one.finished, "the end of the guest's connection")
    assert heard[0] in ((b"", b"3\r\nabc\r\n") if chunked else (b"", b"abc"))


@pytest.mark.parametrize("way", ["gateway", "tcp_gateway"])
def test_a_refusal_in_the_middle_of_an_upload_arrives(
    way: str, guest: MakeGuest, request: pytest.FixtureRequest
) -> None:

    def script(one: GuestSocket) -> None:
        one.read_head()
        one.raw.recv(1000)
        one.answer(507, {"code": "no_space"})

    guest(script)
    size = 8 * 1024 * 1024
    with BareClient(request.getfixturevalue(way)) as client:
        client.send(signed_request("PUT", "/files", length=size))
        client.send(bytes(size))
        assert client.answer() == (507, {"code": "no_space"})


def test_a_slow_guest_holds_back_an_upload(gateway: str, guest: MakeGuest) -> None:
    go = threading.Event()

    def script(one: GuestSocket) -> None:
        one.read_head()
        assert go.wait(LIMIT_SECONDS)
        one.answer(200, {"size": len(one.read_body())})

    one = guest(script)
    size = 8 * 1024 * 1024
    with BareClient(gateway) as client:
        client.send(signed_request("PUT", "/files", length=size))
        until(lambda: one.connections, "the guest's connection")
        client.raw.setblocking(False)
        sent = 0
        while select.select([], [client.raw], [], 0.3)[1]:  # Until it has taken nothing for 0.3 s.
            sent += client.raw.send(bytes(min(65536, size - sent)))
        assert sent < 2 * 1024 * 1024
        go.set()
        client.raw.settimeout(LIMIT_SECONDS)
        client.send(bytes(size - sent))
        assert client.answer() == (200, {"size": size})


# -- addresses


def test_the_socket_is_ours_alone_and_goes_with_the_gateway(data_dir: Path) -> None:
    path = data_dir / "run" / "gateway.sock"
    with gateway_in_thread(data_dir, UnixAddress(path)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.stat().st_uid == os.geteuid()
        assert sorted(os.listdir(path.parent)) == ["gateway.sock", "gateway.sock.lock"]
    assert not path.exists()


def test_a_long_path_is_served_and_reached(tmp_path: Path, data_dir: Path) -> None:
    path = tmp_path / ("d" * 200) / "gateway.sock"
    with gateway_in_thread(data_dir, UnixAddress(path)) as name, BareClient(name) as client:
        assert client.send(signed_request(signed=False)).answer()[0] == 401


def test_one_gateway_an_address(gateway: str, data_dir: Path) -> None:
    address = address_parse(gateway)
    assert isinstance(address, UnixAddress)
    from sandboxes.gateway.listening import listening_socket

    with pytest.raises(AddressTaken, match="another gateway serves"), listening_socket(address):
        pass
    with BareClient(gateway) as client:
        assert client.send(signed_request(signed=False)).answer()[0] == 401


@pytest.mark.parametrize(
    "text",
    [
        "",
        "unix:",
        "unix:relative",
        "tcp:",
        "tcp:host",
        "tcp::1",
        "tcp:h:x",
        "tcp:h:65536",
        "udp:h:1",
        "/path",
    ],
)
def test_nonsense_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="is neither"):
        address_parse(text)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/a b/c.sock", UnixAddress(Path("/a b/c.sock"))),
        ("tcp:node-1:8700", TcpAddress("node-1", 8700)),
        ("tcp:[::1]:8700", TcpAddress("::1", 8700)),
    ],
)
def test_an_address_reads_back_as_it_is_written(text: str, address: UnixAddress | TcpAddress) -> None:
    assert address_parse(text) == address
    assert str(address) == text


def test_the_key_must_be_long() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        server.Gateway(data_dir=Path("/nowhere"), node_key=NODE_KEY[:31], address=TcpAddress("127.0.0.1", 0))

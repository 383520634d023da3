"""SECURITY.md 6.3 to 6.6: the client dials what it checked, follows nothing, ends in time, tells nothing."""

from __future__ import annotations

import gzip
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import httpx2
import pytest

from e2a.core.outbound import Timeouts, outbound_client, refused_address
from tests.outbound.servers import OTHER_PUBLIC, PUBLIC, Dialled, Lookups, certificate, raw_server

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
HOST = "models.example.com"


def test_the_checked_address_is_dialled_and_tls_and_host_keep_the_name(tmp_path: Path) -> None:
    server_tls, client_tls = certificate(tmp_path, HOST)
    with raw_server(OK, tls=server_tls) as server:
        dial = Dialled(server.port)
        with outbound_client(resolver=Lookups([[PUBLIC]]), dial=dial, ssl_context=client_tls) as client:
            assert client.get(f"https://{HOST}/v1").text == "ok"
    assert dial.addresses == [PUBLIC]
    assert server.server_names == [HOST]
    assert b"host: models.example.com\r\n" in server.received[0].lower()


def test_a_certificate_of_another_name_is_refused(tmp_path: Path) -> None:
    server_tls, client_tls = certificate(tmp_path, "other.example.com")
    with (
        raw_server(OK, tls=server_tls) as server,
        outbound_client(
            resolver=Lookups([[PUBLIC]]), dial=Dialled(server.port), ssl_context=client_tls
        ) as client,
        pytest.raises(httpx2.ConnectError),
    ):
        client.get(f"https://{HOST}/v1")
    assert server.received == []


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
def test_a_name_with_any_address_inside_is_not_dialled(answers: Sequence[Sequence[str]]) -> None:
    with raw_server(OK) as server:
        dial = Dialled(server.port)
        with outbound_client(resolver=Lookups(answers), dial=dial) as client:
            with pytest.raises(httpx2.ConnectError) as refused:
                client.get(f"https://{HOST}/")
            assert refused_address(refused.value)
        assert dial.addresses == []
        assert server.connections == 0


def test_a_rebinding_name_never_gets_inside_in_1000_tries(tmp_path: Path) -> None:
    """6.4: public at one look-up, loopback at the next; each connect dials what it checked."""

    class Rebinding:
        asked = 0

        def __call__(self, host: str, port: int) -> list[str]:
            self.asked += 1
            return [PUBLIC] if self.asked % 2 else ["127.0.0.1"]

    dialled: list[str] = []

    def dial(sock: socket.socket, address: object, port: int) -> None:
        dialled.append(str(address))
        raise ConnectionRefusedError

    resolver = Rebinding()
    with outbound_client(resolver=resolver, dial=dial) as client:
        for _ in range(1000):
            with pytest.raises(httpx2.ConnectError):
                client.get(f"https://{HOST}/")
    assert resolver.asked == 1000
    assert dialled == [PUBLIC] * 500


def test_a_new_connection_is_checked_anew_after_keep_alive(tmp_path: Path) -> None:
    server_tls, client_tls = certificate(tmp_path, HOST)
    with raw_server(OK, tls=server_tls) as server:
        lookups = Lookups([[PUBLIC], ["127.0.0.1"]])
        dial = Dialled(server.port)
        with outbound_client(resolver=lookups, dial=dial, ssl_context=client_tls) as client:
            assert client.get(f"https://{HOST}/1").text == "ok"
            assert client.get(f"https://{HOST}/2").text == "ok"
            assert lookups.asked == [HOST]
            assert client.get(f"https://{HOST}/3", headers={"connection": "close"}).text == "ok"
            with pytest.raises(httpx2.ConnectError):
                client.get(f"https://{HOST}/4")
    assert dial.addresses == [PUBLIC]


def test_the_next_address_is_tried_when_one_is_closed(tmp_path: Path) -> None:
    server_tls, client_tls = certificate(tmp_path, HOST)
    with raw_server(OK, tls=server_tls) as server:
        dial = Dialled(server.port)
        both = Lookups([[OTHER_PUBLIC, PUBLIC]])
        with outbound_client(resolver=both, dial=dial, ssl_context=client_tls) as client:
            assert client.get(f"https://{HOST}/").text == "ok"
    assert dial.addresses == [OTHER_PUBLIC, PUBLIC]


@pytest.mark.parametrize(
    "url",
    [
        "http://models.example.com/",
        "https://models.example.com:8443/",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://2130706433/",
        "https://localhost/",
        "https://metadata.google.internal/",
    ],
)
def test_every_request_is_checked_not_only_the_base_url(url: str) -> None:
    dial = Dialled(1)
    with outbound_client(resolver=Lookups([[PUBLIC]]), dial=dial) as client:
        with pytest.raises(httpx2.ConnectError) as refused:
            client.get(url)
        assert refused_address(refused.value)
    assert dial.addresses == []


def test_refused_closed_and_unknown_hosts_look_the_same() -> None:
    """6.6: nobody can scan our network by the texts of errors."""

    def closed(sock: socket.socket, address: object, port: int) -> None:
        raise ConnectionRefusedError

    def unknown(host: str, port: int) -> list[str]:
        raise socket.gaierror(-2, "Name or service not known")

    texts = set()
    for resolver in (Lookups([["10.0.0.1"]]), Lookups([[PUBLIC]]), unknown):
        with outbound_client(resolver=resolver, dial=closed) as client:
            with pytest.raises(httpx2.ConnectError) as error:
                client.get(f"https://{HOST}/")
            texts.add((type(error.value), str(error.value)))
    assert len(texts) == 1


@pytest.mark.parametrize("ask", [False, True])
def test_a_redirect_is_an_ordinary_answer(ask: bool) -> None:
    with raw_server(OK) as inside:
        moved = (
            f"HTTP/1.1 307 Moved\r\nlocation: http://127.0.0.1:{inside.port}/\r\ncontent-length: 0\r\n\r\n"
        )
        with raw_server(moved.encode()) as server:
            allowed = frozenset({f"127.0.0.1:{server.port}", f"127.0.0.1:{inside.port}"})
            with outbound_client(allow_private=allowed) as client:
                answer = client.get(f"http://127.0.0.1:{server.port}/", follow_redirects=ask)
                assert answer.status_code == 307
        assert inside.connections == 0


def test_proxies_netrc_and_cookies_are_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """6.5"""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login alice password planted\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    cookie = b"HTTP/1.1 200 OK\r\nset-cookie: a=planted\r\ncontent-length: 2\r\n\r\nok"
    with raw_server(cookie) as server, raw_server(OK) as proxy:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        with outbound_client(allow_private=frozenset({"127.0.0.1"})) as client:
            for _ in range(2):
                client.get(f"http://127.0.0.1:{server.port}/")
        assert proxy.connections == 0
    sent = b"".join(server.received).lower()
    assert sent.count(b"get / http/1.1") == 2
    assert b"authorization" not in sent
    assert b"planted" not in sent


def test_a_compressed_answer_is_refused_and_not_asked_for() -> None:
    body = gzip.compress(b"0" * 10_000_000)
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(body)
    with (
        raw_server(head + body) as server,
        outbound_client(allow_private=frozenset({"127.0.0.1"})) as client,
        pytest.raises(httpx2.RemoteProtocolError),
    ):
        client.get(f"http://127.0.0.1:{server.port}/", headers={"accept-encoding": "gzip, br"})
    assert b"accept-encoding: identity\r\n" in server.received[0].lower()


def test_an_endless_answer_is_cut_and_a_huge_header_refused() -> None:
    long = b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\n" + b"x" * 5000
    wide = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx-a: " + b"x" * 40_000 + b"\r\n\r\n"
    for answer, limit in ((long, 4999), (wide, 100_000)):
        with (
            raw_server(answer) as server,
            outbound_client(allow_private={"127.0.0.1"}, max_response_bytes=limit) as client,
            pytest.raises(httpx2.RemoteProtocolError),
        ):
            client.get(f"http://127.0.0.1:{server.port}/")


@pytest.mark.parametrize(
    ("answer", "timeouts"),
    [
        (b"", Timeouts(first_byte=0.2, idle=30)),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok", Timeouts(first_byte=30, idle=0.2)),
    ],
)
def test_silence_ends_by_the_limit_that_applies(answer: bytes, timeouts: Timeouts) -> None:
    with (
        raw_server(answer, keep_open=True) as server,
        outbound_client(allow_private={"127.0.0.1"}, timeouts=timeouts) as client,
    ):
        began = time.monotonic()
        with pytest.raises(httpx2.ReadTimeout):
            client.get(f"http://127.0.0.1:{server.port}/")
        assert time.monotonic() - began < 5


def test_a_resolver_that_does_not_answer_is_given_up() -> None:
    never = threading.Event()

    def stuck(host: str, port: int) -> list[str]:
        never.wait(20)
        return [PUBLIC]

    with (
        outbound_client(resolver=stuck, timeouts=Timeouts(dns=0.1)) as client,
        pytest.raises(httpx2.ConnectError),
    ):
        client.get(f"https://{HOST}/")
    never.set()


class _Waiting:
    """Runs a call in a thread and says what it raised and when."""

    def __init__(self, call: object) -> None:
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def _run(self, call: object) -> None:
        try:
            call()  # type: ignore[operator]
        except BaseException as error:
            self.error = error

    def join(self) -> BaseException | None:
        self._thread.join(5)
        assert not self._thread.is_alive(), "the call did not end"
        return self.error


def test_abort_wakes_a_reader_at_once() -> None:
    with raw_server(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok", keep_open=True) as server:
        client = outbound_client(allow_private=frozenset({"127.0.0.1"}))
        got_some = threading.Event()

        def read() -> None:
            with client.stream("GET", f"http://127.0.0.1:{server.port}/") as answer:
                for _ in answer.iter_bytes():
                    got_some.set()

        waiting = _Waiting(read)
        assert got_some.wait(5)
        client.abort()
        assert isinstance(waiting.join(), httpx2.ReadError)
        with pytest.raises(httpx2.HTTPError):
            client.get(f"http://127.0.0.1:{server.port}/")
        client.close()


def test_abort_wakes_a_tls_reader_at_once(tmp_path: Path) -> None:
    server_tls, client_tls = certificate(tmp_path, HOST)
    partial = b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok"
    with raw_server(partial, tls=server_tls, keep_open=True) as server:
        client = outbound_client(
            resolver=Lookups([[PUBLIC]]), dial=Dialled(server.port), ssl_context=client_tls
        )
        got_some = threading.Event()

        def read() -> None:
            with client.stream("GET", f"https://{HOST}/") as answer:
                for _ in answer.iter_bytes():
                    got_some.set()

        waiting = _Waiting(read)
        assert got_some.wait(5)
        client.abort()
        assert isinstance(waiting.join(), httpx2.ReadError)
        client.close()


def test_abort_wakes_one_who_resolves_connects_or_shakes_hands() -> None:
    reached = threading.Event()
    never = threading.Event()

    def slow_resolver(host: str, port: int) -> list[str]:
        reached.set()
        never.wait(20)
        return [PUBLIC]

    full = socket.create_server(("127.0.0.1", 0), backlog=0)
    fillers = []
    for _ in range(4):  # A full backlog: the next connect stays in SYN_SENT.
        filler = socket.socket()
        filler.setblocking(False)
        filler.connect_ex(full.getsockname())
        fillers.append(filler)

    def slow_connect(sock: socket.socket, address: object, port: int) -> None:
        reached.set()
        sock.connect(full.getsockname())

    mute = socket.create_server(("127.0.0.1", 0))

    def mute_peer(sock: socket.socket, address: object, port: int) -> None:
        sock.connect(mute.getsockname())
        reached.set()

    public = Lookups([[PUBLIC]])
    for resolver, dial in ((slow_resolver, slow_connect), (public, slow_connect), (public, mute_peer)):
        reached.clear()
        client = outbound_client(resolver=resolver, dial=dial)
        waiting = _Waiting(lambda: client.get(f"https://{HOST}/"))  # noqa: B023
        assert reached.wait(5)
        client.abort()
        began = time.monotonic()
        assert isinstance(waiting.join(), httpx2.HTTPError)
        assert time.monotonic() - began < 2
        client.close()
    never.set()
    for opened in (*fillers, full, mute):
        opened.close()

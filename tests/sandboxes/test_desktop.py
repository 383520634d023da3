"""The desktop's socket over real uvicorn and Docker; what who only looks on may send."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from sandboxes.view_only import ViewOnly, ViewOnlyRefused
from tests.live import LiveStack, wait_for
from tests.sandboxes.vnc_server import SOURCE

HELLO = b"RFB 003.008\n" + b"\x01" + b"\x00"
KEY = struct.pack("!BBxxI", 4, 1, 65)
POINTER = struct.pack("!BBHH", 5, 1, 3, 4)
CLIPBOARD = struct.pack("!BxxxI", 6, 5) + b"steal"
ASK = struct.pack("!BBHHHH", 3, 0, 0, 0, 64, 48)
ENCODINGS = struct.pack("!BxHii", 2, 2, 0, -223)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_who_looks_on_asks_for_pictures_and_nothing_else_however_it_is_cut(size: int) -> None:
    said = HELLO + ENCODINGS + KEY + ASK + POINTER + CLIPBOARD + ASK
    said += struct.pack("!BBHHBx", 251, 0, 9, 9, 1) + bytes(16) + bytes([255, 0]) + bytes(10) + ASK
    looking = ViewOnly()
    passed = b"".join(looking.feed(said[at : at + size]) for at in range(0, len(said), size))
    assert passed == HELLO[:-1] + b"\x01" + ENCODINGS + ASK * 3


@pytest.mark.parametrize(
    "said",
    [
        b"RFB 003.003\n",
        b"RFB 003.008\n\x02",
        HELLO + b"\x99",
        HELLO + bytes([255, 1]) + bytes(10),
        HELLO + struct.pack("!BxxxI", 6, 0x7FFFFFFF),
    ],
)
def test_what_is_not_understood_is_refused(said: bytes) -> None:
    with pytest.raises(ViewOnlyRefused):
        ViewOnly().feed(said)


class Viewer:
    def __init__(
        self, live: LiveStack, sandbox: str, token: str, query: str = "", origin: str | None = None
    ) -> None:
        url = f"ws://127.0.0.1:{live.port}/v1/sandboxes/{sandbox}/desktop?token={token}{query}"
        self.socket: ClientConnection = connect(url, origin=origin, legacy=True)  # type: ignore[call-overload]
        self.got = b""

    def read(self, size: int) -> bytes:
        while len(self.got) < size:
            message = self.socket.recv(timeout=30)
            assert isinstance(message, bytes)
            self.got += message
        taken, self.got = self.got[:size], self.got[size:]
        return taken

    def greet(self) -> None:
        assert self.read(12) == b"RFB 003.008\n"
        self.socket.send(HELLO)
        self.read(2 + 4 + 24 + 4)

    def picture(self) -> None:
        self.socket.send(ASK)
        self.read(16 + 64 * 48 * 4)

    def closed(self) -> int:
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                self.socket.recv(timeout=30)
        assert closed.value.rcvd is not None
        return closed.value.rcvd.code


@pytest.fixture(scope="module")
def key(live: LiveStack) -> str:
    return live.api_key("desktop@example.com")


@pytest.fixture(scope="module")
def sandbox(live: LiveStack, key: str) -> Iterator[str]:
    """One in which a VNC server runs."""
    made = str(live.request("POST", "/v1/sandboxes", {}, token=key).json()["sandbox_id"])
    live.request("PUT", f"/v1/sandboxes/{made}/files?path=vnc.py", SOURCE.encode(), token=key)
    live.request("POST", f"/v1/sandboxes/{made}/jobs", {"command": "python3 vnc.py"}, token=key)
    check = {"command": "until (echo >/dev/tcp/127.0.0.1/5900) 2>/dev/null; do sleep 0.1; done"}
    assert live.request("POST", f"/v1/sandboxes/{made}/exec", check, token=key).json()["exit_code"] == 0
    yield made
    live.request("DELETE", f"/v1/sandboxes/{made}", token=key)


def token_for(live: LiveStack, key: str, sandbox: str) -> str:
    return str(live.request("POST", f"/v1/sandboxes/{sandbox}/token", {}, token=key).json()["token"])


def noted(live: LiveStack, key: str, sandbox: str) -> list[str]:
    return (
        live.request("GET", f"/v1/sandboxes/{sandbox}/files?path=noted", token=key).body.decode().split("\n")
    )


@pytest.mark.docker
def test_a_screen_is_seen_and_typed_at_and_who_looks_on_only_sees_it(
    live: LiveStack, key: str, sandbox: str
) -> None:
    looking = Viewer(live, sandbox, token_for(live, key, sandbox), "&view_only=1")
    looking.greet()
    looking.socket.send(KEY + POINTER + CLIPBOARD)
    looking.picture()
    seen = noted(live, key, sandbox)
    assert not any(line.startswith(("key", "pointer", "clipboard")) for line in seen)
    assert "shared 1" in seen, "it throws nobody out"
    typing = Viewer(live, sandbox, token_for(live, key, sandbox))
    typing.greet()
    typing.socket.send(KEY + POINTER)
    typing.picture()
    wait_for(lambda: {"key 65", "pointer"} <= set(noted(live, key, sandbox)), what="key and pointer")


@pytest.mark.docker
def test_a_sandbox_without_a_desktop_says_so(live: LiveStack, key: str) -> None:
    made = str(live.request("POST", "/v1/sandboxes", {}, token=key).json()["sandbox_id"])
    assert Viewer(live, made, token_for(live, key, made)).closed() == 4404
    live.request("DELETE", f"/v1/sandboxes/{made}", token=key)


@pytest.mark.docker
def test_refusals_and_the_end_are_close_codes(live: LiveStack, key: str, sandbox: str) -> None:
    token = token_for(live, key, sandbox)
    assert Viewer(live, sandbox, "nonsense").closed() == 4401
    assert Viewer(live, sandbox, token, origin="https://evil.example").closed() == 4403
    assert Viewer(live, "sbx_" + "a" * 26, token).closed() == 4404
    assert Viewer(live, sandbox, token, "&view_only=yes").closed() == 4400
    text = Viewer(live, sandbox, token)
    text.socket.send("text")
    assert text.closed() == 4400


@pytest.mark.docker
def test_revoking_the_key_closes_an_open_desktop(live: LiveStack, key: str, sandbox: str) -> None:
    account = live.sign_in("desktop@example.com")
    made = live.request("POST", "/v1/api-keys", {}, token=account).json()
    viewer = Viewer(live, sandbox, token_for(live, made["key"], sandbox))
    viewer.greet()
    live.request("DELETE", f"/v1/api-keys/{made['key_id']}", token=account)
    assert viewer.closed() == 4401

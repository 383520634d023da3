"""The terminal over real uvicorn and Docker: bytes both ways, replay, viewers and one writer."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.live import LiveStack

pytestmark = pytest.mark.docker


class Terminal:
    """A client that keeps what it was sent."""

    def __init__(
        self, live: LiveStack, sandbox: str, token: str = "", *, origin: Any = None, **query: Any
    ) -> None:
        if token:
            query["token"] = token
        words = "&".join(f"{name}={value}" for name, value in query.items())
        url = f"ws://127.0.0.1:{live.port}/v1/sandboxes/{sandbox}/terminal?{words}"
        self.socket: ClientConnection = connect(url, origin=origin, legacy=True)
        self.output = b""
        self.frames: list[dict[str, Any]] = []
        self.after = 0

    def read(self) -> None:
        try:
            message = self.socket.recv(timeout=10)
        except TimeoutError:
            raise AssertionError(f"nothing more came: {self.output!r} {self.frames}") from None
        if isinstance(message, bytes):
            self.output += message
        else:
            self.frames.append(json.loads(message))

    def until(self, text: bytes) -> bytes:
        end = time.monotonic() + 30
        while text not in self.output:
            assert time.monotonic() < end, (text, self.output, self.frames)
            self.read()
        return self.output

    def frame(self, kind: str) -> dict[str, Any]:
        end = time.monotonic() + 30
        while not (found := [frame for frame in self.frames if frame["type"] == kind]):
            assert time.monotonic() < end, (kind, self.frames)
            self.read()
        self.frames.remove(found[0])
        return found[0]

    def type(self, text: str) -> None:
        self.socket.send(text.encode())

    def say(self, **frame: Any) -> None:
        self.socket.send(json.dumps(frame))

    def closed(self) -> int:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            try:
                self.read()
            except ConnectionClosed as closed:
                assert closed.rcvd is not None
                return closed.rcvd.code
        raise AssertionError("it is still open")


@pytest.fixture(scope="module")
def key(live: LiveStack) -> str:
    return live.api_key()


@pytest.fixture
def sandbox(live: LiveStack, key: str) -> Iterator[str]:
    answer = live.request("POST", "/v1/sandboxes", {}, token=key)
    assert answer.status == 201, answer.body
    sandbox = str(answer.json()["vm_id"])
    yield sandbox
    live.request("DELETE", f"/v1/sandboxes/{sandbox}", token=key)


@pytest.fixture
def token(live: LiveStack, key: str, sandbox: str) -> str:
    answer = live.request("POST", f"/v1/sandboxes/{sandbox}/token", {}, token=key)
    assert answer.status == 201, answer.body
    return str(answer.json()["token"])


def test_it_echoes_resizes_replays_and_ends(live: LiveStack, sandbox: str, token: str) -> None:
    one = Terminal(live, sandbox, token, cols=100, rows=30, client="me")
    ready = one.frame("ready")
    assert (ready["after"], ready["role"], ready["client"]) == (0, "writer", "me")
    one.type("stty size; tty; echo $((6*7))$((6*7))\n")
    seen = one.until(b"4242")
    assert b"30 100" in seen
    assert b"/dev/pts/" in seen
    one.say(type="resize", cols=90, rows=20)
    one.type("stty size\n")
    one.until(b"20 90")
    one.type("X=kept; echo $((3*3))-set\n")
    one.until(b"9-set")
    one.socket.close()
    again = Terminal(live, sandbox, token, client="me", shell=ready["shell"])
    assert again.frame("ready")["shell"] == ready["shell"]
    assert again.until(b"20 90").startswith(seen[:50])
    again.type("echo it-is-$X\n")
    again.until(b"it-is-kept")
    again.socket.close()
    at = len(again.output)
    last = Terminal(live, sandbox, token, after=at, client="me", shell=ready["shell"])
    assert last.frame("ready")["after"] == at
    last.type("exit 3\n")
    assert last.frame("exit")["exit_code"] == 3
    assert b"it-is-kept" not in last.output
    assert last.closed() == 1000


def test_a_new_shell_follows_one_that_has_ended(live: LiveStack, sandbox: str, token: str) -> None:
    one = Terminal(live, sandbox, token, client="me")
    first = one.frame("ready")["shell"]
    one.type("exit 4\n")
    assert one.closed() == 1000
    # Who missed the end hears of it.
    late = Terminal(live, sandbox, token, client="me", shell=first, after=0)
    assert late.frame("exit")["exit_code"] == 4
    assert late.closed() == 1000
    assert late.output == one.output
    fresh = Terminal(live, sandbox, token, client="me")
    assert fresh.frame("ready")["shell"] != first
    fresh.type("echo $((7*7))-again\n")
    fresh.until(b"49-again")
    other = Terminal(live, sandbox, token, mode="view", shell="terminal-9.1", after=3)
    assert other.frame("resync")["after"] == 0
    other.until(b"49-again")
    ahead = Terminal(live, sandbox, token, mode="view", after=10**9)
    assert ahead.frame("resync")["after"] == 0
    ahead.until(b"49-again")


def test_one_types_and_the_others_look_on(live: LiveStack, sandbox: str, token: str) -> None:
    one = Terminal(live, sandbox, token)
    one.frame("ready")
    viewer = Terminal(live, sandbox, token, mode="view")
    assert viewer.frame("ready")["role"] == "viewer"
    viewer.type("echo no\n")
    assert viewer.frame("error")["code"] == "read_only"
    one.type("echo $((5*5))-seen\n")
    viewer.until(b"25-seen")
    viewer.say(type="take")
    assert viewer.frame("role")["role"] == "writer"
    assert one.frame("role")["role"] == "viewer"
    one.type("echo lost\n")
    assert one.frame("error")["code"] == "read_only"
    viewer.type("echo $((8*8))-taken\n")
    one.until(b"64-taken")
    assert b"lost" not in one.output
    for terminal in (one, viewer):
        terminal.say(type="ping")
        terminal.frame("pong")
        terminal.socket.close()


def test_it_resumes_a_paused_one_and_ends_with_the_sandbox(
    live: LiveStack, key: str, sandbox: str, token: str
) -> None:
    path = f"/v1/sandboxes/{sandbox}"
    assert live.request("POST", f"{path}/pause", {}, token=key).json()["state"] == "paused"
    one = Terminal(live, sandbox, token)
    one.frame("ready")
    assert live.request("GET", path, token=key).json()["state"] == "running"
    live.request("DELETE", path, token=key)
    assert one.closed() == 4410
    assert Terminal(live, sandbox, token).closed() == 4410
    assert live.request("POST", f"{path}/token", {}, token=key).json()["code"] == "not_running"


def test_who_may_not_attach_is_told_by_the_code(live: LiveStack, key: str, sandbox: str, token: str) -> None:
    other = live.request("POST", "/v1/sandboxes", {}, token=key).json()["vm_id"]
    mallory = live.api_key("mallory@example.com")
    foreign = live.request("POST", "/v1/sandboxes", {}, token=mallory).json()["vm_id"]
    assert Terminal(live, sandbox, "nonsense").closed() == 4401
    assert Terminal(live, sandbox, key).closed() == 4401
    assert Terminal(live, other, token).closed() == 4403
    assert Terminal(live, foreign, token).closed() == 4404
    assert Terminal(live, "sbx_" + "a" * 26, token).closed() == 4404
    assert Terminal(live, sandbox, token, after="x").closed() == 4400
    for made, owner in ((other, key), (foreign, mallory)):
        live.request("DELETE", f"/v1/sandboxes/{made}", token=owner)
    assert live.request("POST", f"/v1/sandboxes/{sandbox}/token", {}, token=mallory).status == 404

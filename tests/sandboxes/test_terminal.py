"""The terminal over real uvicorn and Docker: bytes both ways, replay, viewers and one writer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.live import ROOT, LiveStack, wait_for

pytestmark = pytest.mark.docker

LIMIT_SECONDS = 90
"""A process that was killed may take long to come back on a busy machine."""


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
        self.role = ""

    def read(self) -> None:
        try:
            message = self.socket.recv(timeout=LIMIT_SECONDS)
        except TimeoutError:
            raise AssertionError(f"nothing more came: {self.output!r} {self.frames}") from None
        if isinstance(message, bytes):
            self.output += message
        else:
            self.frames.append(json.loads(message))
            self.role = str(self.frames[-1].get("role", self.role))

    def until(self, text: bytes) -> bytes:
        end = time.monotonic() + LIMIT_SECONDS
        while text not in self.output:
            assert time.monotonic() < end, (text, self.output, self.frames)
            self.read()
        return self.output

    def frame(self, kind: str) -> dict[str, Any]:
        end = time.monotonic() + LIMIT_SECONDS
        while not (found := [frame for frame in self.frames if frame["type"] == kind]):
            assert time.monotonic() < end, (kind, self.frames)
            self.read()
        self.frames.remove(found[0])
        return found[0]

    def last_role(self) -> str:
        """What it was told last, once everything that was sent before is here."""
        self.say(type="ping")
        self.frame("pong")
        return self.role

    def type(self, text: str) -> None:
        self.socket.send(text.encode())

    def say(self, **frame: Any) -> None:
        self.socket.send(json.dumps(frame))

    def closed(self) -> int:
        end = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < end:
            try:
                self.read()
            except ConnectionClosed as closed:
                assert closed.rcvd is not None
                return closed.rcvd.code
        raise AssertionError("it is still open")


def in_stack(live: LiveStack, code: str) -> None:
    """Run `code` beside the stack, on its database."""
    environment = os.environ | {"E2A_DATA_DIR": str(live.data_dir)}
    command = [sys.executable, str(ROOT / "manage.py"), "shell", "-c", code]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=60, capture_output=True)


def running(live: LiveStack, sandbox: str, key: str) -> str:
    def state() -> bool:
        return bool(live.request("GET", f"/v1/sandboxes/{sandbox}", token=key).json()["state"] == "running")

    wait_for(state, what="a running sandbox", seconds=60)
    return sandbox


@pytest.fixture(scope="module")
def key(live: LiveStack) -> str:
    return live.api_key()


@pytest.fixture
def sandbox(live: LiveStack, key: str) -> Iterator[str]:
    answer = live.request("POST", "/v1/sandboxes", {}, token=key)
    assert answer.status == 201, answer.body
    sandbox = str(answer.json()["vm_id"])
    running(live, sandbox, key)
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
    one.say(type="resize", cols=70, rows=10)
    while (size := viewer.frame("resize")) != {"type": "resize", "cols": 70, "rows": 10}:
        assert size["cols"] == 80  # What it had when it was opened.
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


def test_who_looks_on_takes_the_place_of_one_who_left(live: LiveStack, sandbox: str, token: str) -> None:
    one = Terminal(live, sandbox, token, client="one")
    assert one.frame("ready")["role"] == "writer"
    two = Terminal(live, sandbox, token, client="two")
    assert two.frame("ready")["role"] == "viewer"
    only_looks = Terminal(live, sandbox, token, mode="view")
    assert only_looks.frame("ready")["role"] == "viewer"
    # The same client again, while its old socket hangs: it types on, the old one does not.
    again = Terminal(live, sandbox, token, client="one")
    assert again.frame("ready")["role"] == "writer"
    assert one.frame("role")["role"] == "viewer"
    again.type("echo $((4*4))-mine\n")
    two.until(b"16-mine")
    one.socket.close()
    again.socket.close()
    assert two.frame("role")["role"] == "writer"
    two.type("echo $((5*4))-next\n")
    only_looks.until(b"20-next")
    assert only_looks.last_role() == "viewer"


def test_when_all_take_over_at_once_one_types(live: LiveStack, sandbox: str, token: str) -> None:
    crowd = [Terminal(live, sandbox, token, mode="view") for _ in range(6)]
    for terminal in crowd:
        terminal.frame("ready")
    for _ in range(5):
        for terminal in crowd:
            terminal.say(type="take")

    def writers() -> list[Terminal]:
        return [terminal for terminal in crowd if terminal.last_role() == "writer"]

    wait_for(lambda: len(writers()) == 1, what="one writer")
    writer = writers()[0]
    writer.type("echo $((9*9))-one\n")
    for terminal in crowd:
        if terminal is not writer:
            terminal.type("echo nobody\n")
            assert terminal.frame("error")["code"] == "read_only"
        assert b"nobody" not in terminal.until(b"81-one")


def test_it_resumes_a_paused_one_and_ends_with_the_sandbox(
    live: LiveStack, key: str, sandbox: str, token: str
) -> None:
    path = f"/v1/sandboxes/{sandbox}"
    assert live.request("POST", f"{path}/pause", {}, token=key).json()["state"] == "paused"
    one = Terminal(live, sandbox, token)
    one.frame("ready")
    assert live.request("GET", path, token=key).json()["state"] == "running"
    # Paused while it is open: it waits, and typing goes on.
    assert live.request("POST", f"{path}/pause", {}, token=key).json()["state"] == "paused"
    assert one.frame("status")["state"] == "paused"
    assert live.request("GET", path, token=key).json()["state"] == "paused"
    one.type("echo $((6*6))-awake\n")
    one.until(b"36-awake")
    assert one.frame("status")["state"] == "running"
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
    assert Terminal(live, sandbox, token, origin="https://evil.example").closed() == 4403
    for wrong in ({"after": "x"}, {"cols": "0"}, {"mode": "rule"}, {"client": "a/b"}, {"shell": "/"}):
        assert Terminal(live, sandbox, token, **wrong).closed() == 4400
    for made, owner in ((other, key), (foreign, mallory)):
        live.request("DELETE", f"/v1/sandboxes/{made}", token=owner)
    assert live.request("POST", f"/v1/sandboxes/{sandbox}/token", {}, token=mallory).status == 404


def test_a_token_may_come_as_the_first_message(live: LiveStack, sandbox: str, token: str) -> None:
    silent = Terminal(live, sandbox)
    one = Terminal(live, sandbox, origin=live.url)
    one.type("echo early\n")
    assert one.frame("error")["code"] == "auth_needed"
    one.say(type="auth", token=token)
    one.frame("ready")
    one.type("echo $((7*6))-in\n")
    assert b"early" not in one.until(b"42-in")
    wrong = Terminal(live, sandbox)
    wrong.say(type="auth", token="nonsense")
    assert wrong.closed() == 4401
    assert silent.closed() == 4408


def test_what_is_too_much_is_told_by_the_code(live: LiveStack, sandbox: str, token: str) -> None:
    def opened() -> Terminal:
        terminal = Terminal(live, sandbox, token, mode="view")
        terminal.frame("ready")
        return terminal

    large = opened()
    large.socket.send(b"x" * (64 * 1024 + 1))
    assert large.closed() == 4413
    bad = opened()
    for text in ("{", "[]", "{}", '{"type": "rm"}', '{"type": "take", "all": 1}', '{"type": "resize"}') * 2:
        with contextlib.suppress(ConnectionClosed):
            bad.socket.send(text)
    assert bad.closed() == 4400
    fast = opened()
    for _ in range(1001):
        with contextlib.suppress(ConnectionClosed):
            fast.say(type="ping")
    assert fast.closed() == 4429
    many = [opened() for _ in range(20)]
    assert Terminal(live, sandbox, token, mode="view").closed() == 4429
    for terminal in many:
        terminal.socket.close()

    def has_room() -> bool:
        terminal = Terminal(live, sandbox, token, mode="view")
        terminal.read()
        is_open = bool(terminal.frames)
        terminal.socket.close()
        return is_open

    def there_is() -> bool:
        with contextlib.suppress(ConnectionClosed):
            return has_room()
        return False

    wait_for(there_is, what="room again")


def test_it_closes_when_what_opened_it_no_longer_counts(live: LiveStack) -> None:
    """Within 5 s; the limit here is for a busy machine."""
    account = live.sign_in("dora@example.com")
    made = live.request("POST", "/v1/api-keys", {}, token=account).json()
    sandbox = live.request("POST", "/v1/sandboxes", {}, token=made["key"]).json()["vm_id"]
    running(live, sandbox, made["key"])

    def attached(bearer: str) -> Terminal:
        token = live.request("POST", f"/v1/sandboxes/{sandbox}/token", {}, token=bearer).json()["token"]
        terminal = Terminal(live, sandbox, token, mode="view")
        terminal.frame("ready")
        return terminal

    by_key, by_person = attached(made["key"]), attached(account)
    live.request("DELETE", f"/v1/api-keys/{made['key_id']}", token=account)
    assert by_key.closed() == 4401
    assert by_person.last_role() == "viewer"
    who = "from accounts.models import User; user = User.objects.get(email='dora@example.com')\n"
    in_stack(
        live,
        who + "from accounts.services import tenant_suspend; tenant_suspend(tenant=user.tenant, actor='t')",
    )
    assert by_person.closed() == 4401
    in_stack(
        live,
        who + "from accounts.services import tenant_resume; tenant_resume(tenant=user.tenant, actor='t')",
    )
    again = attached(live.sign_in("dora@example.com"))
    in_stack(live, who + "from accounts.services import user_disable; user_disable(user=user, actor='t')")
    assert again.closed() == 4401


def test_a_secret_that_is_printed_slowly_is_not_shown(live: LiveStack, key: str) -> None:
    value = "hunter2-and-" + os.urandom(8).hex()
    bundle = {"name": "slow-" + os.urandom(4).hex(), "values": {"SERVICE_TOKEN": value}}
    assert live.request("POST", "/v1/tenants/me/secrets", bundle, token=key).status == 201
    body = {"secrets": [bundle["name"]]}
    sandbox = str(live.request("POST", "/v1/sandboxes", body, token=key).json()["vm_id"])
    running(live, sandbox, key)
    token = live.request("POST", f"/v1/sandboxes/{sandbox}/token", {}, token=key).json()["token"]
    one = Terminal(live, sandbox, token)
    one.frame("ready")
    one.type(
        'T=$SERVICE_TOKEN; for ((i = 0; i < ${#T}; i++)); do printf %s "${T:i:1}"; sleep 0.05; done; echo -$((3*3))-\n'
    )
    seen = one.until(b"-9-")
    assert b"[redacted:SERVICE_TOKEN]-9-" in seen
    assert value[4:].encode() not in seen
    again = Terminal(live, sandbox, token, mode="view")
    assert value[4:].encode() not in again.until(b"-9-")
    live.request("DELETE", f"/v1/sandboxes/{sandbox}", token=key)


LINES = 150
COUNT = f"clear; for i in $(seq 1 {LINES}); do echo line-$i; sleep 0.05; done; echo $((2*4))-all\n"


def lines_of(output: bytes) -> list[int]:
    return [int(number) for number in re.findall(rb"line-(\d+)\r\n", output)]


def test_nothing_is_missed_when_web_is_killed(live: LiveStack, sandbox: str, token: str) -> None:
    one = Terminal(live, sandbox, token, client="me")
    shell = one.frame("ready")["shell"]
    one.type(COUNT)
    one.until(b"line-20\r\n")
    live.kill("web")
    with pytest.raises(ConnectionClosed):
        while True:
            one.read()
    wait_for(live._is_ready, what="web again", seconds=120)
    again = Terminal(live, sandbox, token, client="me", shell=shell, after=len(one.output))
    ready = again.frame("ready")
    assert (ready["after"], ready["role"]) == (len(one.output), "writer")
    again.until(b"8-all\r\n")
    assert lines_of(one.output + again.output) == list(range(1, LINES + 1))


def test_a_gateway_that_restarts_is_not_noticed(live: LiveStack, sandbox: str, token: str) -> None:
    one = Terminal(live, sandbox, token)
    one.frame("ready")
    one.type(COUNT)
    one.until(b"line-20\r\n")
    live.kill("gateway")
    assert lines_of(one.until(b"8-all\r\n")) == list(range(1, LINES + 1))
    assert one.last_role() == "writer"


def test_a_sandbox_with_a_terminal_open_is_in_use(live: LiveStack, key: str) -> None:
    body = {"idle_timeout_seconds": 10}
    sandbox = str(live.request("POST", "/v1/sandboxes", body, token=key).json()["vm_id"])
    running(live, sandbox, key)
    token = live.request("POST", f"/v1/sandboxes/{sandbox}/token", {}, token=key).json()["token"]
    one = Terminal(live, sandbox, token, mode="view")
    one.frame("ready")

    def last_used() -> str:
        return str(live.request("GET", f"/v1/sandboxes/{sandbox}", token=key).json()["last_active_at"])

    for _ in range(3):  # Longer than it may idle.
        before = last_used()
        wait_for(lambda before=before: last_used() > before, what="use, by nobody but the one who looks on")
    assert one.last_role() == "viewer"
    live.request("DELETE", f"/v1/sandboxes/{sandbox}", token=key)

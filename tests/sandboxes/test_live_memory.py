"""What large things cost the servers: the whole product on Docker, its memory measured from outside."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.guest.guest import children
from tests.live import LiveStack, wait_for

pytestmark = pytest.mark.docker

MIB = 1024 * 1024
LARGEST = 512 * MIB
ALLOWED_MIB = 64


def resident_mib(pids: list[int]) -> float:
    """Their proportional memory: forks that share pages count once."""
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue  # It ended meanwhile.
        total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total / 1024


def tree(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        found += children(one)
    return found


class Peaks:
    """The most memory that web, gateway and one guest with its runners had above what they had at first, in MiB."""

    def __init__(self, live: LiveStack, sandbox: str) -> None:
        listed = subprocess.run(
            ["docker", "ps", "-q", "--filter", f"label=e2a.sandbox={sandbox}"],
            check=True, capture_output=True, text=True,
        ).stdout.split()  # fmt: skip
        pid = subprocess.run(
            ["docker", "inspect", "-f", "{{.State.Pid}}", *listed], check=True, capture_output=True, text=True
        ).stdout
        self._roots = {name: live.children()[name] for name in ("web", "gateway")} | {"guest": int(pid)}
        self._stopped = threading.Event()
        self._base = self._now()
        self.grown = dict.fromkeys(self._base, 0.0)

    def _now(self) -> dict[str, float]:
        return {name: resident_mib(self._members(name, pid)) for name, pid in self._roots.items()}

    @staticmethod
    def _members(name: str, pid: int) -> list[int]:
        if name != "guest":
            return tree(pid)
        # Of the guest: PID 1 and its runners, not the tenant's own commands.
        program = Path(f"/proc/{pid}/cmdline").read_bytes()
        return [one for one in tree(pid) if _command(one) == program]

    @contextmanager
    def measured(self) -> Iterator[None]:
        def watch() -> None:
            while not self._stopped.wait(0.1):
                for name, value in self._now().items():
                    self.grown[name] = max(self.grown[name], value - self._base[name])

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            thread.join()
        print({name: round(value, 1) for name, value in self.grown.items()})
        assert max(self.grown.values()) < ALLOWED_MIB, self.grown


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


class Account:
    """One key, and sandboxes that run."""

    def __init__(self, live: LiveStack) -> None:
        self.live = live
        self.key = live.api_key("weights@example.com")
        self.sandboxes: list[str] = []

    def sandbox(self) -> str:
        sandbox = str(self.call("POST", "/v1/sandboxes", {}).json()["sandbox_id"])
        self.sandboxes.append(sandbox)
        assert self.run(sandbox, "true")["exit_code"] == 0
        return sandbox

    def call(self, method: str, path: str, body: Any = None, **kwargs: Any) -> Any:
        return self.live.request(method, path, body, token=self.key, timeout=120, **kwargs)

    def run(self, sandbox: str, command: str) -> dict[str, Any]:
        answer = self.call("POST", f"/v1/sandboxes/{sandbox}/exec", {"command": command})
        assert answer.status == 200, answer.body
        done: dict[str, Any] = answer.json()
        return done

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.live.port, timeout=120)

    def headers(self, **more: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}", **more}


@pytest.fixture
def account(live: LiveStack) -> Iterator[Account]:
    account = Account(live)
    yield account
    for sandbox in account.sandboxes:
        account.call("DELETE", f"/v1/sandboxes/{sandbox}")


def pieces(size: int) -> Iterator[bytes]:
    piece = bytes(MIB)
    for _ in range(size // MIB):
        yield piece


def test_512_mib_go_in_and_out_and_513_are_refused(live: LiveStack, account: Account) -> None:
    sandbox = account.sandbox()
    path = f"/v1/sandboxes/{sandbox}/files?path=big"
    with Peaks(live, sandbox).measured():
        connection = account.connection()
        connection.request(
            "PUT", path, body=pieces(LARGEST), headers=account.headers(**{"Content-Length": str(LARGEST)})
        )
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["size"]) == (200, LARGEST)
        connection.close()

        connection = account.connection()
        connection.request("GET", path, headers=account.headers())
        answer = connection.getresponse()
        assert answer.status == 200
        size = 0
        while piece := answer.read(MIB):
            size += len(piece)
        assert size == LARGEST
        connection.close()

    with socket.create_connection(("127.0.0.1", live.port), timeout=120) as sock:
        head = (
            f"PUT {path} HTTP/1.1\r\nHost: 127.0.0.1:{live.port}\r\nAuthorization: Bearer {account.key}\r\n"
        )
        sock.sendall(f"{head}Content-Length: {513 * MIB}\r\n\r\n".encode())
        assert b" 413 " in sock.recv(4096).split(b"\r\n")[0], "before a byte of it was sent"
    assert account.run(sandbox, "stat -c %s big; ls -A")["stdout"] == f"{LARGEST}\nbig\n"


def test_a_killed_web_in_the_middle_of_an_upload_leaves_the_old_file(
    live: LiveStack, account: Account
) -> None:
    sandbox = account.sandbox()
    path = f"/v1/sandboxes/{sandbox}/files?path=kept"
    old = b"old" * 1_000_000
    assert account.call("PUT", path, old).status == 200
    with socket.create_connection(("127.0.0.1", live.port), timeout=60) as sock:
        head = (
            f"PUT {path} HTTP/1.1\r\nHost: 127.0.0.1:{live.port}\r\nAuthorization: Bearer {account.key}\r\n"
        )
        sock.sendall(f"{head}Content-Length: {100 * MIB}\r\n\r\n".encode())
        for piece in pieces(8 * MIB):
            sock.sendall(piece)
        part = "find . -name '.e2a-*' -size +1M"
        wait_for(lambda: account.run(sandbox, part)["stdout"], what="a part of it is in the sandbox")
        killed = live.kill("web")
        wait_for(
            lambda: live.children().get("web", killed) != killed and live._is_ready(),
            what="web is back",
            seconds=120,
        )
    left = "find . -name '.e2a-*'"
    wait_for(lambda: account.run(sandbox, left)["stdout"] == "", what="nothing of it is left")
    assert account.call("GET", path).body == old


def test_a_flood_that_nobody_reads_costs_nobody_anything(live: LiveStack, account: Account) -> None:
    sandbox, neighbour = account.sandbox(), account.sandbox()
    flood = "head -c 1G /dev/zero | tr '\\0' 'x'"
    with Peaks(live, sandbox).measured():
        started = account.call("POST", f"/v1/sandboxes/{sandbox}/jobs", {"command": flood})
        job = f"/v1/sandboxes/{sandbox}/jobs/{started.json()['job_id']}"
        readers = []
        for _ in range(3):  # They ask, and read no more than that they are served.
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", live.port))
            head = (
                f"GET {job}/output HTTP/1.1\r\nHost: 127.0.0.1:{live.port}\r\nAccept: text/event-stream\r\n"
            )
            sock.sendall(f"{head}Authorization: Bearer {account.key}\r\n\r\n".encode())
            assert sock.recv(15) == b"HTTP/1.1 200 OK"
            readers.append(sock)
        answered = 0

        def is_over() -> bool:
            nonlocal answered
            assert account.run(neighbour, "echo here")["stdout"] == "here\n"
            answered += 1
            shown = account.call("GET", job).json()
            return bool(shown["state"] != "running")

        wait_for(is_over, what="the flood has passed", seconds=300, every=0.2)
        shown = account.call("GET", job).json()
        assert (shown["state"], shown["exit_code"], shown["output_bytes"]) == ("exited", 0, 1 << 30)
        assert answered > 1
        for sock in readers:
            sock.close()
    page = account.call("GET", f"{job}/output").json()
    assert page["dropped_bytes"] > (1 << 30) - 2 * MIB

"""What the tests here are made of: a scripted guest, a gateway in a thread or a process, a bare client."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sandboxes.gateway.address import Address, UnixAddress, address_parse, socket_path
from sandboxes.gateway.server import Gateway
from sandboxes.gateway.signing import CHUNKED, signed_headers

NODE_KEY = b"k" * 32
SANDBOX = "sbx_" + "a2" * 13
ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 15.0

Script = Callable[["GuestSocket"], object]


def until(condition: Callable[[], Any], what: str, seconds: float = LIMIT_SECONDS) -> Any:
    """The first true value of `condition`, looked at every few milliseconds."""
    give_up_at = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < give_up_at, f"{what} not within {seconds:g} s"
        select.select([], [], [], 0.002)
    return value


def until_still(value: Callable[[], int], seconds: float = LIMIT_SECONDS) -> int:
    """What `value` is once it has not changed in 100 looks, 3 ms apart."""
    give_up_at, last, looks = time.monotonic() + seconds, value(), 0
    while looks < 100:
        assert time.monotonic() < give_up_at, f"still moving after {seconds:g} s"
        select.select([], [], [], 0.003)
        looks = looks + 1 if value() == last else 0
        last = value()
    return last


class GuestSocket:
    """One accepted connection, seen from the guest."""

    def __init__(self, connection: socket.socket) -> None:
        self.raw = connection
        self.raw.settimeout(LIMIT_SECONDS)
        self.sent = 0
        self.head = b""
        self._unread = b""

    def read_head(self) -> bytes:
        while b"\r\n\r\n" not in self._unread:
            data = self.raw.recv(65536)
            if not data:
                raise EOFError
            self._unread += data
        self.head, _, self._unread = self._unread.partition(b"\r\n\r\n")
        self.head += b"\r\n\r\n"
        return self.head

    def header(self, name: str) -> str | None:
        for line in self.head.decode("latin-1").split("\r\n")[1:]:
            found, _, value = line.partition(": ")
            if found.lower() == name:
                return value
        return None

    def read_body(self) -> bytes:
        """By length, or the raw chunks up to the last."""
        if self.header("transfer-encoding"):
            while not self._unread.endswith(b"0\r\n\r\n"):
                data = self.raw.recv(65536)
                if not data:
                    raise EOFError
                self._unread += data
            return self._unread
        length = int(self.header("content-length") or 0)
        while len(self._unread) < length:
            data = self.raw.recv(65536)
            if not data:
                raise EOFError
            self._unread += data
        return self._unread

    def send(self, data: bytes) -> None:
        self.raw.sendall(data)
        self.sent += len(data)

    def answer(self, status: int, document: Any) -> None:
        body = json.dumps(document).encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.send(head.encode() + body)

    def answer_stream(self, data: bytes = b"") -> None:
        self.send(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + data)

    def read_to_end(self) -> bytes:
        """What comes until the other side closes (or cuts)."""
        parts = [self._unread]
        try:
            while data := self.raw.recv(65536):
                parts.append(data)
        except ConnectionResetError:
            pass
        return b"".join(parts)


def answered(status: int, document: Any) -> Script:
    """A script that reads a request and answers it."""

    def script(guest: GuestSocket) -> None:
        guest.read_head()
        guest.read_body()
        guest.answer(status, document)

    return script


def frame(kind: int, offset: int, payload: bytes = b"") -> bytes:
    return struct.pack(">BQI", kind, offset, len(payload)) + payload


def description(**changes: Any) -> dict[str, Any]:
    """A process as a guest describes it."""
    return {
        "id": "p1",
        "state": "exited",
        "exit_code": 0,
        "signal": None,
        "timed_out": False,
        "oom": False,
        "started_at": 1.5,
        "ended_at": 2,
        "output_bytes": 0,
        "first_offset": 0,
        "stdin_open": False,
        "pty": False,
        **changes,
    }


def exit_frame(offset: int, **changes: Any) -> bytes:
    return frame(3, offset, json.dumps(description(**changes)).encode())


class FakeGuest:
    """Listens where a guest would; each connection runs the script in a thread of its own."""

    def __init__(self, path: Path, script: Script, *, backlog: int = 1024) -> None:
        self.script = script
        self.connections: list[GuestSocket] = []
        self.finished = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with socket_path(path) as name:
            self._listener.bind(name)
        self._listener.listen(backlog)
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            guest = GuestSocket(connection)
            self.connections.append(guest)
            thread = threading.Thread(target=self._serve, args=(guest,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, guest: GuestSocket) -> None:
        try:
            self.script(guest)
        except (EOFError, OSError):
            pass  # The relay cut the connection: what many tests want.
        finally:
            guest.raw.close()
            self.finished += 1

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for guest in self.connections:
            try:
                guest.raw.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        for thread in self._threads:
            thread.join(LIMIT_SECONDS)


@contextmanager
def gateway_in_thread(data_dir: Path, address: Address) -> Iterator[str]:
    """A gateway in an event loop of its own; the value is its address as clients name it."""
    ready = threading.Event()
    started: dict[str, Any] = {}

    def serve() -> None:
        async def main() -> None:
            started["loop"], started["stop"] = asyncio.get_running_loop(), asyncio.Event()
            gateway = Gateway(data_dir=data_dir, node_key=NODE_KEY, address=address)
            await gateway.serve(stop=started["stop"], on_ready=ready.set)

        asyncio.run(main())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(LIMIT_SECONDS), "the gateway did not start"
    try:
        yield str(address)
    finally:
        started["loop"].call_soon_threadsafe(started["stop"].set)
        thread.join(LIMIT_SECONDS)
        assert not thread.is_alive(), "the gateway did not stop"


class GatewayProcess:
    """`manage.py gateway` as it is run."""

    def __init__(self, data_dir: Path, bind: str) -> None:
        self.address = bind
        environment = {
            "PATH": os.environ["PATH"],
            "E2A_ENV": "production",
            "E2A_ROLE": "gateway",
            "E2A_DATA_DIR": str(data_dir),
            "E2A_NODE_KEY": NODE_KEY.decode(),
            "E2A_PUBLIC_URL": "https://e2a.test",
            "E2A_GATEWAY_BIND": bind,
            "SECRET_KEY": "x" * 50,
        }
        self.process = subprocess.Popen(
            [sys.executable, "manage.py", "gateway"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], 30)
        assert readable, "the gateway says nothing"
        line = self.process.stdout.readline()
        assert line == f"gateway: serves {self.address}\n", line + self.kill()

    def rss_kib(self) -> int:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
        raise AssertionError("no VmRSS")

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(LIMIT_SECONDS)

    def kill(self) -> str:
        """End it for certain; its standard error."""
        self.process.kill()
        _, errors = self.process.communicate(timeout=LIMIT_SECONDS)
        return errors


class BareClient:
    """A socket to the gateway that says what it is told."""

    def __init__(self, address: str) -> None:
        parsed = address_parse(address)
        if isinstance(parsed, UnixAddress):
            self.raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.raw.settimeout(LIMIT_SECONDS)
            with socket_path(parsed.path) as name:
                self.raw.connect(name)
        else:
            self.raw = socket.create_connection((parsed.host, parsed.port), timeout=LIMIT_SECONDS)

    def __enter__(self) -> BareClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.raw.close()

    def send(self, data: bytes) -> BareClient:
        self.raw.sendall(data)
        return self

    def read_all(self) -> bytes:
        parts = []
        while data := self.raw.recv(65536):
            parts.append(data)
        return b"".join(parts)

    def answer(self) -> tuple[int, Any]:
        """Status and JSON of an answer that ends with the connection."""
        head, _, body = self.read_all().partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body)


def signed_request(
    method: str = "GET",
    guest_target: str = "/health",
    *,
    sandbox: str = SANDBOX,
    body: bytes | None = None,
    length: int | None = None,
    chunked: bool = False,
    key: bytes = NODE_KEY,
    signed: bool = True,
    extra: str = "",
) -> bytes:
    """A whole signed request; `length` says more than `body` has when it follows later."""
    target = f"/sandboxes/{sandbox}{guest_target}"
    said = CHUNKED if chunked else str(length if length is not None else len(body or b""))
    lines = [f"{method} {target} HTTP/1.1", "Host: x"]
    lines.append("Transfer-Encoding: chunked" if chunked else f"Content-Length: {said}")
    if signed:
        headers = signed_headers(node_key=key, method=method, target=target, length=said)
        lines += [f"{name}: {value}" for name, value in headers]
    return ("\r\n".join(lines) + "\r\n" + extra + "\r\n").encode() + (body or b"")

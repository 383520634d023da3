"""A real guest for tests: started as a process, spoken to over its socket, and never left running."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

GUEST = Path(__file__).parents[2] / "sandboxes" / "guest"
UID = 10001
FRAME = struct.Struct(">BQI")
STDOUT, STDERR, EXIT, GAP, KEEP_ALIVE = 1, 2, 3, 4, 5


def until(check: Callable[[], Any], what: str, seconds: float = 10) -> Any:
    """Return the first true value of `check`; fail when there is none in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = check()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"not {what} after {seconds} s")


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return str(self.json["code"])


@dataclass(frozen=True)
class Frame:
    kind: int
    offset: int
    payload: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.payload)


class Stream:
    """An open frame stream."""

    def __init__(self, sock: socket.socket, begun: bytes) -> None:
        self.sock = sock
        self._unread = begun

    def __iter__(self) -> Iterator[Frame]:
        while True:
            while len(self._unread) >= FRAME.size:
                kind, offset, length = FRAME.unpack_from(self._unread)
                if len(self._unread) < FRAME.size + length:
                    break
                payload = self._unread[FRAME.size : FRAME.size + length]
                self._unread = self._unread[FRAME.size + length :]
                yield Frame(kind, offset, payload)
            piece = self.sock.recv(1 << 16)
            if not piece:
                assert not self._unread, "a frame was cut"
                return
            self._unread += piece

    def read_until(self, text: bytes) -> bytes:
        """Return output up to and with `text`."""
        seen = b""
        end = time.monotonic() + 20
        for frame in self:
            assert time.monotonic() < end, f"no {text!r} in 20 s: {seen!r}"
            if frame.kind in (STDOUT, STDERR):
                seen += frame.payload
                if text in seen:
                    return seen
        raise AssertionError(f"the stream ended before {text!r}: {seen!r}")

    def close(self) -> None:
        self.sock.close()


@dataclass(frozen=True)
class Ended:
    stdout: bytes
    stderr: bytes
    gaps: list[int]
    exit: dict[str, Any]

    @property
    def code(self) -> int | None:
        code = self.exit["exit_code"]
        assert code is None or isinstance(code, int)
        return code


class Guest:
    """One running guest. `isolated` switches to UID as in a sandbox, and needs root."""

    def __init__(self, folder: Path, *, isolated: bool = False, flags: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.address = str(folder / "guest.sock")
        self.workspace = folder / "workspace"
        self.workspace.mkdir(exist_ok=True)
        command = [sys.executable, "-I", "-S", "-B", str(GUEST / "__main__.py")]
        command += ["--listen", self.address, "--workspace", str(self.workspace)]
        if isolated:
            for place in (folder, *folder.parents):
                if place.stat().st_mode & 0o005 != 0o005 and place != Path("/"):
                    place.chmod(place.stat().st_mode | 0o055)
            os.chown(self.workspace, UID, UID)
            command += ["--uid", str(UID), "--home", str(self.workspace)]
        else:
            command.append("--no-isolation")
        self.process = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, cwd="/")
        self.errors = b""
        self._number = 0
        until(self._answers, "ready")

    def _answers(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(f"the guest ended: {self.process.communicate()[1]!r}")
        with contextlib.suppress(OSError):
            return self.request("GET", "/health").status == 200
        return False

    def close(self) -> None:
        """End it and fail if it complained on the way."""
        self.process.terminate()
        try:
            _, self.errors = self.process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(20)
        try:
            sock.connect(self.address)
        except OSError:
            sock.close()
            raise
        return sock

    def send(self, sock: socket.socket, method: str, target: str, body: bytes | dict[str, Any] = b"") -> None:
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        head = f"{method} {target} HTTP/1.1\r\nHost: guest\r\nContent-Length: {len(data)}\r\n"
        sock.sendall(f"{head}Connection: close\r\n\r\n".encode() + data)

    def request(self, method: str, target: str, body: bytes | dict[str, Any] = b"") -> Answer:
        with self.connect() as sock:
            self.send(sock, method, target, body)
            return answer_on(sock)

    def path(self, target: str, **query: str | int) -> str:
        return f"{target}?{urlencode(query)}"

    def new_id(self) -> str:
        self._number += 1
        return f"p{self._number}"

    def stream(self, target: str, body: dict[str, Any] | None = None) -> Stream:
        sock = self.connect()
        self.send(sock, "GET" if body is None else "POST", target, body or b"")
        head, begun = head_on(sock)
        assert head.status in (200, 201), (head, begun)
        return Stream(sock, begun)

    def start(self, command: str | list[str], **fields: Any) -> str:
        """Start a process and return its id."""
        spec = self.spec(command, fields)
        answer = self.request("POST", "/processes", spec)
        assert answer.status == 201, answer
        return str(spec["id"])

    def spec(self, command: str | list[str], fields: dict[str, Any]) -> dict[str, Any]:
        spec = {"id": self.new_id(), **fields}
        spec["command" if isinstance(command, str) else "argv"] = command
        if isinstance(spec.get("stdin"), bytes):
            spec["stdin"] = base64.b64encode(spec["stdin"]).decode()
        return spec

    def follow(self, command: str | list[str], **fields: Any) -> Stream:
        return self.stream("/processes?follow=1", self.spec(command, fields))

    def run(self, command: str | list[str], **fields: Any) -> Ended:
        """Run to the end."""
        return ended(self.follow(command, **fields))

    def output(self, process_id: str, after: int = 0, follow: int = 1) -> Stream:
        return self.stream(f"/processes/{process_id}/output?after={after}&follow={follow}")

    def get(self, process_id: str) -> dict[str, Any]:
        described = self.request("GET", f"/processes/{process_id}").json
        assert isinstance(described, dict)
        return described

    def wait(self, process_id: str) -> dict[str, Any]:
        def over() -> dict[str, Any] | None:
            described = self.get(process_id)
            return described if described["state"] != "running" else None

        described = until(over, "ended")
        assert isinstance(described, dict)
        return described

    def signal(self, process_id: str, name: str) -> Answer:
        return self.request("POST", f"/processes/{process_id}/signal", {"signal": name})

    def configure(self, **what: Any) -> Answer:
        answer = self.request("PUT", "/configure", what)
        assert answer.status == 200, answer
        return answer

    def read(self, path: str) -> bytes:
        answer = self.request("GET", self.path("/files", path=path))
        assert answer.status == 200, answer
        return answer.body

    def runners(self) -> list[int]:
        return children(self.process.pid)


def ended(stream: Stream) -> Ended:
    """Read a stream to its exit frame and check that it is whole."""
    parts: dict[int, list[bytes]] = {STDOUT: [], STDERR: []}
    gaps: list[int] = []
    at: int | None = None
    last: Frame | None = None
    for frame in stream:
        assert last is None, "a frame after the exit"
        if frame.kind == GAP:
            gaps.append(frame.json["dropped"])
            at = frame.offset
        elif frame.kind == EXIT:
            last = frame
            assert at is None or frame.offset == at
        elif frame.kind != KEEP_ALIVE:
            assert at is None or frame.offset == at, "offsets have a hole"
            at = frame.offset + len(frame.payload)
            parts[frame.kind].append(frame.payload)
    stream.close()
    assert last is not None, "the stream ended without an exit"
    return Ended(b"".join(parts[STDOUT]), b"".join(parts[STDERR]), gaps, last.json)


def head_on(sock: socket.socket) -> tuple[Answer, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(1 << 16)
        assert piece, f"no head: {data!r}"
        data += piece
    head, _, rest = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Answer(int(first.split()[1]), headers, b""), rest


def answer_on(sock: socket.socket) -> Answer:
    """Read one answer by its Content-Length."""
    head, body = head_on(sock)
    pieces = [body]
    left = int(head.headers["content-length"]) - len(body)
    while left > 0:
        piece = sock.recv(min(left, 1 << 16))
        assert piece, "the answer was cut"
        pieces.append(piece)
        left -= len(piece)
    return Answer(head.status, head.headers, b"".join(pieces))


def parent_of(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] == "Z" else int(fields[1])


def children(pid: int) -> list[int]:
    everyone = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [one for one in everyone if parent_of(one) == pid]


def alive(pid: int) -> bool:
    return parent_of(pid) is not None


def marked(marker: str) -> list[int]:
    """Return processes whose command line has `marker`."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid() and alive(int(name)):
            with contextlib.suppress(OSError):
                if marker.encode() in Path(f"/proc/{name}/cmdline").read_bytes():
                    found.append(int(name))
    return found

"""Talk to a guest straight over its socket: enough of its protocol to probe a sandbox from inside."""

from __future__ import annotations

import http.client
import json
import secrets
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from sandboxes.engines.base import SandboxSpec

LIMIT_SECONDS = 20.0
HEADER = struct.Struct(">BQI")


@dataclass(frozen=True)
class Ran:
    """How a command inside ended, and what it printed on either stream."""

    exit_code: int | None
    output: str


class _GuestConnection(http.client.HTTPConnection):
    def __init__(self, spec: SandboxSpec) -> None:
        super().__init__("guest", timeout=LIMIT_SECONDS)
        self.path = spec.folder / "guest" / "guest.sock"

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(LIMIT_SECONDS)
        self.sock.connect(str(self.path))


def ask(spec: SandboxSpec, method: str, path: str, body: object = None) -> tuple[int, bytes]:
    """One request to the guest: status and body."""
    connection = _GuestConnection(spec)
    try:
        sent = None if body is None else json.dumps(body)
        connection.request(method, path, sent, {"Content-Type": "application/json"} if sent else {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def run(spec: SandboxSpec, command: str, *, log_bytes: int = 1 << 20) -> Ran:
    """Run a shell command as the sandbox's uid and wait for its end."""
    order = {"id": secrets.token_hex(8), "command": command, "log_bytes": log_bytes}
    status, body = ask(spec, "POST", "/processes?follow=1", order)
    assert status in {200, 201}, body
    output, exit_code, at = b"", None, 0
    while at < len(body):
        kind, _offset, length = HEADER.unpack_from(body, at)
        payload = body[at + HEADER.size : at + HEADER.size + length]
        at += HEADER.size + length
        if kind in {1, 2}:
            output += payload
        elif kind == 3:
            exit_code = json.loads(payload)["exit_code"]
    return Ran(exit_code, output.decode(errors="replace"))


def wait_until_ready(spec: SandboxSpec) -> None:
    """Wait until the guest answers."""

    def ready() -> bool:
        try:
            return ask(spec, "GET", "/health")[0] == 200
        except OSError:
            return False

    wait_for(ready, f"the guest of {spec.sandbox_id}")


def wait_for(condition: Callable[[], object], what: str, seconds: float = LIMIT_SECONDS) -> None:
    """Wait until a condition holds; fails, saying what was awaited."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} not seen after {seconds:g} s"
        time.sleep(0.005)

"""Over a real uvicorn: what is too large or from nobody is refused before its body is sent (CONTRACT 1)."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.live import LiveStack

pytestmark = pytest.mark.docker

MIB = 1024 * 1024
LIMIT_SECONDS = 15.0


class Wire:
    """One connection, spoken to in bytes."""

    def __init__(self, stack: LiveStack) -> None:
        self.stack = stack
        self.socket = socket.create_connection(("127.0.0.1", stack.port), timeout=LIMIT_SECONDS)

    def head(self, method: str, path: str, *lines: str) -> None:
        head = [
            f"{method} {path} HTTP/1.1",
            f"Host: 127.0.0.1:{self.stack.port}",
            "Content-Type: application/json",
            *lines,
        ]
        self.socket.sendall("\r\n".join([*head, "", ""]).encode())

    def answer(self) -> tuple[int, dict[str, str], dict[str, Any]]:
        """Status, headers and body of the answer that comes now."""
        stream = self.socket.makefile("rb")
        status = int(stream.readline().split()[1])
        headers: dict[str, str] = {}
        while (line := stream.readline().strip()) != b"":
            name, _, value = line.decode().partition(": ")
            headers[name.lower()] = value
        body = stream.read(int(headers.get("content-length", "0")))
        return status, headers, json.loads(body)


@pytest.fixture
def wire(live: LiveStack) -> Iterator[Wire]:
    made = Wire(live)
    with contextlib.closing(made.socket):
        yield made


@pytest.fixture(scope="module")
def bearer(live: LiveStack) -> str:
    return f"Authorization: Bearer {live.api_key('gate@example.com')}"


def test_too_large_by_its_head_is_refused_before_the_body_is_sent(wire: Wire, bearer: str) -> None:
    wire.head("POST", "/v1/sessions", bearer, f"Content-Length: {MIB + 1}")
    status, headers, problem = wire.answer()
    assert (status, problem["code"]) == (413, "too_large")
    assert headers["content-type"] == "application/problem+json"


def test_the_largest_body_is_taken(wire: Wire, bearer: str) -> None:
    body = json.dumps({"agent": {"kind": "no such"}, "user_id": "u", "metadata": {"a": ""}})
    body += " " * (MIB - len(body))
    wire.head("POST", "/v1/sessions", bearer, f"Content-Length: {len(body)}")
    wire.socket.sendall(body.encode())
    status, _, problem = wire.answer()
    assert (status, problem["code"]) == (400, "unknown_agent")


def test_a_stranger_is_refused_before_the_body_is_sent(wire: Wire) -> None:
    wire.head("POST", "/v1/sessions", "Authorization: Bearer e2a_live_wrong", "Content-Length: 100")
    status, headers, problem = wire.answer()
    assert (status, problem["code"]) == (401, "invalid_token")
    assert headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("lines", [["Transfer-Encoding: chunked"], ["Content-Length: 10"]])
def test_nobody_is_refused_before_the_body_is_sent(wire: Wire, lines: list[str]) -> None:
    wire.head("PUT", "/v1/sandboxes/sbx_x/files?path=a", *lines)
    assert wire.answer()[0] == 401


def test_sign_in_takes_a_body_from_anyone_but_no_large_one(wire: Wire) -> None:
    wire.head("POST", "/v1/auth/login", f"Content-Length: {MIB + 1}")
    assert wire.answer()[0] == 413


def test_chunks_that_become_too_large_are_refused_where_they_do(wire: Wire, bearer: str) -> None:
    wire.head("POST", "/v1/sessions", bearer, "Transfer-Encoding: chunked")
    piece = b"x" * 65536
    with contextlib.suppress(ConnectionError):  # The server may close while we still send.
        for _ in range(17):
            wire.socket.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
    status, _, problem = wire.answer()
    assert (status, problem["code"]) == (413, "too_large")


def test_small_chunks_are_one_body(wire: Wire, bearer: str) -> None:
    wire.head("POST", "/v1/sessions", bearer, "Transfer-Encoding: chunked")
    for piece in (b'{"agent": {"kind": "no such"}', b', "user_id": "u"}', b""):
        wire.socket.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
    status, _, problem = wire.answer()
    assert (status, problem["code"]) == (400, "unknown_agent")


@pytest.mark.parametrize("length", ["-1", "1e3", "abc", "+5", "0x10"])
def test_a_length_that_is_none_is_refused(wire: Wire, bearer: str, length: str) -> None:
    wire.head("POST", "/v1/sessions", bearer, f"Content-Length: {length}")
    stream = wire.socket.makefile("rb")
    assert int(stream.readline().split()[1]) == 400


def test_a_length_and_chunks_at_once_are_refused(wire: Wire, bearer: str) -> None:
    wire.head("POST", "/v1/sessions", bearer, "Content-Length: 5", "Transfer-Encoding: chunked")
    wire.socket.sendall(b"0\r\n\r\nGET /v1/me HTTP/1.1\r\n\r\n")
    stream = wire.socket.makefile("rb")
    assert int(stream.readline().split()[1]) in (400, 401)


def test_a_file_over_its_limit_is_refused_before_it_is_sent(wire: Wire, bearer: str) -> None:
    wire.head("PUT", "/v1/sandboxes/sbx_x/files?path=a", bearer, f"Content-Length: {1024 * MIB}")
    assert wire.answer()[0] == 413


def test_refusals_have_the_headers_of_every_answer(wire: Wire) -> None:
    wire.head("POST", "/v1/sessions", "Content-Length: 100", "Origin: https://evil.example")
    status, headers, problem = wire.answer()
    assert status == 401
    assert headers["x-request-id"] == problem["request_id"]
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    assert "object-src 'none'" in headers["content-security-policy"]
    assert "access-control-allow-origin" not in headers
    assert "origin" in headers["vary"].lower()


def test_nothing_but_the_api_has_a_body_before_its_csrf_check(wire: Wire) -> None:
    wire.head("POST", "/sign-in", "Content-Length: 5")
    wire.socket.sendall(b"a=b&c")
    stream = wire.socket.makefile("rb")
    assert int(stream.readline().split()[1]) == 403


def test_a_file_goes_up_and_comes_back_as_an_attachment(live: LiveStack, bearer: str) -> None:
    token = bearer.rpartition(" ")[2]
    made = live.request("POST", "/v1/sandboxes", {}, token=token)
    assert made.status == 201, made.body
    folder = f"/v1/sandboxes/{made.json()['sandbox_id']}/files?path=page.html"
    page = b"<script>alert(1)</script>"
    up = live.request("PUT", folder, page, token=token)
    assert (up.status, up.json()["size"]) == (200, len(page))
    names = {name.lower(): value for name, value in up.headers.items()}
    assert (names["cache-control"], names["x-content-type-options"]) == ("no-store", "nosniff")
    down = live.request("GET", folder, token=token)
    names = {name.lower(): value for name, value in down.headers.items()}
    assert down.body == page
    assert names["content-disposition"].startswith("attachment")
    assert names["content-type"] == "application/octet-stream"
    assert names["content-security-policy"].startswith("sandbox")
    live.request("DELETE", folder.partition("/files")[0], token=token)

"""What is malformed is refused with a reason, and does no harm."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxes.guest import wire
from tests.guest.guest import Answer, Guest, answer_on

BAD_SPECS = [
    {},
    {"id": "x"},
    {"id": "x", "command": "true", "argv": ["true"]},
    {"id": "", "command": "true"},
    {"id": "a/b", "command": "true"},
    {"id": "x\n", "command": "true"},
    {"id": "x" * 65, "command": "true"},
    {"id": 1, "command": "true"},
    {"id": "x", "command": 1},
    {"id": "x", "command": "a\0b"},
    {"id": "x", "argv": []},
    {"id": "x", "argv": [""]},
    {"id": "x", "argv": [1]},
    {"id": "x", "argv": "true"},
    {"id": "x", "command": "true", "env": []},
    {"id": "x", "command": "true", "env": {"A=B": "c"}},
    {"id": "x", "command": "true", "env": {"": "c"}},
    {"id": "x", "command": "true", "env": {"A": 1}},
    {"id": "x", "command": "true", "env": {"A": "\0"}},
    {"id": "x", "command": "true", "stdin": "***"},
    {"id": "x", "command": "true", "stdin": 5},
    {"id": "x", "command": "true", "timeout_seconds": 0},
    {"id": "x", "command": "true", "timeout_seconds": True},
    {"id": "x", "command": "true", "timeout_seconds": "5"},
    {"id": "x", "command": "true", "pty": True},
    {"id": "x", "command": "true", "pty": {"cols": 0, "rows": 1}},
    {"id": "x", "command": "true", "pty": {"columns": 80}},
    {"id": "x", "command": "true", "on_full": "wait"},
    {"id": "x", "command": "true", "log_bytes": 1},
    {"id": "x", "command": "true", "log_bytes": 1 << 40},
    {"id": "x", "command": "true", "keep_stdin_open": 1},
    {"id": "x", "command": "true", "surprise": 1},
]


def raw(guest: Guest, data: bytes) -> Answer:
    with guest.connect() as sock:
        sock.sendall(data)
        return answer_on(sock)


def test_malformed_process_requests_start_nothing(guest: Guest) -> None:
    for spec in BAD_SPECS:
        answer = guest.request("POST", "/processes?follow=1", json.dumps(spec).encode())
        assert (answer.status, answer.code) == (400, "bad_request"), spec
    assert guest.request("GET", "/processes").json == {"processes": []}


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"id": NaN}', b"\xff", b'{"a": 1} x', b"[" * 100_000, b'{"a"}']
)
def test_a_body_that_is_no_json_object_is_a_400(guest: Guest, body: bytes) -> None:
    for method, target in (("POST", "/processes"), ("PUT", "/configure"), ("POST", "/files/mkdir")):
        answer = guest.request(method, target, body)
        assert (answer.status, answer.code) == (400, "bad_request")


@pytest.mark.parametrize(
    "head",
    [
        b"GARBAGE\r\n\r\n",
        b"GET  /health HTTP/1.1\r\n\r\n",
        b"GET health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/2.0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /health HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nContent-Length: 1e3\r\n\r\n",
        b"GET /health HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET /health HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET /health HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"GET /health%zz HTTP/1.1\r\n\r\n",
        b"GET /processes/x/output?after=-1 HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\n folded: x\r\n\r\n",
    ],
)
def test_a_malformed_head_is_refused(guest: Guest, head: bytes) -> None:
    guest.run("true", id="x")
    assert raw(guest, head).status == 400
    assert guest.request("GET", "/health").status == 200


def test_a_head_and_a_body_have_limits(guest: Guest) -> None:
    assert raw(guest, b"GET /health HTTP/1.1\r\nX: " + b"x" * 17_000).status == 431
    large = b"POST /processes HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (3 << 20)
    assert raw(guest, large + b"x" * (3 << 20)).code == "too_large"
    assert raw(guest, b"POST /processes HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n").status == 411


def test_unknown_paths_and_methods(guest: Guest) -> None:
    assert guest.request("GET", "/nothing").code == "no_such_path"
    assert guest.request("GET", "/").code == "no_such_path"
    assert guest.request("GET", "/processes/x/y/z").code == "no_such_path"
    assert guest.request("DELETE", "/health").code == "method_not_allowed"
    assert guest.request("PUT", "/processes/x/signal").code == "method_not_allowed"


def test_configure_is_checked_and_changes_nothing_when_refused(guest: Guest) -> None:
    guest.configure(env={"A": "kept"})
    attempts: list[dict[str, object]] = [
        {"env": []},
        {"env": {"A": None}},
        {"redact": [{"name": "A"}]},
        {"redact": [{"name": "", "value": "12345678"}]},
        {"redact": "x"},
        {"deadline_seconds": -1},
        {"unknown": 1},
        {"env": {"A": "lost"}, "deadline_seconds": "soon"},
    ]
    for wrong in attempts:
        assert guest.request("PUT", "/configure", wrong).status == 400, wrong
    assert guest.run("echo $A").stdout == b"kept\n"
    large = guest.request("PUT", "/configure", {"env": {"A": "x" * (1 << 20)}})
    assert (large.status, large.code) == (413, "environment_too_large")


def test_a_client_that_says_nothing_does_not_keep_others_out(guest: Guest) -> None:
    silent = [guest.connect() for _ in range(150)]
    assert guest.request("GET", "/health").status == 200
    for sock in silent:
        sock.close()


def test_a_client_that_stops_in_the_middle_is_forgotten(guest: Guest) -> None:
    for _ in range(50):
        sock = guest.connect()
        sock.sendall(b"POST /processes HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
        sock.close()
    assert guest.request("GET", "/health").status == 200


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(), JSON))
def test_json_goes_both_ways_as_in_the_standard_library(value: dict[str, object]) -> None:
    assert json.loads(wire.to_json(value)) == value
    assert wire.from_json(json.dumps(value).encode()) == value


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_head_is_a_request_or_refused(head: bytes) -> None:
    try:
        wire.parse_head(head)
    except wire.Refused as refused:
        assert refused.status == 400

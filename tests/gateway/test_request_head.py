"""One strict request a connection, written anew for the guest."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxes.gateway.request_head import LARGEST_HEAD_BYTES, HeadRefused, RequestHead, RequestReader
from tests.gateway.doubles import SANDBOX


def _head(data: bytes) -> RequestHead:
    reader = RequestReader()
    reader.feed(data)
    head = reader.head()
    assert head is not None
    return head


def _refusal(data: bytes) -> HeadRefused:
    with pytest.raises(HeadRefused) as refused:
        reader = RequestReader()
        reader.feed(data)
        if reader.head() is not None:
            reader.body()
    return refused.value


def test_the_guest_gets_the_request_without_what_was_for_the_gateway() -> None:
    head = _head(
        f"POST /sandboxes/{SANDBOX}/processes?follow=1&x=%2F HTTP/1.1\r\nHost: gateway:1\r\n"
        "X-E2A-Time: 1\r\nX-E2A-Nonce: 2\r\nX-E2A-Signature: 3\r\nConnection: keep-alive, x-odd\r\n"
        "Keep-Alive: 5\r\nUpgrade: x\r\nTE: trailers\r\nCookie: c\r\nAuthorization: a\r\n"
        "Content-Type: application/json\r\nRange: bytes=0-1\r\nContent-Length: 2\r\n\r\n{}".encode()
    )
    sandbox_id, target = head.sandbox_and_target()
    assert (sandbox_id, target) == (SANDBOX, "/processes?follow=1&x=%2F")
    assert head.for_guest(target) == (
        b"POST /processes?follow=1&x=%2F HTTP/1.1\r\nhost: guest\r\nconnection: close\r\n"
        b"content-type: application/json\r\nrange: bytes=0-1\r\ncontent-length: 2\r\n\r\n"
    )


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "/healthz2",
        "/sandboxes",
        f"/sandboxes/{SANDBOX}",
        f"/sandboxes/{SANDBOX}?x=/y",
        f"//sandboxes/{SANDBOX}/health",
        "/sandboxes//health",
        f"/other/{SANDBOX}/health",
        f"http://gateway/sandboxes/{SANDBOX}/health",
        "*",
    ],
)
def test_other_paths_lead_nowhere(target: str) -> None:
    with pytest.raises(HeadRefused) as refused:
        _head(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode()).sandbox_and_target()
    assert (refused.value.status, refused.value.code) == (404, "not_found")


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ("GET / HTTP/1.0\r\nHost: x", 505),
        ("HEAD / HTTP/1.1\r\nHost: x", 405),
        ("CONNECT x:1 HTTP/1.1\r\nHost: x", 405),
        ("TRACE / HTTP/1.1\r\nHost: x", 405),
        ("GET / HTTP/1.1", 400),
        ("GET / HTTP/1.1\r\nHost: x\r\nHost: y", 400),
        ("GET / HTTP/2.0\r\nHost: x", 505),
        ("GET  / HTTP/1.1\r\nHost: x", 400),
        ("GET /a b HTTP/1.1\r\nHost: x", 400),
        ("GET /\x00 HTTP/1.1\r\nHost: x", 400),
        ("GET /\xe9 HTTP/1.1\r\nHost: x", 400),
        ("GET / HTTP/1.1\r\nHost: x\r\nX-A: 1\r\nX-A: 2", 400),
        ("GET / HTTP/1.1\r\nHost: x\r\nX-A : 1", 400),
        ("GET / HTTP/1.1\r\nHost: x\r\nX-A: a\x00b", 400),
        ("GET / HTTP/1.1\r\nHost: x\r\nX-A: a\rX-B: b", 400),
        ("GET / HTTP/1.1\r\nHost: x\r\n: a", 400),
        ("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2", 400),
        ("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1", 400),
        ("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +1", 400),
        ("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0x1", 400),
        ("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked", 400),
        ("POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, chunked", 501),
        ("POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip", 501),
        ("POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked", 501),
        ("\x16\x03\x01\x02", 400),
    ],
)
def test_what_our_clients_do_not_send_is_refused(lines: str, status: int) -> None:
    assert _refusal((lines + "\r\n\r\n").encode("latin-1")).status == status


@pytest.mark.parametrize("pieces", [1, 1000])
def test_a_head_over_16_kib_is_refused_however_it_comes(pieces: int) -> None:
    padding = LARGEST_HEAD_BYTES - len(b"GET / HTTP/1.1\r\nHost: x\r\nX: \r\n\r\n")
    for extra, is_taken in ((0, True), (1, False)):
        head = b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * (padding + extra) + b"\r\n\r\n"
        data = head + b"x" * (70_000 - len(head)) if pieces == 1 and not is_taken else head
        reader, found = RequestReader(), None
        step = len(data) // pieces + 1
        try:
            for at in range(0, len(data), step):
                reader.feed(data[at : at + step])
                found = reader.head()
        except HeadRefused as refused:
            assert not is_taken
            assert refused.status == 431
        else:
            assert is_taken
            assert found is not None


def test_a_head_that_never_ends_is_refused() -> None:
    reader = RequestReader()
    with pytest.raises(HeadRefused) as refused:
        for _ in range(100):
            reader.feed(b"GET / HTTP/1.1\r\nHost: x\r\nX: " if reader.head() is None else b"")
            reader.feed(b"a" * 1000)
    assert refused.value.status == 431


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nabc",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET",
    ],
)
def test_a_second_request_on_a_connection_is_refused(data: bytes) -> None:
    assert _refusal(data).detail == "more than one request on a connection"


@pytest.mark.parametrize("chunks", [b"zz\r\n", b"-1\r\n", b"0x1\r\na\r\n", b"1\r\nab\r\n", b"1 1\r\na\r\n"])
def test_broken_chunks_are_refused(chunks: bytes) -> None:
    refusal = _refusal(b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
    assert (refusal.status, refusal.code) == (400, "bad_request")


def _pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(places) if b > a]


def _relayed(data: bytes, cuts: list[int]) -> bytes:
    reader, head, out = RequestReader(), None, b""
    for piece in _pieces(data, cuts):
        reader.feed(piece)
        head = head or reader.head()
        if head is not None:
            out += reader.body()
    assert reader.is_complete
    return out


def _unchunked(data: bytes) -> bytes:
    out = b""
    while True:
        size, _, rest = data.partition(b"\r\n")
        length = int(size, 16)
        out, data = out + rest[:length], rest[length + 2 :]
        if length == 0:
            assert data == b""
            return out


@given(bodies=st.lists(st.binary(min_size=1, max_size=40)), cuts=st.lists(st.integers(0, 2000), max_size=20))
def test_a_chunked_body_arrives_whole_however_it_is_cut(bodies: list[bytes], cuts: list[int]) -> None:
    chunks = b"".join(b"%X;note=1\r\n%b\r\n" % (len(body), body) for body in bodies)
    data = b"PUT / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\nA: b\r\n\r\n"
    assert _unchunked(_relayed(data, cuts)) == b"".join(bodies)


@given(body=st.binary(max_size=400), cuts=st.lists(st.integers(0, 2000), max_size=20))
def test_a_body_by_length_arrives_whole_however_it_is_cut(body: bytes, cuts: list[int]) -> None:
    data = b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    assert _relayed(data, cuts) == body

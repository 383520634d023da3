"""SNI out of what real TLS clients send, however it is cut, and of what nobody honest would."""

from __future__ import annotations

import contextlib
import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxes.egress.client_hello import MOST_BYTES, Hello, NotTls, hello_read


def sent_for(name: str | None, *, alpn: list[str] | None = None) -> bytes:
    """The first flight of OpenSSL's client."""
    context = ssl.create_default_context()
    context.check_hostname = name is not None
    context.verify_mode = ssl.CERT_REQUIRED if name is not None else ssl.CERT_NONE
    if alpn:
        context.set_alpn_protocols(alpn)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


REAL = sent_for("api.example.com", alpn=["h2", "http/1.1"])


def recut(hello: bytes, size: int) -> bytes:
    """The same message in records of at most `size` bytes."""
    message = hello[5:]
    pieces = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join(b"\x16\x03\x01" + len(piece).to_bytes(2, "big") + piece for piece in pieces)


def with_extension(hello: bytes, kind: int, data: bytes) -> bytes:
    """One more extension at the end, all lengths put right."""
    message = bytearray(hello[5:])
    at = 4 + 2 + 32
    at += 1 + message[at]
    at += 2 + int.from_bytes(message[at : at + 2], "big")
    at += 1 + message[at]
    added = kind.to_bytes(2, "big") + len(data).to_bytes(2, "big") + data
    length = int.from_bytes(message[at : at + 2], "big") + len(added)
    message[at : at + 2] = length.to_bytes(2, "big")
    message += added
    message[1:4] = (len(message) - 4).to_bytes(3, "big")
    return b"\x16\x03\x01" + len(message).to_bytes(2, "big") + bytes(message)


def server_name(name: bytes) -> bytes:
    entry = b"\0" + len(name).to_bytes(2, "big") + name
    return len(entry).to_bytes(2, "big") + entry


def test_the_name_is_found_whatever_comes_behind_it() -> None:
    assert hello_read(REAL) == Hello("api.example.com")
    assert hello_read(REAL + b"\x14\x03\x03\0\x01\x01anything") == Hello("api.example.com")
    assert hello_read(sent_for("API.Example.com")) == Hello("api.example.com")


def test_without_a_name_there_is_none() -> None:
    assert hello_read(sent_for(None)) == Hello(None)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000])
def test_it_may_be_cut_over_records(size: int) -> None:
    assert hello_read(recut(REAL, size)) == Hello("api.example.com")


@pytest.mark.parametrize("size", [7, 4096])
def test_no_beginning_of_one_is_mistaken(size: int) -> None:
    whole = recut(REAL, size)
    assert all(hello_read(whole[:count]) is None for count in range(len(whole)))


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n", b"SSH-2.0-x\r\n", b"\x80\x2e\x01\x00\x02", b"\x17\x03\x03\0\x01x",
        b"\x16\x02\0\0\x01\x01",
        b"\x16\x03\x01\0\0", b"\x16\x03\x01\xff\xff", b"\x16\x03\x01\0\x04\x02\0\0\0", b"\x16\x03\x01\0\x04\x01\0\0\0",
        b"\x16\x03\x01\0\x04\x01\xff\xff\xff",
    ],
)  # fmt: skip
def test_what_is_no_hello_is_refused(sent: bytes) -> None:
    with pytest.raises(NotTls):
        hello_read(sent)


def test_two_names_are_refused() -> None:
    with pytest.raises(NotTls, match="two server names"):
        hello_read(with_extension(REAL, 0, server_name(b"other.example.com")))
    twice = server_name(b"a.example.com")[2:] + server_name(b"b.example.com")[2:]
    with pytest.raises(NotTls):
        hello_read(with_extension(sent_for(None), 0, len(twice).to_bytes(2, "big") + twice))


def test_unknown_extensions_and_ech_change_nothing() -> None:
    """The outer name is what counts: an inner one goes to the server that the outer one names."""
    assert hello_read(with_extension(REAL, 0xFE0D, b"\0" * 200)) == Hello("api.example.com")


def test_a_hello_without_an_end_is_given_up() -> None:
    endless = b"\x16\x03\x01\x40\0" + b"\x01\0\x7f\xff" + b"\0" * (MOST_BYTES * 2)
    with pytest.raises(NotTls):
        hello_read(endless[:MOST_BYTES])


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(sent: bytes) -> None:
    for begun in (sent, b"\x16\x03\x01" + sent):
        with contextlib.suppress(NotTls):
            hello_read(begun)


@given(st.integers(0, len(REAL) - 1), st.integers(0, 255))
def test_a_changed_byte_never_breaks_the_reader(at: int, byte: int) -> None:
    changed = REAL[:at] + bytes([byte]) + REAL[at + 1 :]
    with contextlib.suppress(NotTls):
        hello_read(changed)

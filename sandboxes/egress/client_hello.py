"""The host name in the first bytes of a TLS connection (RFC 8446 4.1.2, RFC 6066 3). Reads nothing else of it.

A CONNECT tunnel must carry TLS whose SNI is the host that was asked for. The bytes come from inside a sandbox, so
everything is bounded and nothing is trusted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MOST_BYTES: Final = 32 * 1024
"""A ClientHello with post-quantum key shares has some 1.8 KiB; nobody's has so much."""

_HANDSHAKE: Final = 22
_CLIENT_HELLO: Final = 1
_SERVER_NAME: Final = 0
_HOST_NAME: Final = 0
_MOST_RECORD: Final = 1 << 14


class NotTls(Exception):
    """What came is no ClientHello, or a broken one."""


@dataclass(frozen=True, slots=True)
class Hello:
    """A whole ClientHello was seen."""

    server_name: str | None
    """As it stands in SNI, lower-case, without a dot at the end; None when there is none."""


def hello_read(begun: bytes) -> Hello | None:
    """The ClientHello at the beginning of a stream; None while it is not all there. Raises NotTls."""
    message = _message(begun)
    if message is None:
        if len(begun) >= MOST_BYTES:
            raise NotTls(f"no end of a ClientHello in {MOST_BYTES} bytes")
        return None
    return Hello(_server_name(_Reader(message)))


def _message(begun: bytes) -> bytes | None:
    """The handshake message, which may be cut over several records; None while it is not whole."""
    message, at = b"", 0
    while True:
        if begun[at : at + 1] and begun[at] != _HANDSHAKE:
            raise NotTls("the first record is no handshake")
        if begun[at + 1 : at + 2] and begun[at + 1] != 3:
            raise NotTls("not a version of TLS")
        if len(begun) < at + 5:
            return None
        length = int.from_bytes(begun[at + 3 : at + 5], "big")
        if not 0 < length <= _MOST_RECORD:
            raise NotTls("a record of a wrong length")
        message += begun[at + 5 : at + 5 + length]
        if message and message[0] != _CLIENT_HELLO:
            raise NotTls("the first message is no ClientHello")
        if len(message) >= 4:
            whole = 4 + int.from_bytes(message[1:4], "big")
            if whole > MOST_BYTES:
                raise NotTls("a ClientHello that is too long")
            if len(message) >= whole:
                return message[4:whole]
        at += 5 + length
        if len(begun) <= at:
            return None


class _Reader:
    """Takes fields off the front. Raises NotTls when there is less than is asked for."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def is_done(self) -> bool:
        return self._at == len(self._data)

    def take(self, count: int) -> bytes:
        found = self._data[self._at : self._at + count]
        if len(found) != count:
            raise NotTls("it ends in the middle of a field")
        self._at += count
        return found

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def block(self, size: int) -> _Reader:
        """What a length of `size` bytes goes before."""
        return _Reader(self.take(self.number(size)))


def _server_name(hello: _Reader) -> str | None:
    hello.take(2 + 32)  # Version and random.
    for size in (1, 2, 1):  # Session id, cipher suites, compression methods.
        hello.block(size)
    if hello.is_done():
        return None
    extensions = hello.block(2)
    if not hello.is_done():
        raise NotTls("there is something behind the extensions")
    found: str | None = None
    seen = False
    while not extensions.is_done():
        kind, data = extensions.number(2), extensions.block(2)
        if kind != _SERVER_NAME:
            continue
        if seen:
            raise NotTls("two server names")  # Whose server would believe which?
        seen = True
        names = data.block(2)
        if not data.is_done():
            raise NotTls("there is something behind the server name")
        while not names.is_done():
            what, name = names.number(1), names.take(names.number(2))
            if what != _HOST_NAME or found is not None or not name.isascii():
                raise NotTls("a server name that is no host name")
            found = name.decode().lower().removesuffix(".")
    return found or None

"""What of a VNC client's bytes a server may see from somebody who only looks on. No I/O.

RFB (RFC 6143): a version, the choice of a security type, whether to share, then messages by a type byte. Those that ask
for pictures are passed on; keys, pointer, clipboard, resizing and whatever is not known are not.
"""

from __future__ import annotations

from typing import Final

_LENGTHS: Final = {0: 20, 2: 4, 3: 10, 4: 8, 5: 6, 6: 8, 150: 10, 248: 9, 250: 4, 251: 8, 255: 12}
"""Bytes of each message's fixed part, its type included."""
_PASSED: Final = frozenset({0, 2, 3, 150, 248})
LONGEST_MESSAGE: Final = 1024 * 1024


class ViewOnlyRefused(Exception):
    """A client said something after which nobody knows where its next message begins."""


class ViewOnly:
    """Feed what the client sends; get what the server is sent."""

    def __init__(self) -> None:
        self._waiting = b""
        self._stage = 0

    def feed(self, data: bytes) -> bytes:
        """Raises `ViewOnlyRefused`."""
        self._waiting += data
        passed = b""
        while (length := self._length()) is not None and len(self._waiting) >= length:
            message, self._waiting = self._waiting[:length], self._waiting[length:]
            passed += self._take(message)
        return passed

    def _length(self) -> int | None:
        """Bytes of what comes next; None while that is not known."""
        if self._stage < 3:
            return (12, 1, 1)[self._stage]
        if not self._waiting:
            return None
        kind = self._waiting[0]
        length = _LENGTHS.get(kind)
        if length is None:
            raise ViewOnlyRefused(f"a message of the unknown type {kind}")
        if len(self._waiting) < length:
            return None
        if kind == 2:
            length += 4 * int.from_bytes(self._waiting[2:4], "big")
        elif kind == 6:
            length += abs(int.from_bytes(self._waiting[4:8], "big", signed=True))
        elif kind == 248:
            length += self._waiting[8]
        elif kind == 251:
            length += 16 * self._waiting[6]
        if length > LONGEST_MESSAGE:
            raise ViewOnlyRefused("a message of over 1 MiB")
        return length

    def _take(self, message: bytes) -> bytes:
        if self._stage == 0:
            if message not in (b"RFB 003.007\n", b"RFB 003.008\n"):
                raise ViewOnlyRefused("a version other than 3.7 and 3.8")
        elif self._stage == 1:
            if message != b"\x01":
                raise ViewOnlyRefused("a security type other than None")
        elif self._stage == 2:
            message = b"\x01"  # Shared: who looks on throws nobody out.
        elif message[0] == 255 and message[1] != 0:
            raise ViewOnlyRefused("an unknown QEMU message")
        else:
            return message if message[0] in _PASSED else b""
        self._stage += 1
        return message

"""Just enough PNG to look at a pixel: 8 bit, RGB or RGBA, not interlaced."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Picture:
    width: int
    height: int
    rows: list[bytes]
    channels: int

    def pixel(self, x: int, y: int) -> tuple[int, int, int]:
        at = x * self.channels
        red, green, blue = self.rows[y][at : at + 3]
        return red, green, blue

    def differing(self, other: Picture) -> int:
        """In how many rows the two differ."""
        return sum(mine != theirs for mine, theirs in zip(self.rows, other.rows, strict=True))


def read_png(data: bytes) -> Picture:
    """Decode. Fails on what no screenshot of ours is."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n", data[:40]
    at, packed, width, height, channels = 8, b"", 0, 0, 0
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        at += 12 + length
        if kind == b"IHDR":
            width, height, depth, colour, _compression, _filter, interlace = struct.unpack(">IIBBBBB", body)
            assert (depth, interlace) == (8, 0), (depth, interlace)
            channels = {2: 3, 6: 4}[colour]
        elif kind == b"IDAT":
            packed += body
    return Picture(width, height, _rows(zlib.decompress(packed), width * channels, channels), channels)


def _rows(raw: bytes, stride: int, channels: int) -> list[bytes]:
    rows: list[bytes] = []
    above = bytes(stride)
    for start in range(0, len(raw), stride + 1):
        row = bytearray(raw[start + 1 : start + 1 + stride])
        how = raw[start]
        for i in range(stride if how else 0):
            left = row[i - channels] if i >= channels else 0
            corner = above[i - channels] if i >= channels else 0
            row[i] = (row[i] + _predicted(how, left, above[i], corner)) & 255
        above = bytes(row)
        rows.append(above)
    return rows


def _predicted(how: int, left: int, up: int, corner: int) -> int:
    if how == 1:
        return left
    if how == 2:
        return up
    if how == 3:
        return (left + up) // 2
    near = left + up - corner
    return min((left, up, corner), key=lambda one: abs(near - one))

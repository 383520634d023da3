"""A stream's encryption: any length comes back, and nothing that was changed, moved or cut is ever let out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from secrets_vault import crypto
from secrets_vault.crypto import STREAM_CHUNK_BYTES, TAG_BYTES, SecretCorrupt

KEY = bytes(range(32))
WHOLE = STREAM_CHUNK_BYTES + TAG_BYTES


@pytest.fixture(autouse=True)
def _empty_redis() -> None:
    """No test here speaks with Redis."""


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


def sealed(data: bytes, bound_to: str = "a") -> bytes:
    return b"".join(crypto.stream_encrypt(pieces(data, 70_001), key=KEY, bound_to=bound_to))


def opened(data: bytes, bound_to: str = "a", key: bytes = KEY) -> bytes:
    return b"".join(crypto.stream_decrypt(pieces(data, 33_333), key=key, bound_to=bound_to))


@pytest.mark.parametrize(
    "size", [0, 1, STREAM_CHUNK_BYTES - 1, STREAM_CHUNK_BYTES, STREAM_CHUNK_BYTES + 1, 3_500_000]
)
def test_any_length_comes_back(size: int) -> None:
    data = bytes(at * 7 & 255 for at in range(1000)) * (size // 1000 + 1)
    assert opened(sealed(data[:size])) == data[:size]


def test_what_was_changed_moved_or_cut_is_not_let_out() -> None:
    data = b"x" * STREAM_CHUNK_BYTES + b"y" * STREAM_CHUNK_BYTES + b"z" * 1000
    whole = sealed(data)
    head, first, second, last = (
        whole[:4],
        whole[4 : 4 + WHOLE],
        whole[4 + WHOLE : 4 + 2 * WHOLE],
        whole[4 + 2 * WHOLE :],
    )
    changed = bytearray(whole)
    changed[100] ^= 1
    for wrong in (
        bytes(changed),
        whole[:-1],
        head + first + second,
        head + first,
        head,
        b"",
        head + second + first + last,
        head + first + last,
        whole + b"x",
        b"e2a\x02" + whole[4:],
    ):
        with pytest.raises(SecretCorrupt):
            opened(wrong)
    for bound_to, key in (("b", KEY), ("a", bytes(32))):
        with pytest.raises(SecretCorrupt):
            opened(whole, bound_to, key)


def test_bytes_before_the_damage_come_out_checked_only() -> None:
    data = b"x" * STREAM_CHUNK_BYTES + b"y" * 1000
    whole = bytearray(sealed(data))
    whole[-1] ^= 1
    out: list[bytes] = []
    with pytest.raises(SecretCorrupt):
        out.extend(crypto.stream_decrypt([bytes(whole)], key=KEY, bound_to="a"))
    assert b"y" not in b"".join(out)

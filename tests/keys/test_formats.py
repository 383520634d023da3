"""The form of a key (CONTRACT 3, SECURITY 3.1, 3.2). Pure."""

from __future__ import annotations

import re
import zlib

import pytest

from keys import formats

PUBLISHED = re.compile(r"\be2a_(live|test)_[0-9A-Za-z]{36}\b")


def test_3_1_ten_thousand_keys_have_the_form_verify_and_differ() -> None:
    keys = {formats.key_make() for _ in range(10_000)}
    assert len(keys) == 10_000
    assert all(PUBLISHED.fullmatch(key) and key.startswith("e2a_live_") for key in keys)
    assert all(formats.is_well_formed(key) for key in keys)
    assert len({formats.lookup_of(key) for key in keys}) == 10_000


def test_the_checksum_is_crc32_in_base62_as_documented() -> None:
    body = "e2a_live_" + "0" * 30
    assert zlib.crc32(body.encode()) == 1161954648
    digits = "1GdRU0"
    assert (
        sum(formats.ALPHABET.index(digit) * 62**power for power, digit in enumerate(reversed(digits)))
        == 1161954648
    )
    assert formats.checksum(body) == digits
    assert formats.ALPHABET == "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def test_3_2_every_single_character_mutation_is_noticed() -> None:
    key = formats.key_make()
    for position, old in enumerate(key):
        for new in formats.ALPHABET + "_-. é":
            if new != old:
                assert not formats.is_well_formed(key[:position] + new + key[position + 1 :])


@pytest.mark.parametrize("change", ["", " ", "\n", "x"])
def test_nothing_may_follow_or_precede(change: str) -> None:
    key = formats.key_make()
    assert formats.is_well_formed(key)
    assert not change or not formats.is_well_formed(key + change)
    assert not change or not formats.is_well_formed(change + key)
    assert not formats.is_well_formed("")

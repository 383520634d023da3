"""The form of an API key, and how it is stored. Pure: no database.

    e2a_live_ 4kT0pQ9aXz1B 7cVn2LrW8sYd5MfGh6 2kQx9A
    └ marker  └ look-up    └ secret           └ checksum

30 random base62 characters (178 bits) follow the marker. The first 12 are the look-up part (71 bits, unique
in the database), the other 18 (107 bits) exist in the key only. The checksum is the CRC32 (zlib, IEEE
802.3, unsigned) of the 39 ASCII bytes before it, written in base62 with the digits 0-9, A-Z, a-z in this
order, most significant first, padded with `0` on the left to 6 characters. A scanner can tell a real key
offline by it, and a mistyped one costs no query.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import zlib

from e2a.core.keyring import Key

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
MARKER = "e2a_live_"
RANDOM_CHARS = 30
LOOKUP_CHARS = 12
CHECKSUM_CHARS = 6
PREFIX_CHARS = 12
"""How much of a key is shown in lists: the marker and three characters."""

PATTERN = re.compile(r"e2a_live_[0-9A-Za-z]{36}")


def key_make() -> str:
    """A fresh key."""
    body = MARKER + "".join(secrets.choice(ALPHABET) for _ in range(RANDOM_CHARS))
    return body + checksum(body)


def checksum(body: str) -> str:
    """The last six characters of the key that begins with `body`."""
    number = zlib.crc32(body.encode())
    digits = ""
    for _ in range(CHECKSUM_CHARS):
        number, digit = divmod(number, 62)
        digits = ALPHABET[digit] + digits
    return digits


def is_well_formed(key: str) -> bool:
    """Whether `key` has the form and the checksum fits. Says nothing about its being known."""
    return PATTERN.fullmatch(key) is not None and checksum(key[:-CHECKSUM_CHARS]) == key[-CHECKSUM_CHARS:]


def lookup_of(key: str) -> str:
    """The part that the row is found by: the marker and twelve characters."""
    return key[: len(MARKER) + LOOKUP_CHARS]


def digest_of(key: str, pepper: Key) -> str:
    """What is stored: HMAC-SHA-256 of the whole key under a pepper derived from a signing key, in hex."""
    return hmac.new(pepper.derive("api-key"), key.encode(), hashlib.sha256).hexdigest()

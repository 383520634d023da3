"""Key rings: named 256-bit keys, newest first. The newest makes, all of them check."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from dataclasses import dataclass, field

_ID = re.compile(r"^[a-z0-9][a-z0-9-]{0,15}$")


class KeyRingError(ValueError):
    """The text of a key ring is not usable; says why without the key."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a ring. `secret` has at least 32 bytes."""

    id: str
    secret: bytes = field(repr=False)

    def derive(self, purpose: str) -> bytes:
        """32 bytes for one purpose: HMAC-SHA-256 as the extract-free step of HKDF (RFC 5869), keys being uniform."""
        return hmac.digest(self.secret, b"e2a/" + purpose.encode() + b"\x01", hashlib.sha256)


@dataclass(frozen=True, slots=True)
class KeyRing:
    """Keys, newest first. An empty ring belongs to a process that may not hold keys: using it raises."""

    keys: tuple[Key, ...]

    @classmethod
    def parse(cls, text: str) -> KeyRing:
        """Parse `id:base64,id:base64`. Raises `KeyRingError` on a short, weak, double or malformed key."""
        keys: list[Key] = []
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            key_id, separator, encoded = part.partition(":")
            if not separator or not _ID.match(key_id):
                raise KeyRingError(
                    "each key is written id:base64, the id of lower-case letters, digits and '-'"
                )
            try:
                secret = base64.b64decode(encoded, validate=True)
            except (binascii.Error, ValueError) as error:
                raise KeyRingError(f"key {key_id!r} is not base64") from error
            if len(secret) < 32:
                raise KeyRingError(f"key {key_id!r} has {len(secret)} bytes; at least 32 are needed")
            if len(set(secret)) < 8:
                raise KeyRingError(f"key {key_id!r} looks like an example: too few different bytes")
            if any(key.id == key_id for key in keys):
                raise KeyRingError(f"key id {key_id!r} is there twice")
            keys.append(Key(key_id, secret))
        if not keys:
            raise KeyRingError("there is no key in it")
        return cls(tuple(keys))

    @property
    def newest(self) -> Key:
        """The key that new things are made with. Raises `KeyRingError` in a process without keys."""
        if not self.keys:
            raise KeyRingError("this process holds no keys (its role forbids it, or they are not set)")
        return self.keys[0]

    def find(self, key_id: str) -> Key | None:
        """The key of that id, or `None`."""
        return next((key for key in self.keys if key.id == key_id), None)

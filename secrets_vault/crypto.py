"""The vault's cryptography, and the text type that hides itself. The only module that imports `cryptography`.

Everything is AES-256-GCM (NIST SP 800-38D) with a random 96-bit nonce, stored as

    format byte (1) | nonce (12) | ciphertext and tag

A tenant's data key encrypts its values and sealed blobs: 2^32 of them before a nonce repeats with a
probability of 2^-33. The data key itself is wrapped by a key of the operator's ring (`E2A_VAULT_KEYS`), the
newest one when it is made. What a ciphertext is bound to (its associated data) begins with a word for its
kind and has length-prefixed parts, so that no two meanings share one encoding.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterable, Iterator
from typing import Final, NoReturn, final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from e2a.core.errors import OurError
from e2a.core.keyring import Key, KeyRing

FORMAT: Final = b"\x01"
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
SALT_BYTES: Final = 16
STREAM_CHUNK_BYTES: Final = 1024 * 1024
STREAM_FORMAT: Final = b"e2a\x01"

_WRAP_PURPOSE: Final = "vault/wrap"
_PASSPHRASE_PURPOSE: Final = "vault/passphrase"  # noqa: S105  (a name, not a secret)


class SecretCorrupt(OurError):
    """A stored secret does not open: a bit changed, it was copied from elsewhere, or its key is gone.

    `names` says which values, by name. The caller sees an opaque 500; log and audit trail have the code.
    """

    code = "secret_corrupt"
    title = "A stored secret does not open"

    def __init__(self, detail: str = "", *, names: tuple[str, ...] = ()) -> None:
        super().__init__(detail)
        self.names = names


class VaultKeyMissing(OurError):
    """The ring has no key of the id that something was wrapped with: the operator removed it too early."""

    code = "vault_key_missing"
    title = "A vault key is not in the ring"


@final
class SecretText:
    """A secret text that shows itself only to who asks with `reveal()`.

    Its `repr`, `str` and `format` are fixed; it cannot be pickled, copied by pickling or made JSON; it
    compares in constant time and only with its own kind.
    """

    __slots__ = ("_text",)
    _text: str

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The plaintext. Use it at once and let go of it."""
        return self._text

    def __repr__(self) -> str:
        return "SecretText(hidden)"

    def __str__(self) -> str:
        return "[hidden]"

    def __format__(self, spec: str) -> str:
        return "[hidden]"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SecretText):
            return NotImplemented
        return hmac.compare_digest(self._text.encode(), other._text.encode())

    __hash__ = None  # type: ignore[assignment]  # a hash of a secret is a way to guess it

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a SecretText cannot be pickled or copied")

    def __getstate__(self) -> NoReturn:
        raise TypeError("a SecretText cannot be pickled or copied")


def _bound_to(kind: str, *parts: str) -> bytes:
    """Associated data: kind and parts, each with its length before it."""
    encoded = [part.encode() for part in ("e2a", kind, *parts)]
    return b"".join(len(part).to_bytes(4, "big") + part for part in encoded)


def _encrypt(key: bytes, data: bytes, bound_to: bytes) -> bytes:
    nonce = os.urandom(NONCE_BYTES)
    return FORMAT + nonce + AESGCM(key).encrypt(nonce, data, bound_to)


def _decrypt(key: bytes, stored: bytes, bound_to: bytes) -> bytes:
    if len(stored) < 1 + NONCE_BYTES + TAG_BYTES or stored[:1] != FORMAT:
        raise SecretCorrupt("the stored form is not one of ours")
    try:
        return AESGCM(key).decrypt(stored[1 : 1 + NONCE_BYTES], stored[1 + NONCE_BYTES :], bound_to)
    except InvalidTag:
        raise SecretCorrupt("the ciphertext does not belong here, or a bit of it changed") from None


def _ring_key(ring: KeyRing, key_id: str) -> Key:
    key = ring.find(key_id)
    if key is None:
        raise VaultKeyMissing(f"E2A_VAULT_KEYS has no key {key_id!r}")
    return key


def data_key_make() -> bytes:
    """A fresh 256-bit data key."""
    return AESGCM.generate_key(bit_length=256)


def data_key_wrap(data_key: bytes, *, key: Key, tenant_id: str) -> bytes:
    """The data key under a key of the ring, bound to the tenant and to that key's id."""
    return _encrypt(key.derive(_WRAP_PURPOSE), data_key, _bound_to("data-key", tenant_id, key.id))


def data_key_unwrap(wrapped: bytes, *, ring: KeyRing, key_id: str, tenant_id: str) -> bytes:
    """Raises `VaultKeyMissing` for an id that the ring does not know, `SecretCorrupt` when it does not
    open.
    """
    key = _ring_key(ring, key_id)
    return _decrypt(key.derive(_WRAP_PURPOSE), wrapped, _bound_to("data-key", tenant_id, key.id))


def value_encrypt(
    text: SecretText, *, data_key: bytes, tenant_id: str, bundle_id: str, name: str, version: int
) -> bytes:
    """One value, bound to its tenant, bundle, name and version: a row copied elsewhere does not open."""
    return _encrypt(
        data_key, text.reveal().encode(), _bound_to("value", tenant_id, bundle_id, name, str(version))
    )


def value_decrypt(
    stored: bytes, *, data_key: bytes, tenant_id: str, bundle_id: str, name: str, version: int
) -> SecretText:
    """Raises `SecretCorrupt`."""
    data = _decrypt(data_key, stored, _bound_to("value", tenant_id, bundle_id, name, str(version)))
    return SecretText(data.decode())


def blob_encrypt(data: bytes, *, data_key: bytes, tenant_id: str, purpose: str) -> bytes:
    """Any bytes, bound to their tenant and purpose."""
    return _encrypt(data_key, data, _bound_to("blob", tenant_id, purpose))


def blob_decrypt(stored: bytes, *, data_key: bytes, tenant_id: str, purpose: str) -> bytes:
    """Raises `SecretCorrupt`."""
    return _decrypt(data_key, stored, _bound_to("blob", tenant_id, purpose))


def stream_key_make() -> bytes:
    """A fresh 256-bit key for one stream. A stream's nonces count, so a key must never be used for two."""
    return AESGCM.generate_key(bit_length=256)


def stream_encrypt(pieces: Iterable[bytes], *, key: bytes, bound_to: str) -> Iterator[bytes]:
    """A stream of any length in memory of two chunks: `format | chunk…`, each chunk 1 MiB and its tag.

    The STREAM construction (Hoang, Reyhanitabar, Rogaway, Vizar 2015): the nonce is a counter and a flag that
    only the last chunk has set, so chunks cannot be moved, dropped or cut off at the end.
    """
    cipher = AESGCM(key)
    associated = _bound_to("stream", bound_to)
    yield STREAM_FORMAT
    kept = bytearray()
    number = 0
    for piece in pieces:
        kept += piece
        # More than a chunk: whether it is the last one is known only then.
        while len(kept) > STREAM_CHUNK_BYTES:
            chunk = bytes(kept[:STREAM_CHUNK_BYTES])
            del kept[:STREAM_CHUNK_BYTES]
            yield cipher.encrypt(_stream_nonce(number, is_last=False), chunk, associated)
            number += 1
    yield cipher.encrypt(_stream_nonce(number, is_last=True), bytes(kept), associated)


def stream_decrypt(pieces: Iterable[bytes], *, key: bytes, bound_to: str) -> Iterator[bytes]:
    """Only bytes that were checked come out. Raises `SecretCorrupt` at the first that do not open, and for an end
    that is missing."""
    cipher = AESGCM(key)
    associated = _bound_to("stream", bound_to)
    kept = bytearray()
    number = 0
    size = STREAM_CHUNK_BYTES + TAG_BYTES
    is_begun = False

    def opened(chunk: bytes, *, is_last: bool) -> bytes:
        try:
            return cipher.decrypt(_stream_nonce(number, is_last=is_last), chunk, associated)
        except InvalidTag:
            raise SecretCorrupt(f"chunk {number} of a stream does not belong here, or it was cut") from None

    for piece in pieces:
        kept += piece
        if not is_begun and len(kept) >= len(STREAM_FORMAT):
            if kept[: len(STREAM_FORMAT)] != STREAM_FORMAT:
                raise SecretCorrupt("the stored form is not one of ours")
            del kept[: len(STREAM_FORMAT)]
            is_begun = True
        while is_begun and len(kept) > size:
            yield opened(bytes(kept[:size]), is_last=False)
            del kept[:size]
            number += 1
    if not is_begun or len(kept) < TAG_BYTES:
        raise SecretCorrupt("a stream was cut")
    yield opened(bytes(kept), is_last=True)


def _stream_nonce(number: int, *, is_last: bool) -> bytes:
    return number.to_bytes(NONCE_BYTES - 1, "big") + bytes([is_last])


def _passphrase_key(key: Key, salt: bytes, passphrase: str) -> bytes:
    # The passphrase may be weak (a caller's Idempotency-Key): the ring's key is a pepper, so that the
    # database alone does not even allow to guess it; and without the passphrase the ring alone opens nothing
    # that is not weak.
    kdf = HKDF(algorithm=SHA256(), length=32, salt=salt, info=b"e2a/passphrase")
    return kdf.derive(key.derive(_PASSPHRASE_PURPOSE) + passphrase.encode())


def passphrase_encrypt(data: bytes, *, passphrase: str, ring: KeyRing) -> bytes:
    """Bytes under a passphrase and the newest key of the ring: `length of key id | key id | salt |
    sealed`.
    """
    key = ring.newest
    salt = os.urandom(SALT_BYTES)
    head = bytes([len(key.id)]) + key.id.encode() + salt
    return head + _encrypt(_passphrase_key(key, salt, passphrase), data, _bound_to("passphrase") + head)


def passphrase_decrypt(stored: bytes, *, passphrase: str, ring: KeyRing) -> bytes:
    """Raises `SecretCorrupt` for another passphrase or changed bytes, `VaultKeyMissing` for a key that is
    gone.
    """
    head_bytes = 1 + (stored[0] if stored else 0) + SALT_BYTES
    head, sealed = stored[:head_bytes], stored[head_bytes:]
    if len(head) < head_bytes or not head[1:-SALT_BYTES].isascii():
        raise SecretCorrupt("the stored form is not one of ours")
    key = _ring_key(ring, head[1:-SALT_BYTES].decode())
    derived = _passphrase_key(key, head[-SALT_BYTES:], passphrase)
    return _decrypt(derived, sealed, _bound_to("passphrase") + head)

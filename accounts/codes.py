"""One-time codes: derived, not stored. Pure.

A flow's row holds a random nonce and the id of a signing key; the code is a function of both and exists
only where the key ring is: in the task that mails it, and for a moment in the check. So it is in no column
and no task argument, and a dump of the database yields nothing. `digest` is what a try is compared with
(SECURITY 1.9).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets

from e2a.core.keyring import Key

SHORT_DIGITS = 6
LONG_CHARS = 16
"""80 bits in base32, after 20 failures in a row (SECURITY 1.4)."""


def nonce_make() -> str:
    """128 random bits in hex."""
    return secrets.token_hex(16)


def code_of(key: Key, *, login_id: str, nonce: str, is_long: bool) -> str:
    """The code of that flow: six digits, or sixteen base32 characters."""
    random = hmac.new(key.derive("otp-code"), f"{login_id}|{nonce}".encode(), hashlib.sha256).digest()
    if is_long:
        return base64.b32encode(random[:10]).decode()
    return (
        f"{int.from_bytes(random) % 10**SHORT_DIGITS:0{SHORT_DIGITS}d}"  # 256 bits: the bias is below 2^-230.
    )


def digest(key: Key, *, login_id: str, email_key: str, code: str) -> str:
    """HMAC-SHA-256 of flow, address and code, in hex."""
    message = f"{login_id}|{email_key}|{code}".encode()
    return hmac.new(key.derive("otp-digest"), message, hashlib.sha256).hexdigest()


def normalised(typed: str) -> str:
    """What a person typed, without the blanks and hyphens that help reading, in upper case."""
    return "".join(typed.split()).replace("-", "").upper()


def spaced(code: str) -> str:
    """A long code in groups of four; a short one as it is."""
    if len(code) == SHORT_DIGITS:
        return code
    return "-".join(code[start : start + 4] for start in range(0, len(code), 4))

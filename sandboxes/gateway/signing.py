"""Who may speak to guests: requests signed with the node key, each once, within half a minute.

The signature covers method, path with query, time, nonce and length of the body, not the body itself: a
stream is not known when its head is sent. Between hosts the TCP address therefore belongs on a private
network or inside TLS.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping

TIME_HEADER = "x-e2a-time"
NONCE_HEADER = "x-e2a-nonce"
SIGNATURE_HEADER = "x-e2a-signature"
SIGNATURE_HEADERS = frozenset({TIME_HEADER, NONCE_HEADER, SIGNATURE_HEADER})

CHUNKED = "chunked"
"""Stands for the length of a body that is sent in chunks."""

ALLOWED_SKEW_SECONDS = 30

_TIME = re.compile(r"[0-9]{1,12}")
_NONCE = re.compile(r"[0-9a-f]{32}")
_SIGNATURE = re.compile(r"[0-9a-f]{64}")


class SignatureRefused(Exception):
    """The request is not one that a holder of the node key sent now.

    The text is for the log, never for the caller.
    """


class NonceCacheFull(Exception):
    """More signed requests within a minute than the cache remembers: refusing is the only safe answer."""


def signature(*, node_key: bytes, method: str, target: str, sent_at: str, nonce: str, length: str) -> str:
    """The hex HMAC-SHA256. `length` is the Content-Length, `0` without a body, or `CHUNKED`."""
    text = f"{method}\n{target}\n{sent_at}\n{nonce}\n{length}"
    return hmac.new(node_key, text.encode(), hashlib.sha256).hexdigest()


def signed_headers(*, node_key: bytes, method: str, target: str, length: str) -> list[tuple[str, str]]:
    """The three headers of a request that is sent now. Not to be sent twice."""
    sent_at, nonce = str(int(time.time())), secrets.token_hex(16)
    value = signature(
        node_key=node_key, method=method, target=target, sent_at=sent_at, nonce=nonce, length=length
    )
    return [(TIME_HEADER, sent_at), (NONCE_HEADER, nonce), (SIGNATURE_HEADER, value)]


class NonceCache:
    """Nonces seen lately.

    Bounded: about 180 bytes each, 131,072 by default, which is 2,100 requests a second.
    """

    # A request is good until `skew` after the time it names, and that time may lie `skew` ahead of ours.
    KEPT_SECONDS = 2 * ALLOWED_SKEW_SECONDS + 1

    def __init__(self, *, capacity: int = 131_072) -> None:
        self._capacity = capacity
        # In order of insertion, which is the order of expiry. A dict would scan what was deleted before.
        self._seen: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, nonce: str, *, now: float) -> bool:
        """Remember `nonce`.

        False when it was there. Raises NonceCacheFull. `now` never goes back (monotonic).
        """
        while self._seen:
            oldest = next(iter(self._seen))
            if self._seen[oldest] > now:
                break
            self._seen.popitem(last=False)
        if nonce in self._seen:
            return False
        if len(self._seen) >= self._capacity:
            raise NonceCacheFull
        self._seen[nonce] = now + self.KEPT_SECONDS
        return True


class SignatureCheck:
    """Decides on requests.

    The cache lives as long as the process: a restart forgets what it saw in the last minute.
    """

    def __init__(
        self,
        node_key: bytes,
        *,
        nonces: NonceCache | None = None,
        wall_clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        if len(node_key) < 32:
            raise ValueError("the node key has fewer than 32 bytes")
        self._node_key = node_key
        self._nonces = NonceCache() if nonces is None else nonces
        self._wall_clock = wall_clock
        self._monotonic = monotonic

    def verify(self, *, method: str, target: str, length: str, headers: Mapping[str, str]) -> None:
        """Raises SignatureRefused or NonceCacheFull. `headers` has lower-case names, each at most once."""
        sent_at = headers.get(TIME_HEADER, "")
        nonce = headers.get(NONCE_HEADER, "")
        given = headers.get(SIGNATURE_HEADER, "")
        if not (_TIME.fullmatch(sent_at) and _NONCE.fullmatch(nonce) and _SIGNATURE.fullmatch(given)):
            raise SignatureRefused("a signature header is missing or malformed")
        expected = signature(
            node_key=self._node_key, method=method, target=target, sent_at=sent_at, nonce=nonce, length=length
        )
        if not hmac.compare_digest(expected, given):
            raise SignatureRefused("the signature is wrong")
        skew = self._wall_clock() - int(sent_at)
        if abs(skew) > ALLOWED_SKEW_SECONDS:
            raise SignatureRefused(f"the request is {skew:.0f} s old by this host's clock")
        if not self._nonces.add(nonce, now=self._monotonic()):
            raise SignatureRefused("the nonce was used before")

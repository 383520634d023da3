"""Signed tokens (JWT, HS256 only) of two classes: `account` for people, `session` for one session's stream.

A class has its own key, `iss`, `aud` and `typ`, so that one can never pass for the other (SECURITY 2.1).
Checking is strict: a token is accepted only in the one form that this module writes.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import hashlib
import hmac
import re
from dataclasses import dataclass
from typing import Any, Final

import jwt
from django.conf import settings

from accounts.models import SignIn, User
from e2a.core.clock import now, seconds
from e2a.core.errors import Unauthenticated
from e2a.core.ids import new_id
from e2a.core.keyring import Key
from e2a.core.parsers import strict_json
from e2a.core.rows import only

ACCOUNT_SECONDS = 15 * 60
LEEWAY_SECONDS = 10
"""Clocks of several web hosts may differ by so much (SECURITY 2.4 allows 30)."""
MAX_TOKEN_CHARS = 2048
BROWSER_MARK_SECONDS = 180 * 24 * 3600

_SEGMENT = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class _TokenClass:
    name: str
    claims: frozenset[str]

    @property
    def typ(self) -> str:
        return f"e2a-{self.name}+jwt"

    @property
    def issuer(self) -> str:
        return f"urn:e2a:{self.name}"

    def key(self, key: Key) -> bytes:
        return key.derive(f"jwt-{self.name}")


_COMMON: Final = {"iss", "aud", "iat", "exp", "jti"}
_ACCOUNT: Final = _TokenClass("account", frozenset(_COMMON | {"sub", "fam"}))
_SESSION: Final = _TokenClass("session", frozenset(_COMMON | {"sid", "tid", "ver", "scope"}))


@dataclass(frozen=True, slots=True)
class SessionClaims:
    """What a session token says: session and tenant by public id, the session's token version, its end."""

    sid: str
    tid: str
    version: int
    expires_at: dt.datetime
    jti: str


def account_token_issue(user: User, *, sign_in: SignIn | None = None) -> tuple[str, dt.datetime]:
    """A token for that person, and its end 15 minutes ahead. Without `sign_in` a new one is recorded."""
    if sign_in is None:
        sign_in = SignIn.objects.create(
            family=new_id("fam"), user=user, token_version=user.token_version, created_at=now()
        )
    expires_at = now().replace(microsecond=0) + seconds(ACCOUNT_SECONDS)
    return _issue(_ACCOUNT, expires_at, sub=user.public_id, fam=sign_in.family), expires_at


def account_sign_in(raw: str) -> SignIn:
    """The live sign-in that an account token belongs to, with its user and tenant. One query.

    Raises `Unauthenticated` for a token that is malformed, expired, of another class, or whose sign-in,
    user or tenant no longer counts.
    """
    claims = _check(_ACCOUNT, raw)
    sign_in = only(SignIn.objects.select_related("user__tenant").filter(family=claims["fam"]))
    if sign_in is None or sign_in.user.public_id != claims["sub"] or not sign_in.is_live:
        raise _refusal()
    return sign_in


def account_token_check(raw: str) -> User:
    """The user of an account token. As `account_sign_in`."""
    return account_sign_in(raw).user


def session_token_issue(
    *, session_public_id: str, tenant_public_id: str, version: int, expires_at: dt.datetime
) -> str:
    """A token for one session's stream, until `expires_at`. Raising the session's version ends it earlier."""
    return _issue(
        _SESSION, expires_at, sid=session_public_id, tid=tenant_public_id, ver=version, scope="session:stream"
    )


def session_token_check(raw: str) -> SessionClaims:
    """What a session token says; the caller compares `version`. No query. Raises `Unauthenticated`."""
    claims = _check(_SESSION, raw)
    version = claims["ver"]
    if isinstance(version, bool) or not isinstance(version, int):
        raise _refusal()
    return SessionClaims(
        sid=str(claims["sid"]),
        tid=str(claims["tid"]),
        version=version,
        expires_at=dt.datetime.fromtimestamp(claims["exp"], dt.UTC),
        jti=str(claims["jti"]),
    )


def refresh_digests(raw: str) -> list[str]:
    """The digests that a refresh token may be stored under, that of the newest signing key first."""
    return [
        hmac.new(key.derive("refresh-token"), raw.encode(), hashlib.sha256).hexdigest()
        for key in settings.E2A.signing_keys.keys
    ]


def browser_mark_issue(email_key: str) -> str:
    """A cookie's value: somebody signed in as this address here. It authenticates nothing (SECURITY 1.6)."""
    key = settings.E2A.signing_keys.newest
    made = int(now().timestamp())
    return f"{key.id}.{made}.{_mark_digest(key, made, email_key)}"


def browser_mark_check(mark: str, email_key: str) -> bool:
    """Whether `mark` was given to a browser of that address within the last 180 days."""
    key_id, _, rest = mark.partition(".")
    made, _, digest = rest.partition(".")
    key = settings.E2A.signing_keys.find(key_id)
    if key is None or not (made.isascii() and made.isdigit() and len(made) < 12):
        return False
    age = now().timestamp() - int(made)
    fresh = -LEEWAY_SECONDS <= age <= BROWSER_MARK_SECONDS
    return fresh and hmac.compare_digest(_mark_digest(key, int(made), email_key).encode(), digest.encode())


def _mark_digest(key: Key, made: int, email_key: str) -> str:
    return hmac.new(key.derive("known-browser"), f"{made}|{email_key}".encode(), hashlib.sha256).hexdigest()


def _refusal() -> Unauthenticated:
    """One body for all causes."""
    return Unauthenticated("A valid bearer token is needed.")


def _issue(token_class: _TokenClass, expires_at: dt.datetime, **claims: Any) -> str:
    key = settings.E2A.signing_keys.newest
    payload = {
        "iss": token_class.issuer,
        "aud": token_class.name,
        "iat": int(now().timestamp()),
        "exp": int(expires_at.timestamp()),
        "jti": new_id("jti"),
        **claims,
    }
    return jwt.encode(
        payload, token_class.key(key), algorithm="HS256", headers={"typ": token_class.typ, "kid": key.id}
    )


def _check(token_class: _TokenClass, raw: str) -> dict[str, Any]:
    """The claims of a token of that class. Raises `Unauthenticated`. No query."""
    key = _key_of(token_class, raw)
    try:
        jwt.decode(
            raw,
            token_class.key(key),
            algorithms=["HS256"],
            audience=token_class.name,
            issuer=token_class.issuer,
            leeway=LEEWAY_SECONDS,
            options={"require": sorted(token_class.claims), "strict_aud": True},
        )
        claims = strict_json(_decoded(raw.split(".")[1]))
    except (jwt.PyJWTError, ValueError) as error:
        raise _refusal() from error
    if not isinstance(claims, dict) or claims.keys() != token_class.claims:
        raise _refusal()
    texts = token_class.claims - {"iat", "exp", "ver"}
    if not all(isinstance(claims[name], str) for name in texts):
        raise _refusal()
    if not all(type(claims[name]) is int for name in ("iat", "exp")):
        raise _refusal()
    return claims


def _key_of(token_class: _TokenClass, raw: str) -> Key:
    """The key of our ring that the header names, after the header was found to be exactly of our form."""
    if len(raw) > MAX_TOKEN_CHARS:
        raise _refusal()
    segments = raw.split(".")
    try:
        if len(segments) != 3:
            raise ValueError("not three segments")
        header = strict_json(_decoded(segments[0]))
        _decoded(segments[1])
        _decoded(segments[2])
    except ValueError as error:
        raise _refusal() from error
    if not isinstance(header, dict) or header.keys() != {"alg", "typ", "kid"}:
        raise _refusal()
    if header["alg"] != "HS256" or header["typ"] != token_class.typ or not isinstance(header["kid"], str):
        raise _refusal()
    key = settings.E2A.signing_keys.find(header["kid"])
    if key is None:
        raise _refusal()
    return key


def _decoded(segment: str) -> bytes:
    """base64url in its one canonical spelling: no padding, no stray bits. Raises `ValueError`."""
    if not _SEGMENT.fullmatch(segment):
        raise ValueError("not base64url")
    try:
        decoded = base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4))
    except binascii.Error as error:
        raise ValueError("not base64url") from error
    if base64.urlsafe_b64encode(decoded).rstrip(b"=").decode() != segment:
        raise ValueError("not canonical")
    return decoded

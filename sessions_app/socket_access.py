"""Who may open a session's socket (CONTRACT 6): the token, the origin, and the close code that says why not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from django.conf import settings

from accounts.tokens import session_token_check
from e2a.core.errors import Unauthenticated
from e2a.core.ids import PATTERN
from e2a.core.rows import only
from sessions_app.models import Session
from sessions_app.selectors import session_json

BAD_FRAMES, BAD_TOKEN, FORBIDDEN, NO_SESSION, NO_AUTH, SESSION_OVER = 4400, 4401, 4403, 4404, 4408, 4410
FRAME_TOO_LARGE, TOO_MANY, RESTARTING = 4413, 4429, 1012
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})


class SocketRefused(Exception):
    """The socket is closed with `code`; `reason` is for a person."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


@dataclass(frozen=True, slots=True)
class SocketGrant:
    """What a socket may read."""

    session_pk: int
    session_public_id: str
    token_version: int
    last_seq: int
    """The log's head when the grant was given: nothing that this socket asks for is before it."""
    session: dict[str, Any] = field(compare=False)
    """The session as it was then, as clients see it."""


def socket_grant(*, session_id: str, token: str, origin: str | None) -> SocketGrant:
    """Check token, session and origin. Raises `SocketRefused`: 4401, 4403, or 4404.

    A token of another tenant's session and a session that does not exist answer alike.
    """
    try:
        claims = session_token_check(token)
    except Unauthenticated:
        raise SocketRefused(BAD_TOKEN, "The token is not valid, or has expired.") from None
    if not PATTERN.match(session_id):
        raise SocketRefused(NO_SESSION, "There is no such session.")
    session = only(
        Session.objects.select_related("tenant", "created_by", "sandbox").filter(
            public_id=session_id, tenant__public_id=claims.tid
        )
    )
    if session is None:
        raise SocketRefused(NO_SESSION, "There is no such session.")
    if claims.sid != session.public_id:
        raise SocketRefused(FORBIDDEN, "The token belongs to another session.")
    maker_left = session.created_by is not None and not session.created_by.is_active
    if claims.version != session.token_version or not session.tenant.is_active or maker_left:
        raise SocketRefused(BAD_TOKEN, "The token was revoked.")
    if origin is not None and not origin_allowed(origin, session.tenant.allowed_origins):
        raise SocketRefused(
            FORBIDDEN, "This page's origin may not open sockets; the tenant's list does not have it."
        )
    return SocketGrant(
        session.pk, session.public_id, session.token_version, session.last_seq, session_json(session)
    )


def origin_allowed(origin: str, allowed: list[str]) -> bool:
    """Whether a browser page of `origin` may connect: ours, the operator's, the tenant's; any of this machine and
    `null` (a file) in development."""
    own = {url.rstrip("/") for url in (settings.E2A.public_url, settings.E2A.rt_url) if url}
    if origin in own or origin in settings.E2A.embed_origins or origin in allowed:
        return True
    if settings.E2A.production:
        return False
    try:
        host = urlsplit(origin).hostname or ""
    except ValueError:
        return False
    return origin == "null" or host in _LOOPBACK or host.endswith(".localhost")

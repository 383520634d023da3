"""Share links: made, listed, revoked. Only a keyed digest of a link's token is stored."""

from __future__ import annotations

import datetime as dt
import secrets
from typing import Final

from django.db.models import QuerySet

from accounts.tokens import share_link_digests
from e2a.core.clock import now, seconds
from e2a.core.errors import Conflict, NotFound
from e2a.core.rows import only
from sandboxes.guest_answers import not_running
from sandboxes.models import LIVE_STATES, PreviewLink, Sandbox
from sandboxes.preview.headers import TOKEN_PARAMETER
from sandboxes.preview.hosts import PreviewHost, previews_check

LINKS_PER_SANDBOX: Final = 100
"""Live ones."""
LONGEST_SECONDS: Final = 7200
PREFIX: Final = "e2a_share_"


def preview_links(sandbox: Sandbox) -> QuerySet[PreviewLink]:
    """Those that work, or would if their sandbox ran."""
    return PreviewLink.objects.filter(sandbox=sandbox, revoked_at=None, expires_at__gt=now())


def preview_link_create(
    *, sandbox: Sandbox, port: int, expires_in_seconds: int, made_by: str
) -> tuple[PreviewLink, str]:
    """A link and its address, which is known this once. `made_by`: an API key or a user, by public id.

    Raises `NotBuilt` (`preview_not_configured`), `Conflict` (`not_running`, `too_many_links`).
    """
    previews_check()
    if sandbox.state not in LIVE_STATES:
        raise not_running(sandbox)
    if preview_links(sandbox).count() >= LINKS_PER_SANDBOX:
        raise Conflict(f"The sandbox has {LINKS_PER_SANDBOX} links; revoke one.", code="too_many_links")
    raw = PREFIX + secrets.token_urlsafe(32)
    moment = now()
    link = PreviewLink.objects.create(
        sandbox=sandbox,
        port=port,
        token_digest=share_link_digests(raw)[0],
        made_by=made_by,
        created_at=moment,
        expires_at=moment.replace(microsecond=0) + seconds(expires_in_seconds),
    )
    return link, preview_address(sandbox, port, raw)


def preview_address(sandbox: Sandbox, port: int, token: str) -> str:
    """Where a browser goes in. Raises `NotBuilt` (`preview_not_configured`)."""
    return f"{PreviewHost(sandbox.public_id, port).origin}/?{TOKEN_PARAMETER}={token}"


def preview_link_revoke(*, sandbox: Sandbox, link_id: str) -> PreviewLink:
    """At once, also for who is looking. Twice is fine. Raises `NotFound`."""
    link = only(PreviewLink.objects.filter(sandbox=sandbox, public_id=link_id))
    if link is None:
        raise NotFound("There is no such link.")
    if link.revoked_at is None:
        link.revoked_at = now()
        link.save(update_fields=["revoked_at"])
    return link


def preview_link_by_token(raw: str) -> PreviewLink | None:
    """The link of that token, whatever became of it. One query."""
    if not raw.startswith(PREFIX) or len(raw) > 100:
        return None
    return (
        PreviewLink.objects.filter(token_digest__in=share_link_digests(raw))
        .select_related("sandbox__tenant")
        .first()
    )


def preview_link_works(link: PreviewLink, *, at: dt.datetime | None = None) -> bool:
    return link.revoked_at is None and link.expires_at > (at or now())

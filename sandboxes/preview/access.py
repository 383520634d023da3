"""Who may see a preview: a token or a cookie, what it stands for, and whether that still holds."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

from accounts.tokens import SandboxClaims, preview_cookie_check, preview_cookie_issue, sandbox_token_check
from e2a.core.clock import now, seconds
from e2a.core.errors import Unauthenticated
from e2a.core.rows import only
from sandboxes.models import PreviewLink, Sandbox
from sandboxes.preview.hosts import PreviewHost
from sandboxes.preview.links import PREFIX, preview_link_by_token, preview_link_works
from sandboxes.socket_access import BAD_TOKEN, AttachRefused, SandboxGrant, standing_check

COOKIE_SECONDS = 7200
"""As long as a sandbox lives at most; what it stands for is looked at with every request."""


@dataclass(frozen=True, slots=True)
class PreviewGrant:
    """What was shown, and is good for this preview. `link`: the row of a share link, if it came by one."""

    preview: PreviewHost
    claims: SandboxClaims
    sandbox_pk: int
    link_pk: int | None
    until: dt.datetime
    by_cookie: bool

    def cookie(self) -> tuple[str, int]:
        """Its value, and the seconds that it is good for."""
        value = preview_cookie_issue(claims=self.claims, port=self.preview.port, expires_at=self.until)
        return value, max(1, int((self.until - now()).total_seconds()))


def preview_grant(preview: PreviewHost, *, token: str | None, cookies: list[str]) -> PreviewGrant:
    """Who asks. A token goes before a cookie. Up to five queries.

    Raises `Unauthenticated`, alike for every cause, so that a host does not tell whether its sandbox is there.
    """
    if token is not None:
        return _granted(preview, _claims_of_token(token, preview), by_cookie=False)
    for cookie in cookies[:4]:
        try:
            return _granted(preview, preview_cookie_check(cookie, port=preview.port), by_cookie=True)
        except Unauthenticated:
            continue
    raise _refusal()


def _claims_of_token(token: str, preview: PreviewHost) -> SandboxClaims:
    if not token.startswith(PREFIX):
        return sandbox_token_check(token)
    link = preview_link_by_token(token)
    if link is None or link.port != preview.port or link.sandbox.tenant is None:
        raise _refusal()
    return SandboxClaims(sbx=link.sandbox.public_id, tid=link.sandbox.tenant.public_id, holder=link.public_id)


def _granted(preview: PreviewHost, claims: SandboxClaims, *, by_cookie: bool) -> PreviewGrant:
    if claims.sbx != preview.sandbox_id:
        raise _refusal()
    rows = Sandbox.objects.filter(public_id=claims.sbx, tenant__public_id=claims.tid)
    sandbox = only(rows.only("pk", "public_id", "expires_at"))
    if sandbox is None:
        raise _refusal()
    until = now() + seconds(COOKIE_SECONDS)
    link: PreviewLink | None = None
    if claims.holder.startswith("prv_"):
        link = only(PreviewLink.objects.filter(public_id=claims.holder, sandbox=sandbox, port=preview.port))
        if link is None:
            raise _refusal()
        until = min(until, link.expires_at)
    grant = PreviewGrant(preview, claims, sandbox.pk, None if link is None else link.pk, until, by_cookie)
    try:
        preview_standing(grant)
    except AttachRefused as refused:
        if refused.code == BAD_TOKEN:
            raise _refusal() from None
        raise
    return grant


def preview_standing(grant: PreviewGrant) -> str:
    """The sandbox's state, for who may go on looking. Three queries at most.

    Raises `AttachRefused`: a revoked or expired link, what its maker's or holder's end means, a sandbox that has ended.
    """
    holder = grant.claims.holder
    if grant.link_pk is not None:
        link = only(PreviewLink.objects.filter(pk=grant.link_pk))
        if link is None or not preview_link_works(link):
            raise AttachRefused(BAD_TOKEN, "The link has expired, or was revoked.")
        holder = link.made_by
    return standing_check(SandboxGrant(grant.sandbox_pk, grant.claims.sbx, holder))


def _refusal() -> Unauthenticated:
    return Unauthenticated("A token of this preview is needed.")

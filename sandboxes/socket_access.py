"""Who may attach to a sandbox by a socket (CONTRACT 7), and for how long: the token, the origin, and the close code
that says why not."""

from __future__ import annotations

from dataclasses import dataclass

from django.conf import settings

from accounts.models import User
from accounts.tokens import sandbox_token_check
from e2a.core.errors import Unauthenticated
from e2a.core.ids import PATTERN
from e2a.core.origins import origin_allowed
from e2a.core.rows import only
from keys.models import ApiKey
from sandboxes.guest_answers import not_running
from sandboxes.guest_client import AsyncGuestClient
from sandboxes.models import Sandbox, SandboxState
from sandboxes.services import sandbox_ensure_configured, sandbox_used, sandbox_wait_running

BAD_FRAMES, BAD_TOKEN, FORBIDDEN, NO_SANDBOX, NO_AUTH, SANDBOX_OVER = 4400, 4401, 4403, 4404, 4408, 4410
FRAME_TOO_LARGE, TOO_MANY, FAILED, ENDED = 4413, 4429, 1011, 1000


class AttachRefused(Exception):
    """The socket is closed with `code`; `reason` is for a person."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


@dataclass(frozen=True, slots=True)
class SandboxGrant:
    """What a socket may be attached to, and who asked for its token: an API key or a user, by public id."""

    sandbox_pk: int
    sandbox_id: str
    holder: str


def sandbox_grant(*, sandbox_id: str, token: str, origin: str | None) -> tuple[SandboxGrant, Sandbox]:
    """Check token, sandbox and origin; the sandbox with its tenant, node and template.

    Raises `AttachRefused`: 4401, 4403, 4404 (a strange sandbox and a missing one answer alike), or 4410.
    """
    try:
        claims = sandbox_token_check(token)
    except Unauthenticated:
        raise AttachRefused(BAD_TOKEN, "The token is not valid, or has expired.") from None
    rows = Sandbox.objects.select_related("tenant", "node", "template")
    sandbox = (
        only(rows.filter(public_id=sandbox_id, tenant__public_id=claims.tid))
        if PATTERN.match(sandbox_id)
        else None
    )
    if sandbox is None or sandbox.tenant is None:
        raise AttachRefused(NO_SANDBOX, "There is no such sandbox.")
    if claims.sbx != sandbox.public_id:
        raise AttachRefused(FORBIDDEN, "The token belongs to another sandbox.")
    grant = SandboxGrant(sandbox.pk, sandbox.public_id, claims.holder)
    standing_check(grant)
    if origin is not None and not origin_allowed(origin, sandbox.tenant.allowed_origins):
        raise AttachRefused(
            FORBIDDEN, "This page's origin may not open sockets; the tenant's list does not have it."
        )
    return grant, sandbox


def standing_check(grant: SandboxGrant) -> str:
    """The sandbox's state, for a socket that may stay open. Two queries.

    Raises `AttachRefused`: 4401 when the key was revoked, the user disabled or the tenant suspended, 4410 when the
    sandbox has ended.
    """
    row = only(Sandbox.objects.select_related("tenant").filter(pk=grant.sandbox_pk))
    if row is None or row.tenant is None:
        raise AttachRefused(NO_SANDBOX, "There is no such sandbox.")
    if not row.tenant.is_active or not _holder_stands(grant.holder):
        raise AttachRefused(BAD_TOKEN, "The token was revoked.")
    if row.state in (SandboxState.STOPPING, SandboxState.DESTROYED):
        why = f" ({row.death_reason})" if row.death_reason else ""
        raise AttachRefused(SANDBOX_OVER, f"The sandbox has ended{why}.")
    return row.state


def _holder_stands(public_id: str) -> bool:
    """Whether the key still works, or the user may still sign in."""
    if public_id.startswith("key_"):
        key = only(ApiKey.objects.select_related("user").filter(public_id=public_id))
        return key is not None and key.is_live() and key.user.is_active
    return User.objects.filter(public_id=public_id, is_active=True).exists()


def sandbox_row(sandbox_pk: int) -> Sandbox:
    """As it is now, with its tenant, node and template."""
    return Sandbox.objects.select_related("tenant", "node", "template").get(pk=sandbox_pk)


def running_client(sandbox: Sandbox) -> AsyncGuestClient:
    """Once it runs and knows its secrets. Raises `not_running`, `sandbox_not_ready`, `sandbox_unreachable`."""
    sandbox_wait_running(sandbox)
    sandbox_ensure_configured(sandbox)
    sandbox_used(sandbox)
    if sandbox.node is None:
        raise not_running(sandbox)
    return AsyncGuestClient(sandbox.public_id, sandbox.node.address, settings.E2A.node_key)

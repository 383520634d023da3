"""Tokens for what is attached to one sandbox."""

from __future__ import annotations

import datetime as dt

from accounts.tokens import sandbox_token_issue
from sandboxes.guest_answers import not_running
from sandboxes.models import LIVE_STATES, Sandbox


def sandbox_token(sandbox: Sandbox, *, holder: str) -> tuple[str, dt.datetime]:
    """A token and its end. `holder`: who asks, an API key or a user, by public id. Raises `Conflict`
    (`not_running`) for one that has ended."""
    if sandbox.state not in LIVE_STATES or sandbox.tenant is None:
        raise not_running(sandbox)
    return sandbox_token_issue(
        sandbox_public_id=sandbox.public_id, tenant_public_id=sandbox.tenant.public_id, holder=holder
    )

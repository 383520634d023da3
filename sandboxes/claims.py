"""Taking a parked sandbox for a tenant: each one once, whoever asks at the same moment."""

from __future__ import annotations

from typing import Any

from e2a.core.clock import now, seconds
from sandboxes.lifecycle import sandbox_move
from sandboxes.models import Sandbox, SandboxState, Template
from sandboxes.selectors import node_is_usable

CONFIGURE_LEASE_SECONDS = 10.0
"""Whoever claimed it must have configured it by then, or the sweep does it."""
_TRIES = 8


def sandbox_claim(template: Template, **owned: Any) -> Sandbox | None:
    """Make a parked sandbox of a working node the caller's (`booting`, with `owned` set in the same UPDATE).

    None when there is none left. Call it inside a transaction. PostgreSQL's claimers skip each other's rows;
    SQLite's take turns; on both the conditional UPDATE decides. Three queries.
    """
    parked = (
        Sandbox.objects.filter(node_is_usable("node__"), template=template, state=SandboxState.PARKED)
        .select_related("node")
        .select_for_update(skip_locked=True, of=("self",))
        .order_by("pk")
    )
    for _ in range(_TRIES):
        sandbox = parked.first()
        if sandbox is None:
            return None
        sandbox.template = template
        moment = now()
        if sandbox_move(
            sandbox,
            to=SandboxState.BOOTING,
            why="claimed",
            is_warm=True,
            claimed_at=moment,
            last_active_at=moment,
            lease_until=moment + seconds(CONFIGURE_LEASE_SECONDS),
            **owned,
        ):
            return sandbox
    return None

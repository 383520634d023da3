"""How a sandbox's state moves: one compare-and-swap and one history row, in one place.

Everything that changes `Sandbox.state` goes through `sandbox_move` or `sandbox_end`.
"""

from __future__ import annotations

from typing import Any

import structlog
from django.db import transaction
from django.db.models import Q

from e2a.core.clock import now
from e2a.core.enqueue import enqueue
from e2a.core.states import advance
from sandboxes.models import TRANSITIONS, DeathReason, Sandbox, SandboxMove, SandboxState
from sandboxes.workspaces import save_at_end
from secrets_vault.services import bundles_release

log = structlog.get_logger(__name__)

_RACES = 5
"""How often a move is tried again because the state changed between the look and the UPDATE."""


def node_queue(name: str) -> str:
    """The Celery queue that only that node reads."""
    return f"node.{name}"


def sandbox_move(
    sandbox: Sandbox, *, to: SandboxState, why: str, only_if: Q | None = None, **updates: Any
) -> bool:
    """Move the sandbox to `to`, setting `updates` with it, and write the move down.

    False when the move is not allowed from the state that it has now, or `only_if` does not hold: then
    nothing changed, except that `sandbox.state` was read anew. On success the instance carries the new
    values.
    """
    sources = TRANSITIONS[to]
    for _ in range(_RACES):
        state = sandbox.state
        if state in sources:
            rows = Sandbox.objects.filter(pk=sandbox.pk, state=state)
            if only_if is not None:
                rows = rows.filter(only_if)
            # No savepoint: whoever has a transaction open rolls back as a whole, and two statements are
            # saved.
            with transaction.atomic(savepoint=False):
                if advance(rows, to=to, transitions=TRANSITIONS, **updates):
                    move_record(sandbox, from_state=state, to=to, why=why)
                    sandbox.state = to
                    for name, value in updates.items():
                        setattr(sandbox, name, value)
                    return True
        found = Sandbox.objects.filter(pk=sandbox.pk).values_list("state", flat=True).first()
        if found is None:
            return False
        sandbox.state = found
        if found == state or found not in sources:
            return False
    return False


def move_record(sandbox: Sandbox, *, from_state: str, to: str, why: str) -> None:
    """Write one line of the sandbox's history. Only for what made or moved the row in the same
    transaction."""
    SandboxMove.objects.create(sandbox=sandbox, at=now(), from_state=from_state, to_state=to, why=why[:200])


def sandbox_end(
    sandbox: Sandbox, *, reason: DeathReason, detail: str = "", why: str = "", only_if: Q | None = None
) -> bool:
    """Decide that the sandbox ends, and have its node take it away. Whether this call was the one that
    decided.

    `detail` is shown to the tenant, `why` (default: the detail) to operators only. A sandbox that no node has
    taken yet is gone at once; all others are `stopping` until their node has removed the container. One with a
    workspace is saved before that.
    """
    words = {"death_reason": reason, "death_detail": detail[:500], "lease_holder": "", "lease_until": None}
    why = why or detail or str(reason)
    with transaction.atomic():
        unclaimed = Q(node__isnull=True) & (only_if if only_if is not None else Q())
        if sandbox.node_id is None and sandbox_move(
            sandbox, to=SandboxState.DESTROYED, why=why, only_if=unclaimed, destroyed_at=now(), **words
        ):
            _announce_end(sandbox)
            return True
        if not sandbox_move(sandbox, to=SandboxState.STOPPING, why=why, only_if=only_if, **words):
            return False
        _announce_end(sandbox)
        sandbox.refresh_from_db(fields=["node", "workspace", "ready_at", "restore", "frozen_at", "tenant"])
        if sandbox.node is not None:
            is_saved_first = save_at_end(sandbox)
            if not is_saved_first:
                task = "sandboxes.tasks.sandbox_remove"
            elif sandbox.frozen_at is not None:
                task = "sandboxes.tasks.sandbox_freeze"  # Thawed, to be read.
            else:
                return True
            enqueue(task, queue=node_queue(sandbox.node.name), sandbox_id=sandbox.pk)
    return True


def sandbox_gone(sandbox: Sandbox, *, why: str, evidence: dict[str, Any] | None = None) -> bool:
    """The container of a `stopping` sandbox is no more: the row says so, and keeps the evidence."""
    with transaction.atomic():
        moved = sandbox_move(
            sandbox, to=SandboxState.DESTROYED, why=why, destroyed_at=now(), death=evidence or sandbox.death
        )
        if moved:
            _tell_owner(sandbox)
    if moved:
        log.info("sandbox.destroyed", sandbox=sandbox.public_id, reason=sandbox.death_reason)
    return moved


def _announce_end(sandbox: Sandbox) -> None:
    log.info(
        "sandbox.ending", sandbox=sandbox.public_id, reason=sandbox.death_reason, detail=sandbox.death_detail
    )
    if sandbox.tenant_id is not None and not sandbox.owner:
        bundles_release(holder=sandbox.public_id)
    _tell_owner(sandbox)


def _tell_owner(sandbox: Sandbox) -> None:
    if sandbox.owner:
        enqueue("sessions_app.tasks.sandbox_ended", sandbox_id=sandbox.pk)

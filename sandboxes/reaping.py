"""What ends sandboxes in time: their life, idleness, and not getting ready. Safe to run doubled."""

from __future__ import annotations

import datetime as dt
import random

import structlog
from django.db.models import F, Q

from e2a.core.clock import now, seconds
from e2a.core.enqueue import enqueue
from sandboxes.activity import idle_among
from sandboxes.lifecycle import sandbox_end, sandbox_gone, sandbox_move
from sandboxes.models import UNREADY_STATES, DeathReason, Node, Restore, Sandbox, SandboxState
from sandboxes.saving import SAVE_SECONDS
from sandboxes.selectors import HEARTBEAT_SECONDS

log = structlog.get_logger(__name__)

READY_LIMIT_SECONDS = 110.0
"""A sandbox that is not ready by then has failed (SECURITY 5.12 allows 120 s)."""
OWNER_GRACE_SECONDS = 15.0
"""A session ends by its own clock first; its sandbox follows by itself only when that did not happen."""
NODE_LOST_SECONDS = 60.0
KEPT_DAYS = 30
A_PASS = 200
SHORTEST_IDLE_SECONDS = 10.0


def sandboxes_reap() -> int:
    """End what has lived its time and what idles. Returns how many."""
    return _reap_old() + _reap_idle()


def _reap_old() -> int:
    moment = now()
    over = Q(expires_at__lt=moment, owner="") | Q(expires_at__lt=moment - seconds(OWNER_GRACE_SECONDS))
    rows = Sandbox.objects.filter(over, state__in=[SandboxState.RUNNING, SandboxState.PAUSED]).select_related(
        "node"
    )
    return sum(
        sandbox_end(row, reason=DeathReason.TTL, detail="It reached the end of its life.", only_if=over)
        for row in rows[:A_PASS]
    )


def _reap_idle() -> int:
    """A session's sandbox ends with its session, by the same clock and rule: `sessions_reap` sees to those.

    One query for the rows; at most 200 guests are asked, 16 at once; then one UPDATE for each. Of more than 200 that
    are due some are taken by chance, so that silent ones never keep the others waiting.
    """
    moment = now()
    rows = Sandbox.objects.filter(
        state=SandboxState.RUNNING, owner="", last_active_at__lt=moment - seconds(SHORTEST_IDLE_SECONDS)
    ).select_related("node", "template")
    due = [row for row in rows.iterator() if _idle_at(row) <= moment]
    chosen = random.sample(due, min(A_PASS, len(due)))
    return sum(
        # Whoever used it since we looked has changed last_active_at: then it stays.
        sandbox_end(
            row,
            reason=DeathReason.IDLE,
            detail=f"It was not used for {row.idle_timeout_seconds} s.",
            only_if=Q(state=SandboxState.RUNNING, last_active_at=row.last_active_at),
        )
        for row in idle_among(chosen)
    )


def _idle_at(row: Sandbox) -> dt.datetime:
    return (row.last_active_at or row.created_at) + seconds(row.idle_timeout_seconds)


def sandboxes_unstick() -> None:
    """Mend what a lost message, a killed process or a dead node left half done."""
    _fail_unready()
    _configure_again()
    _leave_dead_nodes()


def _fail_unready() -> None:
    moment = now() - seconds(READY_LIMIT_SECONDS)
    late = Q(claimed_at__lt=moment) | Q(claimed_at__isnull=True, created_at__lt=moment)
    # Putting files back takes as long as there are many of them.
    late &= ~Q(restore=Restore.WANTED, claimed_at__gt=moment - seconds(SAVE_SECONDS))
    for row in Sandbox.objects.filter(late, state__in=UNREADY_STATES).select_related("node")[:A_PASS]:
        sandbox_end(
            row,
            reason=DeathReason.LOST,
            detail=f"It was not ready after {READY_LIMIT_SECONDS:g} s.",
            why=f"still {row.state} after {READY_LIMIT_SECONDS:g} s",
            only_if=Q(state=row.state) & late,
        )


def _configure_again() -> None:
    """Claimed or made, but nobody configured it: the claimer died, or the message was lost."""
    expired = Q(lease_until__isnull=True) | Q(lease_until__lt=now())
    rows = Sandbox.objects.filter(expired, state=SandboxState.BOOTING, tenant__isnull=False)
    for pk in rows.values_list("pk", flat=True)[:A_PASS]:
        enqueue("sandboxes.tasks.sandbox_configure", sandbox_id=pk)


def _leave_dead_nodes() -> None:
    """Half-made sandboxes of a node that is dead go to another one; ended ones count as gone.

    A next generation, so that what the dead node made is told from what will be made. Running ones stay: a
    node process that restarts takes nothing down.
    """
    dead = Node.objects.filter(
        Q(heartbeat_at__isnull=True) | Q(heartbeat_at__lt=now() - seconds(HEARTBEAT_SECONDS))
    )
    half_made = Sandbox.objects.filter(
        node__in=dead, tenant__isnull=False, state__in=[SandboxState.CREATING, SandboxState.CONFIGURING]
    ).select_related("node")
    for row in half_made[:A_PASS]:
        _hand_on(row)
    lost = dead.filter(Q(heartbeat_at__isnull=True) | Q(heartbeat_at__lt=now() - seconds(NODE_LOST_SECONDS)))
    for row in Sandbox.objects.filter(node__in=lost, state=SandboxState.STOPPING).select_related("node")[
        :A_PASS
    ]:
        sandbox_gone(row, why="its node is dead; what is left there goes when it is back")


def _hand_on(row: Sandbox) -> None:
    fresh = {"node": None, "slot": None, "lease_until": None, "lease_holder": "", "container_id": ""}
    if row.state == SandboxState.CONFIGURING:
        moved = sandbox_move(
            row,
            to=SandboxState.CREATING,
            why="its node is dead",
            only_if=Q(node=row.node),
            generation=F("generation") + 1,
            **fresh,
        )
    else:
        rows = Sandbox.objects.filter(pk=row.pk, state=SandboxState.CREATING, node=row.node)
        moved = bool(rows.update(generation=F("generation") + 1, **fresh))
    if moved:
        enqueue("sandboxes.tasks.sandbox_provision", sandbox_id=row.pk)


def sandboxes_purge() -> int:
    """Delete what ended more than 30 days ago, and the pool's own a day after; returns how many."""
    old = Q(destroyed_at__lt=now() - dt.timedelta(days=KEPT_DAYS))
    unowned = Q(tenant__isnull=True, destroyed_at__lt=now() - dt.timedelta(days=1))
    rows = Sandbox.objects.filter(old | unowned, state=SandboxState.DESTROYED)
    pks = list(rows.values_list("pk", flat=True)[:1000])
    Sandbox.objects.filter(pk__in=pks).delete()
    return len(pks)

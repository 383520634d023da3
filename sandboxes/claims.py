"""Taking a parked sandbox for a tenant: each one once, whoever asks at the same moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.db.models import F, Q

from e2a.core.clock import now, seconds
from sandboxes.lifecycle import sandbox_move
from sandboxes.models import Node, PoolMiss, Sandbox, SandboxState, Template
from sandboxes.selectors import node_is_usable, nodes_usable

CONFIGURE_LEASE_SECONDS = 10.0
"""Whoever claimed it must have configured it by then, or the sweep does it."""
_TRIES = 8


POOL_FAILING = "failing"
"""In `Node.pool`, beside the templates' sizes: the pool pauses, because making parked ones failed."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A claimed sandbox, or why there is none."""

    sandbox: Sandbox | None
    miss: PoolMiss | None = None


def sandbox_claim(template: Template, **owned: Any) -> Sandbox | None:
    """As `sandbox_claim_or_miss`, for whom the reason of a miss is nothing."""
    return sandbox_claim_or_miss(template, **owned).sandbox


def sandbox_claim_or_miss(template: Template, **owned: Any) -> Claim:
    """Make a parked sandbox of a working node the caller's (`booting`, with `owned` set in the same UPDATE).

    One of the template's present image only. A miss says why, at two queries more. Call it inside a
    transaction. PostgreSQL's claimers skip each other's rows; SQLite's take turns; on both the conditional
    UPDATE decides. Three queries.
    """
    parked = (
        Sandbox.objects.filter(
            node_is_usable("node__"),
            template=template,
            state=SandboxState.PARKED,
            image_id=template.image_id,
        )
        .select_related("node")
        .select_for_update(skip_locked=True, of=("self",))
        .order_by("pk")
    )
    for _ in range(_TRIES):
        sandbox = parked.first()
        if sandbox is None:
            return Claim(None, miss_reason(template))
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
            return Claim(sandbox)
    return Claim(None, PoolMiss.LOST_RACE)


def miss_reason(template: Template) -> PoolMiss:
    """Why no parked sandbox of the template can be claimed now. Two or three queries, on the slow way only."""
    keepers = [node for node in nodes_usable() if node.pool.get(template.name)]
    unusable = Sandbox.objects.filter(template=template, state=SandboxState.PARKED)
    if unusable.exclude(image_id=F("template__image_id")).filter(node_is_usable("node__")).exists():
        return PoolMiss.OLD_IMAGE
    if unusable.exclude(node_is_usable("node__")).exists():
        return PoolMiss.NODE_DOWN
    if not keepers:
        return PoolMiss.NO_POOL
    if all(node.pool.get(POOL_FAILING) for node in keepers):
        return PoolMiss.FAILING
    if all(_is_full(node) for node in keepers):
        return PoolMiss.NODE_FULL
    return PoolMiss.EMPTY


def _is_full(node: Node) -> bool:
    holds = Q(node=node, slot__isnull=False) & ~Q(state=SandboxState.DESTROYED)
    return Sandbox.objects.filter(holds).count() >= node.capacity

"""The database is the wish, the engine is the fact: one pass makes them agree on this host, whatever was
killed.

Level-triggered: a pass looks at everything and remembers nothing but when it first saw a container without a
row.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import datetime

import structlog

from e2a.core.clock import now
from sandboxes.death import death_of
from sandboxes.engines.base import ContainerState, Leftover
from sandboxes.host import Host
from sandboxes.lifecycle import sandbox_end
from sandboxes.models import CONTAINED_STATES, Sandbox, SandboxState
from sandboxes.pausing import freezing_compare
from sandboxes.removal import sandbox_remove

log = structlog.get_logger(__name__)

GRACE_SECONDS = 60.0
"""A container or folder younger than this may belong to a row that is not committed yet."""
SEEN_SECONDS = 25.0
"""A container that a pass saw so long ago without a row is as good as old: passes are 30 s apart."""
BREAKER_COUNT = 5
BREAKER_SHARE = 0.2

_Key = tuple[str, int]


@dataclass(slots=True)
class ReconcileMemory:
    """What one pass tells the next, and what the node noticed in between."""

    first_seen: dict[_Key, float] = field(default_factory=dict)
    engine_was_down_at: datetime | None = None
    engine_started_at: datetime | None = None
    notice: str = ""
    """What the last pass has to tell an operator. Empty: nothing."""


@dataclass(frozen=True, slots=True)
class ReconcileReport:
    """What one pass found. `is_tripped`: too many containers without a row at once, none of them was
    removed."""

    dead: int
    orphans_removed: int
    leftovers_removed: int
    is_tripped: bool


def reconcile(host: Host, memory: ReconcileMemory, *, is_forced: bool = False) -> ReconcileReport:
    """One pass. Raises EngineError when the engine does not answer: then nothing is concluded.

    Rows are read before the engine, so a row that says its container runs was written before we looked for
    it. `is_forced` removes unknown containers without grace and however many there are.
    """
    rows = list(
        Sandbox.objects.filter(node__name=host.name)
        .exclude(state=SandboxState.DESTROYED)
        .select_related("node", "template")
    )
    facts = {(fact.sandbox_id, fact.generation): fact for fact in host.engine.list_labelled(host.instance)}
    dead = sum(_row_check(host, memory, row, facts.get((row.public_id, row.generation))) for row in rows)
    for row in rows:
        freezing_compare(row, facts.get((row.public_id, row.generation)))
    orphans, unknown = _without_row(host, facts)
    is_tripped = not is_forced and _is_suspicious(len(unknown), len(facts))
    memory.notice = ""
    if is_tripped:
        memory.notice = _tripped_notice(len(unknown), len(facts))
        log.error("reconcile.tripped", unknown=len(unknown), containers=len(facts), node=host.name)
    else:
        orphans += [key for key in unknown if is_forced or _is_old(memory, facts[key])]
    memory.first_seen = {key: memory.first_seen.get(key, time.monotonic()) for key in unknown}
    removed = sum(_destroyed(host, key, "container without a live row") for key in orphans)
    leftovers = 0 if is_tripped else _leftovers_remove(host)
    return ReconcileReport(dead, removed, leftovers, is_tripped)


def _is_suspicious(unknown: int, containers: int) -> bool:
    """Whether so many containers without a row speak for a wrong or lost database rather than for leftovers."""
    if unknown > BREAKER_COUNT and unknown > BREAKER_SHARE * containers:
        return True
    # Whoever made them wrote a row first: a database without a single one is not the one that they are of.
    return unknown > 1 and not Sandbox.objects.exists()


def _tripped_notice(unknown: int, containers: int) -> str:
    return (
        f"{unknown} of {containers} containers have no row in this database: none was removed. If it is the wrong "
        "or an old database, correct DATABASE_URL; if they are to go, run manage.py sandboxes_reconcile --force."
    )


def sandbox_check(host: Host, memory: ReconcileMemory, sandbox_id: str) -> bool:
    """The same for one sandbox, at once: the engine said that its container ended. Whether it is dead."""
    row = (
        Sandbox.objects.filter(public_id=sandbox_id, node__name=host.name)
        .exclude(state=SandboxState.DESTROYED)
        .select_related("node", "template")
        .first()
    )
    return row is not None and _row_check(
        host, memory, row, host.engine.inspect(row.public_id, row.generation)
    )


def _row_check(host: Host, memory: ReconcileMemory, row: Sandbox, fact: ContainerState | None) -> bool:
    """End a row whose container is gone or has ended. Whether it did."""
    if row.state not in CONTAINED_STATES or (fact is not None and fact.status != "exited"):
        return False
    if fact is None:
        # A list may be cut short; a look at the one container may not.
        fact = host.engine.inspect(row.public_id, row.generation)
        if fact is not None and fact.status != "exited":
            return False
    reason, detail = death_of(
        row,
        fact,
        memory.engine_was_down_at,
        engine_started_at=memory.engine_started_at,
        seen=host.witness.seen((row.public_id, row.generation)),
    )
    return sandbox_end(row, reason=reason, detail=detail, why=f"reconcile: {detail}")


def _without_row(host: Host, facts: dict[_Key, ContainerState]) -> tuple[list[_Key], list[_Key]]:
    """Containers whose row says that they are over, and containers that no row knows.

    Asked after the engine was, so a row that is there for a container is found.
    """
    over: list[_Key] = []
    unknown: list[_Key] = []
    wanted = {sandbox_id for sandbox_id, _ in facts}
    rows = {row.public_id: row for row in Sandbox.objects.filter(public_id__in=wanted).select_related("node")}
    for key in facts:
        row = rows.get(key[0])
        if row is None:
            unknown.append(key)
            continue
        here = row.node is not None and row.node.name == host.name
        if row.state == SandboxState.DESTROYED or row.generation != key[1] or not here:
            over.append(key)
    return over, unknown


def _is_old(memory: ReconcileMemory, fact: ContainerState) -> bool:
    if fact.started_at is not None and (now() - fact.started_at).total_seconds() > GRACE_SECONDS:
        return True
    seen = memory.first_seen.get((fact.sandbox_id, fact.generation))
    return seen is not None and time.monotonic() - seen > SEEN_SECONDS


def _leftovers_remove(host: Host) -> int:
    found = [item for item in host.engine.leftovers() if item.age_seconds > GRACE_SECONDS]
    if not found:
        return 0
    living = set(
        Sandbox.objects.filter(public_id__in=[item.sandbox_id for item in found], node__name=host.name)
        .exclude(state=SandboxState.DESTROYED)
        .values_list("public_id", flat=True)
    )
    return sum(_leftover_remove(host, item) for item in found if item.sandbox_id not in living)


def _leftover_remove(host: Host, item: Leftover) -> bool:
    generation = 1 if item.generation is None else item.generation
    return _destroyed(host, (item.sandbox_id, generation), "folder without container or row")


def _destroyed(host: Host, key: _Key, why: str) -> bool:
    log.warning("reconcile.remove", sandbox=key[0], generation=key[1], why=why)
    host.engine.destroy(*key)
    return True


def stopping_sweep(host: Host) -> None:
    """Remove what is `stopping` here, for removals that failed or whose message was lost."""
    rows = Sandbox.objects.filter(node__name=host.name, state=SandboxState.STOPPING)
    for pk in rows.values_list("pk", flat=True)[:50]:
        sandbox_remove(host, pk)

"""Why a sandbox died, and what is kept of it: from its container's end, the node's witness and the host's own start.

The order of the questions is the order of certainty: what the kernel said of memory, the clock, the host, the engine;
what is left was done by somebody from outside, or by the guest itself.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import structlog

from e2a.core.clock import now, seconds
from e2a.core.errors import E2AError, EngineUnavailable
from sandboxes.engines.base import ContainerState
from sandboxes.host import Host
from sandboxes.models import CONTAINED_STATES, DeathReason, Sandbox
from sandboxes.witness import Seen

log = structlog.get_logger(__name__)

OUTAGE_SECONDS = 300.0
"""A container that ended while the engine was down, or so long after, was taken down with it."""
RESTART_SECONDS = 60.0
"""An engine that starts ends what it finds running without it within that time."""
OOM_SECONDS = 10.0
"""Docker's `OOMKilled` stays true for a container that went on; one that died later than that died of something
else."""
LAST_OUTPUT_CHARACTERS = 64 * 1024
_KILLED = frozenset({0, 137, 143})
"""The guest ends with 0 when it is told to, with 137 or 143 when a signal ended it."""
_DEADLINE = 124
"""The guest ended itself at its deadline (`sandboxes/guest/PROTOCOL.md`)."""
_MIB = 1024 * 1024
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """The kernel's name for this run of the host; another one after each start."""
    return _BOOT_ID.read_text().strip()


def death_of(
    row: Sandbox,
    fact: ContainerState | None,
    engine_was_down_at: datetime | None,
    *,
    engine_started_at: datetime | None = None,
    seen: Seen | None = None,
) -> tuple[DeathReason, str]:
    """Why a sandbox died, as far as the evidence goes, and a sentence for its tenant."""
    exit_code = fact.exit_code if fact is not None else seen.exit_code if seen is not None else None
    ended_at = (fact.finished_at if fact is not None else None) or (seen.died_at if seen else None) or now()
    if died_of_memory(fact, seen):
        return DeathReason.OOM, (
            f"It used more than its {row.template.memory_mib} MiB of memory: the kernel killed its first process."
        )
    is_over = row.expires_at is not None and row.expires_at <= now()
    if is_over or exit_code == _DEADLINE:
        return DeathReason.TTL, "It reached the end of its life."
    started_at = (fact.started_at if fact is not None else None) or row.created_at
    if _is_of_another_boot(row, started_at):
        return DeathReason.HOST_RESTART, "Its host was restarted."
    if _fell_with_engine(fact, started_at, ended_at, engine_was_down_at, engine_started_at):
        return DeathReason.HOST_RESTART, "The container engine of its host was restarted."
    if fact is None:
        if exit_code is None:
            return DeathReason.LOST, "Its container was removed from outside, and nobody recorded its end."
        return DeathReason.LOST, f"Its container was killed and removed from outside (exit code {exit_code})."
    if exit_code is None:
        return DeathReason.LOST, "Its container ended, and nobody recorded how."
    if exit_code in _KILLED:
        how = "killed" if exit_code == 137 else "stopped"
        return (
            DeathReason.LOST,
            f"Its container was {how} from outside (exit code {exit_code}), not for memory.",
        )
    return DeathReason.AGENT_EXIT, f"Its first process ended with {exit_code}."


def died_of_memory(fact: ContainerState | None, seen: Seen | None) -> bool:
    """Whether memory ended all of it: not a child of it some time before."""
    if fact is None or not fact.oom:
        return False
    if seen is None or seen.oom_at is None or fact.finished_at is None:
        return True
    return fact.finished_at - seen.oom_at < timedelta(seconds=OOM_SECONDS)


def _is_of_another_boot(row: Sandbox, started_at: datetime) -> bool:
    if row.boot_id:
        return row.boot_id != boot_id()
    return started_at < _booted_at()


def _fell_with_engine(
    fact: ContainerState | None,
    started_at: datetime,
    ended_at: datetime,
    was_down_at: datetime | None,
    engine_started_at: datetime | None,
) -> bool:
    """Whether the engine's own end took it down: seen as an outage, or by its start since."""
    if was_down_at is not None and abs((ended_at - was_down_at).total_seconds()) < OUTAGE_SECONDS:
        return True
    if fact is None or engine_started_at is None:
        return False  # One that is gone was removed by somebody: an engine that starts keeps what it had.
    since = (ended_at - engine_started_at).total_seconds()
    return started_at < engine_started_at and -OUTAGE_SECONDS < since < RESTART_SECONDS


def _booted_at() -> datetime:
    """When this host was started, to the second; after that no earlier process lives."""
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return now() - seconds(uptime)


def memory_sample(host: Host) -> None:
    """Look at the memory of every container of this node. One query, and about 60 µs a container."""
    rows = Sandbox.objects.filter(node__name=host.name, state__in=CONTAINED_STATES).exclude(container_id="")
    living = [
        ((name, number), container)
        for name, number, container in rows.values_list("public_id", "generation", "container_id")
    ]
    for key, container in living:
        if (use := host.engine.memory_use(container)) is not None:
            host.witness.sampled(key, use)
    host.witness.keep(key for key, _ in living)


def death_evidence(host: Host, sandbox: Sandbox) -> dict[str, Any]:
    """What can still be learnt: how its container ended, how much memory it used and when, what it printed last.

    Costs a call of the engine. What cannot be learnt is null, never a guess. Raises EngineUnavailable: then
    nothing can be removed either.
    """
    evidence: dict[str, Any] = {
        "exit_code": None,
        "oom": False,
        "oom_kills": None,
        "memory_peak_mib": None,
        "memory_curve": [],
        "last_output": "",
    }
    key = (sandbox.public_id, sandbox.generation)
    try:
        state = host.engine.inspect(*key)
        if state is not None and (use := host.engine.memory_use(state.container_id)) is not None:
            host.witness.sampled(key, use)  # It still runs, or is frozen.
        seen = host.witness.seen(key)
        if state is not None:
            evidence["exit_code"], evidence["oom"] = state.exit_code, died_of_memory(state, seen)
        elif seen is not None:
            evidence["exit_code"] = seen.exit_code
        if seen is not None:
            evidence |= _memory_told(sandbox, seen)
        if evidence["oom"]:
            evidence |= _at_the_limit(sandbox, evidence)
        last_output = host.engine.last_output(sandbox.public_id)
        evidence["last_output"] = last_output[-LAST_OUTPUT_CHARACTERS:].replace("\0", "�")
    except EngineUnavailable:
        raise
    except E2AError as error:
        log.info("sandbox.evidence_incomplete", sandbox=sandbox.public_id, error=error.detail)
    return evidence


def _memory_told(sandbox: Sandbox, seen: Seen) -> dict[str, Any]:
    """Times count from when it became the tenant's; what a parked one used before is left out."""
    began = (sandbox.claimed_at or sandbox.created_at).timestamp()
    points = [[round(at - began), round(value / _MIB, 1)] for at, value in seen.curve.points]
    peak = seen.peak_bytes
    return {
        "oom_kills": seen.oom_kills,
        "memory_peak_mib": None if peak is None else round(peak / _MIB),
        "memory_curve": [point for point in points if point[0] >= 0],
    }


def _at_the_limit(sandbox: Sandbox, evidence: dict[str, Any]) -> dict[str, Any]:
    """The kernel kills for memory at the limit and nowhere below, so that is known, seen or not."""
    limit = sandbox.template.memory_mib
    return {
        "memory_peak_mib": max(limit, evidence["memory_peak_mib"] or 0),
        "oom_kills": max(1, evidence["oom_kills"] or 0),
    }

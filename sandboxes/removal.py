"""How a node takes a sandbox away, and what it keeps of it."""

from __future__ import annotations

from typing import Any

import structlog

from e2a.core.clock import now
from e2a.core.errors import E2AError, EngineUnavailable
from sandboxes.guest_probe import probe_stats
from sandboxes.host import Host
from sandboxes.lifecycle import sandbox_gone
from sandboxes.models import Sandbox, SandboxState

log = structlog.get_logger(__name__)

LAST_OUTPUT_CHARACTERS = 4000
_MIB = 1024 * 1024


def sandbox_remove(host: Host, sandbox_pk: int) -> None:
    """Remove the container of a sandbox that ends or has ended; the row of a `stopping` one is `destroyed`
    then.

    Does nothing for a living one, and when another thread is at it. Raises EngineError: the sweep tries
    again.
    """
    with host.working_on(sandbox_pk) as is_ours:
        if not is_ours:
            return
        sandbox = Sandbox.objects.select_related("node").filter(pk=sandbox_pk).first()
        if sandbox is None or sandbox.node is None or sandbox.node.name != host.name:
            return
        if sandbox.state == SandboxState.STOPPING:
            if sandbox.save_until is not None and sandbox.save_until > now():
                return  # Its workspace is being saved; whoever does that asks again.
            evidence = death_evidence(host, sandbox)
            host.engine.destroy(sandbox.public_id, sandbox.generation)
            sandbox_gone(sandbox, why="its container is removed", evidence=evidence)
        elif sandbox.state == SandboxState.DESTROYED:
            host.engine.destroy(sandbox.public_id, sandbox.generation)


def death_evidence(host: Host, sandbox: Sandbox) -> dict[str, Any]:
    """What can still be learnt: how its container ended, how much memory it used, its guest's last words.

    Costs a call of the engine and one of the guest. What cannot be learnt is null, never a guess. Raises
    EngineUnavailable: then nothing can be removed either.
    """
    evidence: dict[str, Any] = {"exit_code": None, "oom": False, "memory_peak_mib": None, "last_output": ""}
    try:
        state = host.engine.inspect(sandbox.public_id, sandbox.generation)
        if state is not None:
            evidence["exit_code"], evidence["oom"] = state.exit_code, state.oom
        if state is not None and state.status == "running":
            peak = probe_stats(host.sandboxes_folder, sandbox.public_id).memory_peak_bytes
            evidence["memory_peak_mib"] = None if peak is None else round(peak / _MIB)
        last_output = host.engine.last_output(sandbox.public_id)
        evidence["last_output"] = last_output[-LAST_OUTPUT_CHARACTERS:].replace("\0", "�")
    except EngineUnavailable:
        raise
    except E2AError as error:
        log.info("sandbox.evidence_incomplete", sandbox=sandbox.public_id, error=error.detail)
    return evidence

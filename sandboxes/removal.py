"""How a node takes a sandbox away, and what it keeps of it."""

from __future__ import annotations

import time
from typing import Final

from e2a.core.clock import now
from sandboxes.death import death_evidence
from sandboxes.gateway.egress_seen import is_seen, seen_read
from sandboxes.host import Host
from sandboxes.lifecycle import sandbox_gone
from sandboxes.models import Sandbox, SandboxState

SEEN_SECONDS: Final = 0.2
"""Twice as long as its gateway takes to write down what a sandbox tried last (`egress.SAVE_SECONDS`)."""


def sandbox_remove(host: Host, sandbox_pk: int) -> None:
    """Remove the container of a sandbox that ends or has ended; the row of a `stopping` one is `destroyed`
    then.

    Does nothing for a living one, and when another thread is at it. Raises EngineError: the sweep tries
    again.
    """
    with host.working_on(sandbox_pk) as is_ours:
        if not is_ours:
            return
        sandbox = Sandbox.objects.select_related("node", "template").filter(pk=sandbox_pk).first()
        if sandbox is None or sandbox.node is None or sandbox.node.name != host.name:
            return
        if sandbox.state == SandboxState.STOPPING:
            if sandbox.save_until is not None and sandbox.save_until > now():
                return  # Its workspace is being saved; whoever does that asks again.
            evidence = death_evidence(host, sandbox)
            folder = host.sandboxes_folder / sandbox.public_id
            if is_seen(folder):
                time.sleep(SEEN_SECONDS)
            sandbox.egress_seen = seen_read(folder)
            if sandbox.egress_seen:
                Sandbox.objects.filter(pk=sandbox.pk).update(egress_seen=sandbox.egress_seen)
            host.engine.destroy(sandbox.public_id, sandbox.generation)
            sandbox_gone(sandbox, why="its container is removed", evidence=evidence)
            host.witness.forget((sandbox.public_id, sandbox.generation))
        elif sandbox.state == SandboxState.DESTROYED:
            host.engine.destroy(sandbox.public_id, sandbox.generation)

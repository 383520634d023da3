"""How a node makes a sandbox: slot, container, guest. Every step may run twice, and may be the last one
before a crash.

A lease on the row says who is at it (30 s, renewed with the node's heartbeat). The container's name holds
sandbox and generation, so a second run adopts what the first one made. Whoever finds an expired lease goes on
from the row's state.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import structlog
from django.db import IntegrityError, transaction
from django.db.models import Q

from e2a.core.clock import now, seconds
from e2a.core.enqueue import enqueue
from e2a.core.errors import EngineError, GuestError, GuestUnreachable, OurError
from sandboxes.death import boot_id
from sandboxes.engines.base import LOWEST_SLOT_UID, ContainerRef, SandboxSpec
from sandboxes.guest_probe import probe_health
from sandboxes.host import Host
from sandboxes.lifecycle import move_record, sandbox_end, sandbox_move
from sandboxes.models import DeathReason, Node, Sandbox, SandboxState, Template
from sandboxes.node_images import node_image_forget
from sandboxes.removal import sandbox_remove
from sandboxes.selectors import node_can_make, node_image

log = structlog.get_logger(__name__)

LEASE_SECONDS = 30.0
HEALTH_SECONDS = 30.0
LONGEST_LIFE_SECONDS = 7200
"""What `max_lifetime_seconds` and a session's `ttl_seconds` may be at most."""
LIFETIME_GRACE_SECONDS = 300
PARKED_SECONDS = 7200
"""The pool replaces a parked sandbox at this age, so its guest must live for a longest life more."""
_SLOT_RACES = 16
_INSPECT_SECONDS = 1.0


class HostFull(OurError):
    """This node has no slot left."""

    code = "host_full"
    title = "The node is full"


class Superseded(OurError):
    """The row moved on without us: it was destroyed, or another process has it now."""

    code = "superseded"
    title = "Somebody else has it"


def sandbox_provision(host: Host, sandbox_pk: int) -> None:
    """Bring the sandbox from where its row stands to `parked`, or to `booting` and the worker's configure.

    Does nothing when it is another's: another thread's, another process's lease, another node's, ended. A
    failure that waiting may mend leaves the row to the next sweep, any other ends the sandbox with its
    reason. Raises HostFull.
    """
    with host.working_on(sandbox_pk) as is_ours:
        sandbox = _lease(host, sandbox_pk) if is_ours else None
        if sandbox is None:
            return
        try:
            _steps(host, sandbox)
            return
        except Superseded as error:
            log.info("provision.superseded", sandbox=sandbox.public_id, why=error.detail)
        except EngineError as error:
            _failed(host, sandbox, error)
            return
        except Exception:
            _lease_drop(host, sandbox)
            raise
    # It was destroyed while its container was being made: the removal that was asked for then found nothing
    # yet.
    sandbox_remove(host, sandbox_pk)


def leases_renew(host: Host) -> None:
    """Say that this process is still at what it has leases for. One UPDATE."""
    busy = host.busy()
    if busy:
        until = now() + seconds(LEASE_SECONDS)
        Sandbox.objects.filter(pk__in=busy, lease_holder=host.holder).update(lease_until=until)


def _lease(host: Host, sandbox_pk: int) -> Sandbox | None:
    """Take the row for this process, a slot with it when it has none yet. None: not ours to take."""
    sandbox = Sandbox.objects.select_related("template", "node").filter(pk=sandbox_pk).first()
    if sandbox is None:
        return None
    free = Q(lease_until__isnull=True) | Q(lease_until__lt=now()) | Q(lease_holder=host.holder)
    lease = {"lease_holder": host.holder, "lease_until": now() + seconds(LEASE_SECONDS)}
    mine = sandbox.node is not None and sandbox.node.name == host.name
    if sandbox.state == SandboxState.CREATING and (sandbox.node is None or mine):
        if not mine and not _can_make(host, sandbox):
            return None  # Another node has its image and runtime.
        return _take_slot(host, sandbox, free, lease)
    resumable = sandbox.state == SandboxState.CONFIGURING or (
        # With an owner it waits for the worker's configure, not for us.
        sandbox.state == SandboxState.BOOTING and sandbox.tenant_id is None
    )
    if mine and resumable:
        taken = Sandbox.objects.filter(free, pk=sandbox_pk, state=sandbox.state).update(**lease)
        return sandbox if taken else None
    return None


def _can_make(host: Host, sandbox: Sandbox) -> bool:
    node = Node.objects.filter(name=host.name).first()
    return node is not None and node_can_make(node, sandbox.template)


def _take_slot(host: Host, sandbox: Sandbox, free: Q, lease: dict[str, object]) -> Sandbox | None:
    """creating → configuring on this node. The unique (node, slot) among living rows decides races. Raises
    HostFull."""
    node = Node.objects.get(name=host.name)
    for _ in range(_SLOT_RACES):
        slot = (
            sandbox.slot
            if sandbox.slot is not None and sandbox.node_id == node.pk
            else slot_free(node, host.capacity)
        )
        if slot is None:
            raise HostFull(f"all {host.capacity} slots of {host.name} are taken")
        claim = {"node": node, "slot": slot, **lease}
        try:
            with transaction.atomic():
                moved = sandbox_move(
                    sandbox,
                    to=SandboxState.CONFIGURING,
                    why=f"taken by {host.name}, slot {slot}",
                    only_if=free & (Q(node__isnull=True) | Q(node=node)),
                    **claim,
                )
        except IntegrityError:
            sandbox.state = SandboxState.CREATING  # Rolled back: somebody else had the slot first.
            continue
        return sandbox if moved else None
    raise HostFull(f"no slot of {host.name} could be had in {_SLOT_RACES} tries")


def slot_free(node: Node, capacity: int) -> int | None:
    """The lowest slot that no living sandbox of the node has, None when it is full."""
    taken = set(
        Sandbox.objects.filter(node=node, slot__isnull=False)
        .exclude(state=SandboxState.DESTROYED)
        .values_list("slot", flat=True)
    )
    return next((slot for slot in range(capacity) if slot not in taken), None)


def parked_row(node: Node, template: Template, capacity: int) -> Sandbox | None:
    """A new row for the pool, which has its slot already. None when the node is full, or somebody took the
    slot."""
    slot = slot_free(node, capacity)
    if slot is None:
        return None
    try:
        with transaction.atomic():
            sandbox = Sandbox.objects.create(template=template, node=node, slot=slot, created_at=now())
            move_record(sandbox, from_state="", to=SandboxState.CREATING, why="for the pool")
    except IntegrityError:
        return None
    return sandbox


def spec_of(host: Host, sandbox: Sandbox) -> SandboxSpec:
    """What the engine is to make."""
    template = sandbox.template
    assert sandbox.slot is not None, "a sandbox is made only once it has a slot"
    uid = LOWEST_SLOT_UID + sandbox.slot
    # The guest's own last word, which nothing can move later; `configure` sets the true, nearer deadline.
    lifetime = LONGEST_LIFE_SECONDS + LIFETIME_GRACE_SECONDS
    if sandbox.tenant_id is None:
        lifetime += PARKED_SECONDS
    return SandboxSpec(
        sandbox_id=sandbox.public_id,
        instance=host.instance,
        generation=sandbox.generation,
        image=(node_image(sandbox.node, template) if sandbox.node else "")
        or template.image_id
        or template.image,
        memory_mib=template.memory_mib,
        cpu=float(template.vcpu),
        disk_mib=template.disk_mib,
        pids=template.pids,
        uid=uid,
        gid=uid,
        folder=host.sandboxes_folder / sandbox.public_id,
        lifetime_seconds=lifetime,
        runtime=template.runtime or host.runtime,
        shm_mib=template.shm_mib,
    )


def _steps(host: Host, sandbox: Sandbox) -> None:
    if sandbox.state == SandboxState.CONFIGURING:
        spec = spec_of(host, sandbox)
        ref = host.engine.create(spec)
        _still_ours(
            host, sandbox, container_id=ref.container_id, image_id=spec.image[:100], boot_id=boot_id()
        )
        _start(host, ref)
        _advance(host, sandbox, SandboxState.BOOTING, why="its container runs")
    _wait_healthy(host, sandbox)
    if sandbox.tenant_id is None:
        _advance(
            host, sandbox, SandboxState.PARKED, why="its guest answers", lease_until=None, lease_holder=""
        )
        return
    with transaction.atomic():
        # No lease is left: until the worker has configured it, the sweep may ask for that again at any time.
        _still_ours(host, sandbox, lease_until=None, lease_holder="")
        enqueue("sandboxes.tasks.sandbox_configure", sandbox_id=sandbox.pk)


def _start(host: Host, ref: ContainerRef) -> None:
    try:
        host.engine.start(ref)
    except EngineError as error:
        state = host.engine.inspect(ref.sandbox_id, ref.generation)
        if state is None or state.status != "running":
            raise
        log.warning("provision.started_anyway", sandbox=ref.sandbox_id, error=error.detail)


def _still_ours(host: Host, sandbox: Sandbox, **updates: object) -> None:
    """Write `updates` while we hold the lease. Raises Superseded."""
    rows = Sandbox.objects.filter(pk=sandbox.pk, state=sandbox.state, lease_holder=host.holder)
    if not rows.update(**updates):
        raise Superseded(f"{sandbox.public_id} is not ours any more")


def _advance(host: Host, sandbox: Sandbox, to: SandboxState, *, why: str, **updates: object) -> None:
    if not sandbox_move(sandbox, to=to, why=why, only_if=Q(lease_holder=host.holder), **updates):
        raise Superseded(f"{sandbox.public_id} is {sandbox.state} now, not on its way to {to}")


def _pauses() -> Iterable[float]:
    """5 ms at first, since a guest is there after some 50; 200 ms in the end."""
    pause = 0.005
    while True:
        yield pause
        pause = min(pause * 1.3, 0.2)


def _wait_healthy(host: Host, sandbox: Sandbox) -> None:
    """Raises EngineError when its container ends, or its guest does not answer within 30 s."""
    began_at = inspected_at = time.monotonic()
    for pause in _pauses():
        try:
            probe_health(host.sandboxes_folder, sandbox.public_id)
            return
        except (GuestUnreachable, GuestError) as error:
            moment = time.monotonic()
            if moment - began_at > HEALTH_SECONDS:
                raise EngineError(
                    f"its guest did not answer within {HEALTH_SECONDS:g} s: {error.detail}"
                ) from error
        if moment - inspected_at > _INSPECT_SECONDS:
            inspected_at = moment
            state = host.engine.inspect(sandbox.public_id, sandbox.generation)
            if state is None or state.status == "exited":
                code = "" if state is None else f" with {state.exit_code}"
                words = host.engine.last_output(sandbox.public_id)[-300:]
                raise EngineError(f"its container ended{code} before its guest answered: {words}")
        time.sleep(pause)


def _lease_drop(host: Host, sandbox: Sandbox) -> None:
    """Whoever sweeps next may go on."""
    Sandbox.objects.filter(pk=sandbox.pk, lease_holder=host.holder).update(lease_until=None, lease_holder="")


def _failed(host: Host, sandbox: Sandbox, error: EngineError) -> None:
    """Leave it to the next sweep when waiting may help, else end it. The engine's own words are for
    operators."""
    log.warning("provision.engine", sandbox=sandbox.public_id, retryable=error.retryable, error=error.detail)
    # The usual runtime fails for a moment under load; one that a template asked for does not work on this host.
    is_retryable = error.retryable and not (error.code == "runtime_failed" and sandbox.template.runtime)
    if is_retryable:
        _lease_drop(host, sandbox)
        return
    is_image = error.code == "image_missing"
    if is_image:
        node_image_forget(host, sandbox.template)
    sandbox_end(
        sandbox,
        reason=DeathReason.IMAGE_ERROR if is_image else DeathReason.LOST,
        detail="Its image is not on the node." if is_image else "Its container could not be started.",
        why=error.detail,
    )

"""Freezing a sandbox and thawing it. The row's state is the wish; `frozen_at` is what its node last did.

`running` with a `frozen_at` is being thawed, `paused` without one is being frozen: the node's task makes them
agree, and its sweep does when the task was lost. A frozen sandbox costs memory and disk, and no CPU.
"""

from __future__ import annotations

import time

import structlog
from django.db import transaction
from django.db.models import Q

from e2a.core.clock import now
from e2a.core.enqueue import enqueue
from e2a.core.errors import Conflict, E2AError, EngineError, Unavailable
from sandboxes.activity import is_worked_in
from sandboxes.configuration import guest_configure, is_configuration_current
from sandboxes.engines.base import ContainerState
from sandboxes.guest_answers import not_running
from sandboxes.host import Host
from sandboxes.lifecycle import node_queue, sandbox_move
from sandboxes.models import Sandbox, SandboxState
from sandboxes.waiting import database_release

log = structlog.get_logger(__name__)

FREEZE_SECONDS = 10.0
A_PASS = 50
_LOOK_SECONDS = 0.02
_FRESH = ["state", "frozen_at", "last_active_at", "expires_at", "configured_with", "death_reason"]
_TRIES = 100


def sandbox_pause(*, sandbox: Sandbox) -> Sandbox:
    """Freeze all that runs in it; fine when it is paused. Returns once it is frozen.

    Its life goes on to its end (`expires_at`), its idle time does not. Raises `not_running` for one that is not
    ready or has ended, `task_running` while a session's task works in it, `sandbox_not_ready` when its node did not do
    it in 10 s: then it does so later.
    """
    if is_worked_in(sandbox.pk):
        raise _task_running()
    paused = _turn(sandbox, to=SandboxState.PAUSED, why="asked to pause")
    # A turn says that it works before it reads whether the sandbox is paused, and we the other way round: one of us
    # sees the other.
    if is_worked_in(sandbox.pk):
        sandbox_resume(sandbox=sandbox, why="a task began")
        raise _task_running()
    return paused


def _task_running() -> Conflict:
    return Conflict("A task of its session runs in it; cancel the task first, or wait.", code="task_running")


def sandbox_resume(*, sandbox: Sandbox, why: str = "asked to resume") -> Sandbox:
    """Thaw it; fine when it runs. Returns once it runs. Raises as `sandbox_pause` does."""
    resumed = _turn(sandbox, to=SandboxState.RUNNING, why=why)
    _tell_what_changed(resumed)
    return resumed


def _tell_what_changed(sandbox: Sandbox) -> None:
    """A frozen guest hears nothing: its deadline, or a secret, may have changed since. The guest waits 10 s for a new
    deadline when it was thawed after the old one. What fails here is done before the next command."""
    try:
        if sandbox.state == SandboxState.RUNNING and not is_configuration_current(sandbox):
            guest_configure(sandbox)
            Sandbox.objects.filter(pk=sandbox.pk).update(configured_with=sandbox.configured_with)
    except E2AError as error:
        log.warning("sandbox.configure_failed", sandbox=sandbox.public_id, error=error.detail)


def _turn(sandbox: Sandbox, *, to: SandboxState, why: str) -> Sandbox:
    is_pause = to == SandboxState.PAUSED
    if sandbox.state not in (SandboxState.RUNNING, SandboxState.PAUSED) or sandbox.node is None:
        raise not_running(sandbox)
    with transaction.atomic():
        # Whether it is frozen is not known until its node has been there.
        moment = now()
        values = {"frozen_at": None} if is_pause else {"frozen_at": moment, "last_active_at": moment}
        if sandbox.state != to:
            sandbox_move(sandbox, to=to, why=why, **values)
        if sandbox.state != to:
            raise not_running(sandbox)
        enqueue("sandboxes.tasks.sandbox_freeze", queue=node_queue(sandbox.node.name), sandbox_id=sandbox.pk)
    _wait(sandbox, to)
    return sandbox


def _wait(sandbox: Sandbox, to: SandboxState) -> None:
    """Until the node did it, or somebody wished otherwise meanwhile."""
    give_up_at = time.monotonic() + FREEZE_SECONDS
    while True:
        sandbox.refresh_from_db(fields=_FRESH)
        if sandbox.state != to and sandbox.state not in (SandboxState.RUNNING, SandboxState.PAUSED):
            raise not_running(sandbox)
        if sandbox.state != to or (sandbox.frozen_at is not None) == (to == SandboxState.PAUSED):
            return
        if time.monotonic() > give_up_at:
            raise Unavailable(
                f"Its node did not make it {to} within {FREEZE_SECONDS:g} s.", code="sandbox_not_ready"
            )
        database_release()
        time.sleep(_LOOK_SECONDS)


def sandbox_freeze(host: Host, sandbox_pk: int) -> None:
    """On its node: make the container as the row wishes. Twice is fine. Raises EngineError: the sweep tries
    again."""
    for _ in range(_TRIES):
        with host.working_on(sandbox_pk) as is_ours:
            if is_ours:
                if not _frozen_as_wished(host, sandbox_pk):
                    return
                continue
        time.sleep(_LOOK_SECONDS)  # Another thread is at it; it may have read the wish before it changed.


def _frozen_as_wished(host: Host, sandbox_pk: int) -> bool:
    """Whether something had to be done: then the wish may have changed meanwhile."""
    row = Sandbox.objects.filter(pk=sandbox_pk, node__name=host.name).first()
    if row is None:
        return False
    rows = Sandbox.objects.filter(pk=row.pk, state=row.state)
    if row.state == SandboxState.PAUSED and row.frozen_at is None:
        host.engine.pause(row.public_id, row.generation)
        rows.update(frozen_at=now())
        return True
    is_saved = row.state == SandboxState.STOPPING and row.save_until is not None
    if (row.state == SandboxState.RUNNING or is_saved) and row.frozen_at is not None:
        host.engine.resume(row.public_id, row.generation)
        rows.update(frozen_at=None)
        return True
    return False


def freezing_sweep(host: Host) -> None:
    """Do what was wished and not done: a message was lost, or the engine failed. One query when all is well."""
    undone = (
        Q(state=SandboxState.PAUSED, frozen_at__isnull=True)
        | Q(state=SandboxState.RUNNING, frozen_at__isnull=False)
        | Q(state=SandboxState.STOPPING, save_until__isnull=False, frozen_at__isnull=False)
    )
    for pk in Sandbox.objects.filter(undone, node__name=host.name).values_list("pk", flat=True)[:A_PASS]:
        try:
            sandbox_freeze(host, pk)
        except EngineError as error:
            log.warning("sandbox.freeze_failed", sandbox_pk=pk, error=error.detail)


def freezing_compare(row: Sandbox, fact: ContainerState | None) -> None:
    """Somebody froze or thawed the container behind our back: note it, and the sweep makes it as the row wishes.

    `row` was read before `fact` was; a row that was moved since is left alone.
    """
    if fact is None:
        return
    rows = Sandbox.objects.filter(pk=row.pk, state=row.state, frozen_at=row.frozen_at)
    if row.state == SandboxState.PAUSED and row.frozen_at is not None and fact.status == "running":
        rows.update(frozen_at=None)
        log.warning("sandbox.thawed_by_others", sandbox=row.public_id)
    if row.state == SandboxState.RUNNING and row.frozen_at is None and fact.status == "paused":
        rows.filter(frozen_at__isnull=True).update(frozen_at=now())
        log.warning("sandbox.frozen_by_others", sandbox=row.public_id)

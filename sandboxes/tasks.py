"""Celery's way in. Every task re-reads its row, decides from it, and may run twice."""

from __future__ import annotations

import structlog
from celery import shared_task

from e2a.core.enqueue import enqueue
from e2a.core.errors import DeadlineExceeded, EngineError, GuestError, GuestUnreachable
from sandboxes import jobs, pausing, reaping, restoring, saving, snapshot_sweep, template_trial, workspaces
from sandboxes.arrivals import provision_waiting
from sandboxes.host import this_host
from sandboxes.models import Restore, Sandbox, SandboxState
from sandboxes.node import sandbox_provision_or_give_way
from sandboxes.provision import HostFull
from sandboxes.removal import sandbox_remove as remove
from sandboxes.services import sandbox_configure as configure

log = structlog.get_logger(__name__)


@shared_task
def sandbox_provision(sandbox_id: int) -> None:
    """Queue `provision`: one more waits, and whichever node has room makes the oldest. A node without leaves it to
    the sweeps of the others."""
    try:
        provision_waiting(this_host(), sandbox_provision_or_give_way)
    except HostFull as error:
        log.info("provision.no_room", sandbox_pk=sandbox_id, error=error.detail)


@shared_task
def sandbox_configure(sandbox_id: int) -> None:
    """Queue `control`: only workers hold the vault's keys. A guest that is silent is tried again by the
    sweep."""
    sandbox = (
        Sandbox.objects.select_related("node", "tenant", "template")
        .filter(pk=sandbox_id, state=SandboxState.BOOTING, tenant__isnull=False)
        .first()
    )
    if sandbox is None:
        return
    if sandbox.restore == Restore.WANTED:
        enqueue("sandboxes.tasks.sandbox_restore", sandbox_id=sandbox_id)
        return
    try:
        configure(sandbox)
    except (GuestUnreachable, DeadlineExceeded, GuestError) as error:
        log.warning("sandbox.configure_failed", sandbox=sandbox.public_id, error=error.detail)


@shared_task
def sandbox_restore(sandbox_id: int) -> None:
    """Queue `archives`: put its files back, then configure it."""
    if restoring.sandbox_restore(sandbox_id):
        enqueue("sandboxes.tasks.sandbox_configure", sandbox_id=sandbox_id)


@shared_task
def snapshot_save(snapshot_id: int) -> None:
    """Queue `archives`. A worker that is killed leaves it to the sweep."""
    saving.snapshot_save(snapshot_id)


@shared_task
def snapshot_remove(snapshot_id: int) -> None:
    snapshot_sweep.snapshot_remove(snapshot_id)


@shared_task
def snapshots_sweep() -> None:
    snapshot_sweep.snapshots_sweep()


@shared_task
def storage_tidy() -> None:
    snapshot_sweep.storage_tidy()


@shared_task
def workspaces_autosave() -> None:
    workspaces.workspaces_autosave()


@shared_task
def sandbox_remove(sandbox_id: int) -> None:
    """Queue `node.<name>`. When the engine fails, the node's sweep tries again."""
    try:
        remove(this_host(), sandbox_id)
    except EngineError as error:
        log.warning("sandbox.remove_failed", sandbox_pk=sandbox_id, error=error.detail)


@shared_task
def sandbox_freeze(sandbox_id: int) -> None:
    """Queue `node.<name>`: freeze or thaw it, as its row says. When the engine fails, the node's sweep tries
    again."""
    try:
        pausing.sandbox_freeze(this_host(), sandbox_id)
    except EngineError as error:
        log.warning("sandbox.freeze_failed", sandbox_pk=sandbox_id, error=error.detail)


@shared_task
def template_try(template_id: int) -> None:
    """Queue `node.<name>`: a trial run of an operator's image. The nodes' sweep finds those whose message was lost."""
    template_trial.template_try(this_host(), template_id)


@shared_task
def sandboxes_reap() -> None:
    reaping.sandboxes_reap()


@shared_task
def sandboxes_unstick() -> None:
    reaping.sandboxes_unstick()


@shared_task
def sandboxes_purge() -> None:
    reaping.sandboxes_purge()


@shared_task
def jobs_settle() -> None:
    jobs.jobs_settle()

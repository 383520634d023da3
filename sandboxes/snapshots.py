"""Snapshots: asked for, listed, deleted. Saving is `saving`, putting files back is `restoring`; both run in workers."""

from __future__ import annotations

import time

import structlog
from django.conf import settings
from django.db import transaction
from django.db.models import QuerySet, Sum

from accounts.models import Tenant
from e2a.core.clock import now
from e2a.core.enqueue import enqueue
from e2a.core.errors import (
    Conflict,
    E2AError,
    NotFound,
    QuotaExceeded,
    TooLarge,
    Unavailable,
    ValidationFailed,
)
from e2a.core.states import advance
from sandboxes.models import UNREADY_STATES, Restore, Sandbox
from sandboxes.snapshot_models import SNAPSHOT_TRANSITIONS, Snapshot, SnapshotState
from sandboxes.waiting import database_release

log = structlog.get_logger(__name__)

WAIT_SECONDS = 10.0
"""How long a request waits for its snapshot to be whole; what takes longer answers `saving`."""
SHOWN_STATES = frozenset({SnapshotState.SAVING, SnapshotState.READY, SnapshotState.FAILED})
_MIB = 1024 * 1024
_LOOK_SECONDS = 0.05


def snapshot_create(*, sandbox: Sandbox, name: str = "", wait_seconds: float | None = None) -> Snapshot:
    """Keep the files of a running sandbox. Waits for the end (10 s unless given); returns `saving` when it takes
    longer.

    Raises `quota_exceeded`, and what made it fail meanwhile (`snapshot_too_large`, …): then no row is left.
    """
    tenant = sandbox.tenant
    assert tenant is not None, "only an owner asks"
    with transaction.atomic():
        quota_hold(tenant)
        snapshot = Snapshot.objects.create(
            tenant=tenant,
            sandbox=sandbox,
            sandbox_public_id=sandbox.public_id,
            name=name,
            template_name=sandbox.template.name,
            created_at=now(),
        )
        enqueue("sandboxes.tasks.snapshot_save", snapshot_id=snapshot.pk)
    _wait(snapshot, WAIT_SECONDS if wait_seconds is None else wait_seconds)
    if snapshot.state == SnapshotState.FAILED:
        snapshot_delete(snapshot)
        raise _failure(snapshot)
    return snapshot


def _wait(snapshot: Snapshot, wait_seconds: float) -> None:
    give_up_at = time.monotonic() + wait_seconds
    while snapshot.state == SnapshotState.SAVING and time.monotonic() < give_up_at:
        database_release()
        time.sleep(_LOOK_SECONDS)
        try:
            snapshot.refresh_from_db()
        except Snapshot.DoesNotExist:
            raise NotFound("The snapshot was deleted meanwhile.", code="snapshot_not_found") from None


def _failure(snapshot: Snapshot) -> E2AError:
    match snapshot.error_code:
        case "snapshot_too_large":
            return TooLarge(snapshot.error_detail, code="snapshot_too_large")
        case "not_running":
            return Conflict(snapshot.error_detail, code="not_running")
    return Unavailable(snapshot.error_detail, code="snapshot_failed")


def quota_hold(tenant: Tenant) -> None:
    """Raises QuotaExceeded. The tenant's row stays locked until the transaction ends, so that racing calls count."""
    ours = settings.E2A
    Tenant.objects.select_for_update().get(pk=tenant.pk)
    rows = Snapshot.objects.filter(tenant=tenant, state__in=[SnapshotState.SAVING, SnapshotState.READY])
    if rows.filter(is_version=False).count() >= ours.max_snapshots:
        raise QuotaExceeded(f"At most {ours.max_snapshots} snapshots may be kept.")
    if used_bytes(tenant) >= ours.max_snapshots_mib * _MIB:
        raise QuotaExceeded(
            f"Snapshots and workspaces use {ours.max_snapshots_mib} MiB, all that is allowed."
        )


def used_bytes(tenant: Tenant) -> int:
    """What the tenant's snapshots and workspaces take in the storage."""
    rows = Snapshot.objects.filter(tenant=tenant, state=SnapshotState.READY)
    return rows.aggregate(total=Sum("size_bytes"))["total"] or 0


def snapshots_of(tenant: Tenant, state: str | None = None) -> QuerySet[Snapshot]:
    """What the tenant asked for and did not delete. Raises `ValidationFailed` for a state that does not exist."""
    rows = Snapshot.objects.filter(tenant=tenant, is_version=False)
    if state is None:
        return rows.filter(state__in=SHOWN_STATES)
    if state not in SHOWN_STATES:
        known = ", ".join(sorted(SHOWN_STATES))
        raise ValidationFailed.of("state", "invalid_state", f"state is one of {known}.")
    return rows.filter(state=state)


def snapshot_get(tenant: Tenant, public_id: str) -> Snapshot:
    """Raises `NotFound` (`snapshot_not_found`), for a stranger's as for one that never was."""
    snapshot = snapshots_of(tenant).filter(public_id=public_id).first()
    if snapshot is None:
        raise NotFound("There is no such snapshot.", code="snapshot_not_found")
    return snapshot


def snapshot_ready(tenant: Tenant, public_id: str) -> Snapshot:
    """One that a sandbox can start from. Raises `snapshot_not_found`, 409 `snapshot_not_ready`."""
    snapshot = snapshot_get(tenant, public_id)
    if snapshot.state != SnapshotState.READY:
        raise Conflict(f"The snapshot is {snapshot.state}, not ready.", code="snapshot_not_ready")
    return snapshot


def snapshot_delete(snapshot: Snapshot) -> bool:
    """Take it from its tenant at once; its object goes when no sandbox that starts needs it. Twice is fine."""
    with transaction.atomic():
        moved = advance(
            Snapshot.objects.filter(pk=snapshot.pk),
            to=SnapshotState.DELETING,
            transitions=SNAPSHOT_TRANSITIONS,
        )
        if moved:
            enqueue("sandboxes.tasks.snapshot_remove", snapshot_id=snapshot.pk)
    return bool(moved)


def is_needed(snapshot: Snapshot) -> bool:
    """Whether a sandbox that is being made starts from it."""
    return Sandbox.objects.filter(
        snapshot=snapshot, restore=Restore.WANTED, state__in=UNREADY_STATES
    ).exists()

"""What makes rows and storage agree, whatever was killed. Safe to run doubled."""

from __future__ import annotations

import structlog
from django.db.models import Q

from e2a.core.clock import now, seconds
from e2a.core.enqueue import enqueue
from sandboxes.saving import SAVE_SECONDS
from sandboxes.snapshot_models import Snapshot, SnapshotState
from sandboxes.snapshots import is_needed
from sandboxes.storage import Storage, StorageError, storage

log = structlog.get_logger(__name__)

A_PASS = 100
GRACE_SECONDS = 5.0
"""A row this young has its message on the way."""
OLD_SECONDS = SAVE_SECONDS * 2
"""Nobody writes an object for so long."""
BREAKER_COUNT = 5
BREAKER_SHARE = 0.2


def snapshots_sweep() -> None:
    """Nudge what nobody does: a message was lost, or a worker was killed."""
    moment = now()
    idle = Q(lease_until__lt=moment) | Q(
        lease_until__isnull=True, created_at__lt=moment - seconds(GRACE_SECONDS)
    )
    for pk in Snapshot.objects.filter(idle, state=SnapshotState.SAVING).values_list("pk", flat=True)[:A_PASS]:
        enqueue("sandboxes.tasks.snapshot_save", snapshot_id=pk)
    gone = Snapshot.objects.filter(state=SnapshotState.DELETING)
    for pk in gone.values_list("pk", flat=True)[:A_PASS]:
        enqueue("sandboxes.tasks.snapshot_remove", snapshot_id=pk)


def snapshot_remove(snapshot_pk: int, *, store: Storage | None = None) -> bool:
    """Remove a deleted snapshot's object, then its row. Whether it is gone; the sweep tries again."""
    snapshot = Snapshot.objects.filter(pk=snapshot_pk, state=SnapshotState.DELETING).first()
    if snapshot is None or is_needed(snapshot):
        return False
    if snapshot.storage_key:
        try:
            (store or storage()).delete(snapshot.storage_key)
        except StorageError as error:
            log.warning("snapshot.remove_failed", snapshot=snapshot.public_id, error=error.detail)
            return False
    snapshot.delete()
    return True


def storage_tidy(*, store: Storage | None = None, older_than_seconds: float = OLD_SECONDS) -> int:
    """Remove parts of writes that never ended, and objects that no row names; returns how many.

    When many objects are unknown at once the database is the suspect, not the storage: then none is removed.
    """
    store = store or storage()
    count = store.leftovers_remove(older_than_seconds=older_than_seconds)
    before = now() - seconds(older_than_seconds)
    seen = 0
    unknown: list[str] = []
    for found in store.objects():
        seen += 1
        if found.written_at <= before and not Snapshot.objects.filter(storage_key=found.key).exists():
            unknown.append(found.key)
    if len(unknown) > BREAKER_COUNT and len(unknown) > BREAKER_SHARE * seen:
        log.error("snapshot.tidy_tripped", unknown=len(unknown), objects=seen)
        return count
    for key in unknown:
        log.warning("snapshot.orphan_removed", key=key)
        store.delete(key)
    return count + len(unknown)

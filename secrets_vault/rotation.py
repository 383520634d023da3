"""Rotation of the vault's ring: every tenant's data key is wrapped anew by the newest key (SECURITY 4.5).

Values are not touched: they are encrypted by the data key, which stays the same. So a rotation costs a row a tenant,
may be stopped and begun again at any time, and readers never notice: a row opens with the key that it names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import structlog
from django.db import transaction
from django.db.models import Count

from accounts.audit import audit_write
from e2a.core.clock import now
from e2a.core.errors import OurError
from e2a.core.keyring import Key, KeyRing
from secrets_vault import crypto
from secrets_vault.models import DataKey

log = structlog.get_logger(__name__)

BATCH = 200
"""Data keys in one transaction: some 70 ms of SQLite's write lock; 10,000 took 3.8 s (2 cores, 2026-11-24)."""


@dataclass(slots=True)
class Rotation:
    """What one run did."""

    rewrapped: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    """Public ids of tenants whose data key does not open, and why; their rows are as they were."""


def data_keys_rewrap(
    ring: KeyRing, *, batch: int = BATCH, progress: Callable[[Rotation], None] | None = None
) -> Rotation:
    """Wrap every data key that another key of the ring wrapped with the newest one.

    One transaction a batch. Resumable after a kill: what is done says so itself. Two at once are fine: a row changes
    only while it names the key that it was read with. Raises KeyRingError without a ring.
    """
    newest, done = ring.newest, Rotation()
    for rows in _batches(newest, batch):
        with transaction.atomic():
            for row in rows:
                _rewrap(row, ring, newest, done)
        if progress is not None:
            progress(done)
    if done.rewrapped or done.failed:
        log.info("vault.rotated", key=newest.id, rewrapped=done.rewrapped, failed=len(done.failed))
        audit_write(
            "vault.rotated",
            target=newest.id,
            rewrapped=done.rewrapped,
            failed=sorted(done.failed)[:50],
        )
    return done


def wrapped_by() -> dict[str, int]:
    """How many data keys each key of the ring (or one that is not in it any more) holds."""
    counted = (
        DataKey.objects.values_list("wrapping_key_id").annotate(count=Count("pk")).order_by("wrapping_key_id")
    )
    return dict(counted)


def _batches(newest: Key, size: int) -> Iterator[list[DataKey]]:
    last = 0
    while True:
        rows = DataKey.objects.select_related("tenant").exclude(wrapping_key_id=newest.id)
        found = list(rows.filter(pk__gt=last).order_by("pk")[:size])
        if not found:
            return
        yield found
        last = found[-1].pk


def _rewrap(row: DataKey, ring: KeyRing, newest: Key, done: Rotation) -> None:
    tenant_id = row.tenant.public_id
    try:
        data_key = crypto.data_key_unwrap(
            bytes(row.wrapped), ring=ring, key_id=row.wrapping_key_id, tenant_id=tenant_id
        )
    except OurError as error:
        done.failed[tenant_id] = f"{error.code}: {error.detail}"
        return
    wrapped = crypto.data_key_wrap(data_key, key=newest, tenant_id=tenant_id)
    unchanged = DataKey.objects.filter(pk=row.pk, wrapping_key_id=row.wrapping_key_id)
    done.rewrapped += unchanged.update(wrapping_key_id=newest.id, wrapped=wrapped, rewrapped_at=now())

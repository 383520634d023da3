"""How a worker saves a sandbox's files: guest → zstd → encryption → storage, a piece at a time.

A lease on the row says who is at it; a worker that is killed leaves a row whose lease runs out, and the next one
begins anew, with another object and another key.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from typing import Any

import structlog
from backports import zstd
from django.conf import settings
from django.db import transaction
from django.db.models import F, Q

from e2a.core.clock import now, seconds
from e2a.core.errors import (
    Conflict,
    DeadlineExceeded,
    E2AError,
    GuestError,
    GuestUnreachable,
    OurError,
    TooLarge,
)
from e2a.core.states import advance
from sandboxes.configuration import guest_client
from sandboxes.guest_client import FileStream, GuestClient
from sandboxes.models import Sandbox, SandboxState
from sandboxes.snapshot_models import SNAPSHOT_TRANSITIONS, Snapshot, SnapshotState
from sandboxes.storage import Storage, StorageError, storage
from sandboxes.workspaces import version_failed, version_settled
from secrets_vault import services as vault

log = structlog.get_logger(__name__)

LEASE_SECONDS = 30.0
RENEW_SECONDS = 5.0
SAVE_SECONDS = 840.0
"""Below what a guest gives one request (900 s)."""
ATTEMPTS = 3
ZSTD_LEVEL = 1
_QUIET_SECONDS = 3.0
_THAW_SECONDS = 10.0
_GUEST_TRIES = 3
_MIB = 1024 * 1024
_SLACK_BYTES = 64 * _MIB
_LOOK_SECONDS = 0.05


class SaveSuperseded(OurError):
    """The snapshot was deleted, or another worker saves it now."""

    code = "superseded"
    title = "Somebody else has it"


def purpose_of(snapshot: Snapshot) -> str:
    """What a snapshot's encryption is bound to."""
    return f"snapshot/{snapshot.public_id}"


def snapshot_save(snapshot_pk: int, *, store: Storage | None = None) -> None:
    """Bring a `saving` snapshot to `ready` or `failed`. Does nothing for one that another worker is at."""
    snapshot = _lease(snapshot_pk)
    if snapshot is None:
        return
    store = store or storage()
    try:
        if snapshot.attempt > ATTEMPTS:
            raise StorageError(f"it was begun {ATTEMPTS} times, and never done")
        _save(snapshot, store)
    except SaveSuperseded as error:
        log.info("snapshot.superseded", snapshot=snapshot.public_id, why=error.detail)
    except TooLarge as error:
        _failed(snapshot, "snapshot_too_large", error.detail)
    except (Conflict, GuestUnreachable) as error:
        _failed(snapshot, "not_running", "The sandbox has ended, or does not answer.", why=error.detail)
    except (GuestError, DeadlineExceeded) as error:
        _failed(snapshot, "snapshot_failed", f"The files could not be read: {error.detail}"[:300])
    except StorageError as error:
        _failed(snapshot, "snapshot_failed", "The storage failed.", why=error.detail)


def _lease(snapshot_pk: int) -> Snapshot | None:
    """Take it for this run, with a new object's name and key. The object of an earlier run goes."""
    snapshot = (
        Snapshot.objects.select_related("tenant", "workspace", "sandbox__node", "sandbox__tenant")
        .filter(pk=snapshot_pk, state=SnapshotState.SAVING)
        .first()
    )
    if snapshot is None:
        return None
    holder = f"{os.getpid()}-{secrets.token_hex(6)}"
    free = Q(lease_until__isnull=True) | Q(lease_until__lt=now())
    rows = Snapshot.objects.filter(free, pk=snapshot.pk, state=SnapshotState.SAVING, attempt=snapshot.attempt)
    earlier = snapshot.storage_key
    values = {
        "lease_holder": holder,
        "storage_key": f"{snapshot.tenant.public_id}/{snapshot.public_id}.{snapshot.attempt + 1}",
        "sealed_key": vault.stream_key_seal(tenant=snapshot.tenant, purpose=purpose_of(snapshot)),
    }
    if not rows.update(attempt=F("attempt") + 1, lease_until=now() + seconds(LEASE_SECONDS), **values):
        return None
    snapshot.attempt += 1
    for name, value in values.items():
        setattr(snapshot, name, value)
    if earlier:
        _object_remove(storage(), earlier)
    return snapshot


def _save(snapshot: Snapshot, store: Storage) -> None:
    sandbox = snapshot.sandbox
    if sandbox is None or sandbox.node is None or sandbox.state == SandboxState.DESTROYED:
        raise Conflict("its sandbox has ended")
    if snapshot.is_version and sandbox.state == SandboxState.STOPPING:
        _make_quiet(sandbox)
    limit = settings.E2A.max_snapshot_mib * _MIB
    client = guest_client(sandbox)
    stream = _opened(client, limit)
    digest = hashlib.sha256()
    lease = _Lease(snapshot)
    with stream:
        sealed = vault.stream_seal(
            tenant=snapshot.tenant,
            purpose=purpose_of(snapshot),
            sealed_key=bytes(snapshot.sealed_key),
            pieces=_compressed(stream),
        )
        size = store.write(
            snapshot.storage_key, _watched(sealed, digest, lease, limit + limit // 16 + _SLACK_BYTES)
        )
    headers = stream.headers
    done = _settled(
        snapshot,
        SnapshotState.READY,
        size_bytes=size,
        sha256=digest.hexdigest(),
        files=_count(headers.get("x-e2a-files")),
        files_bytes=_count(headers.get("x-e2a-bytes")),
        skipped=_count(headers.get("x-e2a-skipped")) or 0,
        ready_at=now(),
    )
    if not done:
        _object_remove(store, snapshot.storage_key)
        raise SaveSuperseded("it was deleted or taken over while its last bytes were written")
    log.info("snapshot.ready", snapshot=snapshot.public_id, sandbox=sandbox.public_id, size=size)


def _opened(client: GuestClient, limit: int) -> FileStream:
    """The guest's tar. A guest that is silent is asked again: its gateway may be restarting."""
    for left in reversed(range(_GUEST_TRIES)):
        try:
            return client.snapshot_read(limit_bytes=limit, deadline_seconds=SAVE_SECONDS)
        except GuestUnreachable as error:
            if not left or error.code == "no_such_sandbox":
                raise
            time.sleep(0.5)
        except GuestError as error:
            if error.code == "too_large":
                raise TooLarge(f"At most {limit // _MIB} MiB of files: {error.detail}.") from error
            raise
    raise AssertionError("the last try returns or raises")


def _compressed(pieces: Iterable[bytes]) -> Iterator[bytes]:
    compressor = zstd.ZstdCompressor(level=ZSTD_LEVEL)
    for piece in pieces:
        if packed := compressor.compress(piece):
            yield packed
    yield compressor.flush()


def _watched(pieces: Iterable[bytes], digest: hashlib._Hash, lease: _Lease, most: int) -> Iterator[bytes]:
    """The same bytes, counted, digested, and with the lease renewed as they go."""
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > most:
            raise TooLarge("The files grew beyond the limit while they were saved.")
        digest.update(piece)
        lease.renew()
        yield piece
    lease.renew(is_last=True)


class _Lease:
    """Ours as long as we renew it."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._rows = Snapshot.objects.filter(
            pk=snapshot.pk, state=SnapshotState.SAVING, lease_holder=snapshot.lease_holder
        )
        self._renewed_at = time.monotonic()

    def renew(self, *, is_last: bool = False) -> None:
        """Raises SaveSuperseded when it is not ours any more. At most one query in 5 s."""
        moment = time.monotonic()
        if not is_last and moment - self._renewed_at < RENEW_SECONDS:
            return
        if not self._rows.update(lease_until=now() + seconds(LEASE_SECONDS)):
            raise SaveSuperseded("it was deleted, or another worker has it")
        self._renewed_at = moment


def _settled(snapshot: Snapshot, to: SnapshotState, **values: Any) -> bool:
    rows = Snapshot.objects.filter(pk=snapshot.pk, lease_holder=snapshot.lease_holder)
    with transaction.atomic():
        # Locked first where a start of the workspace locks it first, too.
        moved = advance(
            rows, to=to, transitions=SNAPSHOT_TRANSITIONS, lease_until=None, lease_holder="", **values
        )
        if not moved:
            return False
        snapshot.refresh_from_db()
        if snapshot.is_version:
            (version_settled if to == SnapshotState.READY else version_failed)(snapshot)
    return True


def _failed(snapshot: Snapshot, code: str, detail: str, *, why: str = "") -> None:
    log.warning("snapshot.failed", snapshot=snapshot.public_id, code=code, detail=why or detail)
    _settled(snapshot, SnapshotState.FAILED, error_code=code, error_detail=detail)


def _object_remove(store: Storage, key: str) -> None:
    try:
        store.delete(key)
    except StorageError as error:
        log.warning("snapshot.object_left", key=key, error=error.detail)  # The hourly sweep finds it.


def _make_quiet(sandbox: Sandbox) -> None:
    """Nothing writes any more while the last version is read: thaw it, end what runs, first kindly."""
    give_up_at = time.monotonic() + _THAW_SECONDS
    while sandbox.frozen_at is not None and time.monotonic() < give_up_at:
        time.sleep(_LOOK_SECONDS)
        sandbox.refresh_from_db(fields=["frozen_at"])
    client = guest_client(sandbox)
    try:
        # No secrets from here on, and no end of its own while it is read.
        client.configure(env={}, deadline_seconds=SAVE_SECONDS)
        _processes_end(client)
    except E2AError as error:
        log.info("snapshot.not_quiet", sandbox=sandbox.public_id, error=error.detail)


def _processes_end(client: GuestClient) -> None:
    running = [process.id for process in client.process_list() if process.state == "running"]
    for process_id in running:
        try:
            client.process_signal(process_id, "TERM")
        except GuestError:
            continue  # Ended by itself.
    give_up_at = time.monotonic() + _QUIET_SECONDS
    while running and time.monotonic() < give_up_at:
        time.sleep(_LOOK_SECONDS)
        running = [process.id for process in client.process_list() if process.state == "running"]
    for process in client.process_list():
        client.process_forget(process.id)


def _count(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 19 else None

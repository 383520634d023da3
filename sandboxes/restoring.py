"""How a worker puts files back: storage → checks → guest, before the sandbox is its tenant's to use.

Nothing half: a sandbox whose files could not be put back whole ends, and is never saved over what it came from.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Iterable, Iterator

import structlog
from backports import zstd
from django.db import transaction
from django.db.models import Q

from e2a.core.clock import now, seconds
from e2a.core.enqueue import enqueue
from e2a.core.errors import DeadlineExceeded, GuestError, GuestUnreachable, OurError
from sandboxes.configuration import guest_client
from sandboxes.lifecycle import sandbox_end
from sandboxes.models import DeathReason, Restore, Sandbox, SandboxState
from sandboxes.saving import LEASE_SECONDS, RENEW_SECONDS, SAVE_SECONDS, SaveSuperseded, purpose_of
from sandboxes.snapshot_models import Snapshot
from sandboxes.storage import Storage, StorageError, storage
from secrets_vault import services as vault
from secrets_vault.crypto import SecretCorrupt

log = structlog.get_logger(__name__)

TRIES = 3
_PAUSE_SECONDS = 1.0


class SnapshotDamaged(OurError):
    """What the storage holds is not what was saved."""

    code = "snapshot_damaged"
    title = "The snapshot is damaged"


def sandbox_restore(sandbox_pk: int, *, store: Storage | None = None) -> bool:
    """Put its snapshot's files into a `booting` sandbox. Whether it may be configured now.

    Does nothing for one that another worker is at. What cannot be done ends the sandbox, with a reason.
    """
    sandbox = _lease(sandbox_pk)
    if sandbox is None:
        return False
    try:
        if sandbox.snapshot is None:
            raise SnapshotDamaged("it was deleted")
        _tried(sandbox, sandbox.snapshot, store or storage())
    except SaveSuperseded as error:
        log.info("restore.superseded", sandbox=sandbox.public_id, why=error.detail)
        return False
    except (GuestUnreachable, DeadlineExceeded) as error:
        _end(sandbox, DeathReason.LOST, "It did not answer while its files were put back.", error.detail)
        return False
    except GuestError as error:
        detail = f"Its files could not be put back: {error.detail}."
        _end(sandbox, DeathReason.IMAGE_ERROR, detail, f"{error.code}: {error.detail}")
        return False
    except (SnapshotDamaged, SecretCorrupt) as error:
        _end(sandbox, DeathReason.IMAGE_ERROR, "The snapshot that it starts from is damaged.", error.detail)
        return False
    except StorageError as error:
        detail = "The snapshot that it starts from could not be read from the storage."
        _end(sandbox, DeathReason.IMAGE_ERROR, detail, error.detail)
        return False
    rows = Sandbox.objects.filter(
        pk=sandbox.pk, state=SandboxState.BOOTING, lease_holder=sandbox.lease_holder
    )
    with transaction.atomic():
        if not rows.update(restore=Restore.DONE, lease_until=None, lease_holder=""):
            return False
    log.info("restore.done", sandbox=sandbox.public_id)
    return True


def _lease(sandbox_pk: int) -> Sandbox | None:
    sandbox = (
        Sandbox.objects.select_related("node", "tenant", "snapshot")
        .filter(pk=sandbox_pk, state=SandboxState.BOOTING, restore=Restore.WANTED, tenant__isnull=False)
        .first()
    )
    if sandbox is None:
        return None
    holder = f"{os.getpid()}-{secrets.token_hex(6)}"
    free = Q(lease_until__isnull=True) | Q(lease_until__lt=now())
    rows = Sandbox.objects.filter(free, pk=sandbox.pk, state=SandboxState.BOOTING, restore=Restore.WANTED)
    if not rows.update(lease_holder=holder, lease_until=now() + seconds(LEASE_SECONDS)):
        return None
    sandbox.lease_holder = holder
    return sandbox


def _tried(sandbox: Sandbox, snapshot: Snapshot, store: Storage) -> None:
    """A store or gateway that fails may be back in a moment; each try begins with an empty workspace."""
    for left in reversed(range(TRIES)):
        try:
            _restore(sandbox, snapshot, store)
            return
        except (StorageError, GuestUnreachable) as error:
            if not left:
                raise
            log.warning("restore.again", sandbox=sandbox.public_id, error=error.detail)
            time.sleep(_PAUSE_SECONDS)


def _restore(sandbox: Sandbox, snapshot: Snapshot, store: Storage) -> None:
    assert sandbox.tenant is not None, "it was asked for rows with an owner"
    checked = _Checked(snapshot)
    pieces = vault.stream_unseal(
        tenant=sandbox.tenant,
        purpose=purpose_of(snapshot),
        sealed_key=bytes(snapshot.sealed_key),
        pieces=checked.of(store.read(snapshot.storage_key)),
    )
    guest_client(sandbox).snapshot_write(_kept(sandbox, _unpacked(pieces)), deadline_seconds=SAVE_SECONDS)
    checked.is_whole()


class _Checked:
    """Counts and digests what is read, to be compared with what was written."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._digest = hashlib.sha256()
        self._size = 0

    def of(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            self._digest.update(piece)
            self._size += len(piece)
            yield piece

    def is_whole(self) -> None:
        """Raises SnapshotDamaged."""
        if (self._size, self._digest.hexdigest()) != (self._snapshot.size_bytes, self._snapshot.sha256):
            raise SnapshotDamaged(f"{self._size} bytes with another digest than what was saved")


def _unpacked(pieces: Iterable[bytes]) -> Iterator[bytes]:
    unpacker = zstd.ZstdDecompressor()
    try:
        for piece in pieces:
            data = piece
            # Bounded: a piece of zeros is a thousand times as long.
            while not unpacker.eof and (out := unpacker.decompress(data, max_length=1 << 18)):
                yield out
                data = b""
    except zstd.ZstdError as error:
        raise SnapshotDamaged("it does not unpack") from error
    if not unpacker.eof:
        raise SnapshotDamaged("it ends too early")


def _kept(sandbox: Sandbox, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes; the lease is renewed as they go."""
    rows = Sandbox.objects.filter(
        pk=sandbox.pk, state=SandboxState.BOOTING, lease_holder=sandbox.lease_holder
    )
    renewed_at = time.monotonic()
    for piece in pieces:
        moment = time.monotonic()
        if moment - renewed_at > RENEW_SECONDS:
            if not rows.update(lease_until=now() + seconds(LEASE_SECONDS)):
                raise SaveSuperseded("it was destroyed, or another worker has it")
            renewed_at = moment
        yield piece


def _end(sandbox: Sandbox, reason: DeathReason, detail: str, why: str) -> None:
    sandbox_end(
        sandbox,
        reason=reason,
        detail=detail,
        why=f"restore: {why}",
        only_if=Q(state=SandboxState.BOOTING, restore=Restore.WANTED),
    )


def restore_begin(sandbox: Sandbox) -> None:
    """Hand a claimed sandbox to the workers, which put its files back and then configure it."""
    with transaction.atomic():
        Sandbox.objects.filter(pk=sandbox.pk, state=SandboxState.BOOTING).update(
            lease_until=None, lease_holder=""
        )
        enqueue("sandboxes.tasks.sandbox_restore", sandbox_id=sandbox.pk)

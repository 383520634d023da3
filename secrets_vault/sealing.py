"""A tenant's data key, and sealed blobs: what other apps keep encrypted without knowing how."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog
from django.conf import settings

from accounts.audit import audit_write
from accounts.models import Tenant
from e2a.core.keyring import KeyRing
from e2a.core.rows import only
from secrets_vault import crypto
from secrets_vault.crypto import SecretCorrupt
from secrets_vault.models import DataKey

log = structlog.get_logger(__name__)


def _ring() -> KeyRing:
    ring: KeyRing = settings.E2A.vault_keys
    return ring


def data_key_ensure(tenant: Tenant) -> DataKey:
    """The tenant's data key row, made and wrapped by the ring's newest key when there is none. Safe to
    race.
    """
    row = DataKey.objects.filter(tenant=tenant).first()
    if row is not None:
        return row
    key = _ring().newest
    wrapped = crypto.data_key_wrap(crypto.data_key_make(), key=key, tenant_id=tenant.public_id)
    made = {"wrapping_key_id": key.id, "wrapped": wrapped}
    row, _ = DataKey.objects.get_or_create(tenant=tenant, defaults=made)
    return row


def data_key_open(tenant: Tenant) -> bytes:
    """The tenant's data key in clear; one query. Raises `SecretCorrupt` when it was shredded or changed."""
    row = only(DataKey.objects.filter(tenant=tenant))
    if row is None:
        raise SecretCorrupt("the tenant has no data key (shredded?)")
    return data_key_unwrap(row, tenant)


def data_key_unwrap(row: DataKey, tenant: Tenant) -> bytes:
    return crypto.data_key_unwrap(
        bytes(row.wrapped), ring=_ring(), key_id=row.wrapping_key_id, tenant_id=tenant.public_id
    )


@contextmanager
def corruption_recorded(*, tenant: Tenant | None, target: str, purpose: str) -> Iterator[None]:
    """Write an audit event and a log line for a `SecretCorrupt` that passes, by names only.

    Goes around a transaction, never inside one: the event must outlive the rollback.
    """
    try:
        yield
    except SecretCorrupt as error:
        facts: dict[str, Any] = {"purpose": purpose, "names": list(error.names), "why": error.detail}
        log.error("vault.secret_corrupt", target=target, **facts)
        audit_write(
            "secret_corrupt", tenant_id=tenant.pk if tenant is not None else None, target=target[:64], **facts
        )
        raise


def seal(*, tenant: Tenant, purpose: str, data: bytes) -> bytes:
    """Encrypt bytes for one tenant and purpose; `unseal` with the same two opens them. Some 40 bytes
    longer.
    """
    data_key = data_key_unwrap(data_key_ensure(tenant), tenant)
    return crypto.blob_encrypt(data, data_key=data_key, tenant_id=tenant.public_id, purpose=purpose)


def unseal(*, tenant: Tenant, purpose: str, data: bytes | memoryview) -> bytes:
    """Raises `SecretCorrupt` (audited) for another tenant or purpose, changed bytes, or a shredded tenant."""
    with corruption_recorded(tenant=tenant, target=tenant.public_id, purpose=purpose):
        return crypto.blob_decrypt(
            bytes(data), data_key=data_key_open(tenant), tenant_id=tenant.public_id, purpose=purpose
        )


class PassphraseSealer:
    """`e2a.core.idempotency.Sealer`: answers under the caller's Idempotency-Key and the vault's ring, both
    needed.
    """

    def seal(self, passphrase: str, data: bytes) -> bytes:
        return crypto.passphrase_encrypt(data, passphrase=passphrase, ring=_ring())

    def unseal(self, passphrase: str, sealed: bytes) -> bytes:
        """Raises `SecretCorrupt` (audited) for another passphrase or changed bytes."""
        with corruption_recorded(tenant=None, target="idempotency", purpose="idempotency"):
            return crypto.passphrase_decrypt(sealed, passphrase=passphrase, ring=_ring())

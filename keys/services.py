"""Making, ending and replacing API keys."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection
from dataclasses import dataclass

from django.conf import settings
from django.db import transaction
from django.db.models import Q

from accounts.audit import Caller, audit_write
from accounts.models import User
from e2a.core import rate_limits
from e2a.core.clock import now, rfc3339, seconds
from e2a.core.enqueue import enqueue
from e2a.core.errors import Conflict, QuotaExceeded, ValidationFailed
from e2a.core.keyring import Key
from keys import formats
from keys.models import ApiKey
from keys.selectors import live

SCOPES = (
    "sessions:read",
    "sessions:write",
    "sandboxes:read",
    "sandboxes:write",
    "secrets:read",
    "secrets:write",
    "usage:read",
)
MAX_LIVE_KEYS = 20
MAX_KEYS_WITH_GRACE = 40
"""Live keys of one user counting those in their grace time: a full set may be rotated once, not endlessly."""
MAX_GRACE_SECONDS = 24 * 3600


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """A key's row, and the key itself: the only time it is seen."""

    row: ApiKey
    key: str

    def __repr__(self) -> str:
        return f"IssuedKey({self.row.public_id})"


def key_issue(
    *,
    user: User,
    name: str = "",
    scopes: Collection[str] | None = None,
    expires_at: dt.datetime | None = None,
    caller: Caller | None = None,
) -> IssuedKey:
    """Make a key for that user; `scopes` default to all.

    Raises `QuotaExceeded` at 20 live keys a user, `RateLimited` at 10 an hour (production),
    `ValidationFailed` for an end that is past or a scope that does not exist.
    """
    if expires_at is not None and expires_at <= now():
        raise ValidationFailed.of("expires_at", "in_the_past", "expires_at must lie ahead.")
    if unknown := set(scopes or ()) - set(SCOPES):
        raise ValidationFailed.of("scopes", "invalid_choice", f"There is no scope {min(unknown)}.")
    if settings.E2A.production:
        rate_limits.hit("key-create", user.public_id, limit=10, window_seconds=3600)
    with transaction.atomic():
        _lock(user)
        if ApiKey.objects.filter(live(now()), user=user, revoked_at=None).count() >= MAX_LIVE_KEYS:
            raise QuotaExceeded(f"There are {MAX_LIVE_KEYS} live API keys already; revoke one first.")
        issued = _make(user, name=name, scopes=scopes, expires_at=expires_at)
        _audit("key.created", issued.row, user, caller, scopes=issued.row.scopes)
    return issued


def key_revoke(*, key: ApiKey, actor: User, caller: Caller | None = None) -> None:
    """End a key at once, for the sockets of its sessions too. A second time changes nothing."""
    moment = now()
    with transaction.atomic():
        still = ApiKey.objects.filter(Q(revoked_at=None) | Q(revoked_at__gt=moment), pk=key.pk)
        if not still.update(revoked_at=moment, end_told_at=moment):
            return
        _audit("key.revoked", key, actor, caller)
        enqueue("sessions_app.tasks.key_revoked", key_id=key.pk)


def key_rotate(
    *, key: ApiKey, actor: User, grace_seconds: int = 0, caller: Caller | None = None
) -> IssuedKey:
    """A new key like `key`, which itself works for `grace_seconds` more (0 to 86400).

    Raises `Conflict` for a key that has ended or was rotated before, `QuotaExceeded` when too many are in
    grace.
    """
    if not 0 <= grace_seconds <= MAX_GRACE_SECONDS:
        raise ValidationFailed.of(
            "grace_seconds", "out_of_range", f"grace_seconds is 0 to {MAX_GRACE_SECONDS}."
        )
    moment = now()
    owner = key.user
    with transaction.atomic():
        _lock(owner)
        ends = moment + seconds(grace_seconds)
        told = moment if grace_seconds == 0 else None
        if grace_seconds and ApiKey.objects.filter(live(moment), user=owner).count() >= MAX_KEYS_WITH_GRACE:
            raise QuotaExceeded("Too many rotated keys are in their grace time; use grace_seconds 0.")
        usable = ApiKey.objects.filter(live(moment), pk=key.pk, revoked_at=None)
        if not usable.update(revoked_at=ends, end_told_at=told):
            raise Conflict("This key has ended or was rotated already.", code="key_not_live")
        issued = _make(owner, name=key.name, scopes=key.scopes, expires_at=key.expires_at)
        _audit("key.rotated", key, actor, caller, to=issued.row.public_id, ends=rfc3339(ends))
        if told is not None:
            enqueue("sessions_app.tasks.key_revoked", key_id=key.pk)
    return issued


def ended_keys_tell() -> int:
    """Tell the sessions of keys whose grace time or expiry has passed; how many keys. May run doubled."""
    moment = now()
    ended = ApiKey.objects.filter(Q(revoked_at__lte=moment) | Q(expires_at__lte=moment), end_told_at=None)
    told = 0
    for pk in ended.values_list("pk", flat=True)[:500]:
        with transaction.atomic():
            if ApiKey.objects.filter(pk=pk, end_told_at=None).update(end_told_at=moment):
                enqueue("sessions_app.tasks.key_revoked", key_id=pk)
                told += 1
    return told


def key_used(*, key: ApiKey, raw: str, address: str) -> None:
    """Note a use, at most once in 60 s over all processes, and move the digest to the newest pepper."""
    moment = now()
    if key.last_used_at is None or moment - key.last_used_at >= seconds(60):
        stale = Q(last_used_at=None) | Q(last_used_at__lte=moment - seconds(60))
        ApiKey.objects.filter(stale, pk=key.pk).update(last_used_at=moment, last_used_address=address[:45])
    newest: Key = settings.E2A.signing_keys.newest
    if key.pepper_id != newest.id:
        ApiKey.objects.filter(pk=key.pk, pepper_id=key.pepper_id).update(
            digest=formats.digest_of(raw, newest), pepper_id=newest.id
        )


def _lock(user: User) -> None:
    """Let one transaction at a time make keys for that user (SQLite: BEGIN IMMEDIATE does it for all)."""
    User.objects.select_for_update().get(pk=user.pk)


def _make(
    user: User, *, name: str, scopes: Collection[str] | None, expires_at: dt.datetime | None
) -> IssuedKey:
    raw = formats.key_make()
    pepper: Key = settings.E2A.signing_keys.newest
    row = ApiKey.objects.create(
        tenant_id=user.tenant_id,
        user=user,
        name=name,
        lookup=formats.lookup_of(raw),
        prefix=raw[: formats.PREFIX_CHARS],
        last_four=raw[-4:],
        digest=formats.digest_of(raw, pepper),
        pepper_id=pepper.id,
        scopes=[scope for scope in SCOPES if scopes is None or scope in scopes],
        created_at=now(),
        expires_at=expires_at,
    )
    return IssuedKey(row, raw)


def _audit(action: str, key: ApiKey, actor: User, caller: Caller | None, **detail: object) -> None:
    audit_write(
        action, actor=actor.public_id, tenant_id=key.tenant_id, target=key.public_id, caller=caller, **detail
    )

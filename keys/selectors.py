"""Reading API keys. Every look-up but the authenticating one begins with the tenant."""

from __future__ import annotations

import datetime as dt

from django.db.models import Q, QuerySet

from accounts.models import Tenant
from e2a.core.clock import now
from e2a.core.errors import NotFound
from e2a.core.ids import PATTERN
from keys.models import ApiKey

ENDED_SHOWN = 100
"""Of revoked and expired keys, a list shows so many of the newest."""


def live(moment: dt.datetime) -> Q:
    """The condition that a key works at `moment`."""
    return (Q(revoked_at=None) | Q(revoked_at__gt=moment)) & (Q(expires_at=None) | Q(expires_at__gt=moment))


def keys_of(tenant: Tenant) -> list[ApiKey]:
    """All live keys of the tenant, and its newest ended ones; newest first. Two queries."""
    moment = now()
    rows: QuerySet[ApiKey] = ApiKey.objects.filter(tenant=tenant).select_related("tenant").order_by("-pk")
    found = [*rows.filter(live(moment)), *rows.exclude(live(moment))[:ENDED_SHOWN]]
    return sorted(found, key=lambda key: -key.pk)


def key_get(tenant: Tenant, key_id: str) -> ApiKey:
    """The tenant's key of that public id, ended ones too. Raises `NotFound`, for a stranger's key as well."""
    if not PATTERN.match(key_id):  # What cannot be an id, such as a NUL, never reaches the database.
        raise NotFound("There is no such API key.")
    key = ApiKey.objects.select_related("tenant", "user").filter(tenant=tenant, public_id=key_id).first()
    if key is None:
        raise NotFound("There is no such API key.")
    return key

"""Bundles as their tenant may see them: metadata only, never a value."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

from django.db.models import Count, Q, QuerySet

from accounts.models import Tenant
from e2a.core.errors import NotFound
from secrets_vault.models import Bundle, BundleUse, BundleVersion, SecretValue
from secrets_vault.rules import LLM_NAMES, is_bundle_name

SESSION_PREFIX = "ses_"


@dataclass(frozen=True, slots=True)
class BundleState:
    """One bundle at one version. `keys` are the names, sorted; `sessions` counts the live ones that use
    it.
    """

    name: str
    version: int
    keys: tuple[str, ...]
    created_at: dt.datetime
    updated_at: dt.datetime
    sessions: int = 0


@dataclass(frozen=True, slots=True)
class VersionState:
    version: int
    keys: tuple[str, ...]
    created_at: dt.datetime
    created_by: str


def secret_not_found(name: str) -> NotFound:
    shown = f" {name!r}" if is_bundle_name(name) else " of that name"
    return NotFound(f"There is no secret bundle{shown}.", code="secret_not_found")


def bundles_of(tenant: Tenant) -> QuerySet[Bundle]:
    """The tenant's named bundles; those made for one sandbox are not among them."""
    return Bundle.objects.filter(tenant=tenant, is_inline=False)


def bundle_get(tenant: Tenant, name: str) -> Bundle:
    """Raises `NotFound` `secret_not_found`; a malformed name never reaches the database."""
    bundle = bundles_of(tenant).filter(name=name).first() if is_bundle_name(name) else None
    if bundle is None:
        raise secret_not_found(name)
    return bundle


def bundle_states(bundles: list[Bundle]) -> list[BundleState]:
    """What may be shown of each, in the same order; two queries."""
    if not bundles:
        return []
    ids = [bundle.pk for bundle in bundles]
    shown = Q()
    for bundle in bundles:  # By pairs: the rows' own version may have moved on since they were read.
        shown |= Q(bundle_version__bundle=bundle.pk, bundle_version__version=bundle.version)
    keys: dict[int, list[str]] = {}
    for pk, name in SecretValue.objects.filter(shown).values_list("bundle_version__bundle", "name"):
        keys.setdefault(pk, []).append(name)
    counted = BundleUse.objects.filter(bundle__in=ids, holder__startswith=SESSION_PREFIX)
    sessions = dict(counted.values_list("bundle").annotate(n=Count("pk")).order_by())
    return [
        BundleState(
            name=bundle.name,
            version=bundle.version,
            keys=tuple(sorted(keys.get(bundle.pk, ()))),
            created_at=bundle.created_at,
            updated_at=bundle.updated_at,
            sessions=sessions.get(bundle.pk, 0),
        )
        for bundle in bundles
    ]


def bundle_state(bundle: Bundle) -> BundleState:
    return bundle_states([bundle])[0]


@dataclass(frozen=True, slots=True)
class ValueState:
    """One value of a bundle's current version, without the value: its name and where it goes."""

    name: str
    hosts: tuple[str, ...]
    """Where the egress gateway adds it; empty when it is not injected."""

    @property
    def is_for_model(self) -> bool:
        """It stays outside, with the agent's model."""
        return self.name in LLM_NAMES


def value_states(bundle: Bundle) -> list[ValueState]:
    rows = SecretValue.objects.filter(
        bundle_version__bundle=bundle, bundle_version__version=bundle.version
    ).order_by("name")
    return [
        ValueState(name, tuple((inject or {}).get("hosts", ())))
        for name, inject in rows.values_list("name", "inject")
    ]


def versions_of(bundle: Bundle) -> QuerySet[BundleVersion]:
    return BundleVersion.objects.filter(bundle=bundle)


def version_states(versions: list[BundleVersion]) -> list[VersionState]:
    """What may be shown of each version; one query."""
    keys: dict[int, list[str]] = {}
    rows = SecretValue.objects.filter(bundle_version__in=versions)
    for pk, name in rows.values_list("bundle_version", "name"):
        keys.setdefault(pk, []).append(name)
    return [
        VersionState(row.version, tuple(sorted(keys.get(row.pk, ()))), row.created_at, row.created_by)
        for row in versions
    ]


def holders_of(bundle: Bundle) -> list[str]:
    """Public ids of the sessions and sandboxes that use it now, oldest first."""
    return list(BundleUse.objects.filter(bundle=bundle).order_by("pk").values_list("holder", flat=True))

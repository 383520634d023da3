"""Everything that changes a bundle, and who holds one. The whole vault's interface for other apps is here.

Each write is one short transaction that first takes a row lock by an UPDATE, which is a lock on PostgreSQL
and on SQLite alike: the tenant's data key row for a new bundle, the bundle's own row for a new version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import Count, F, Sum
from django.db.models.functions import Length

from accounts.audit import Caller, audit_write
from accounts.models import Tenant
from e2a.core.clock import now
from e2a.core.enqueue import enqueue
from e2a.core.errors import Conflict, NotFound, ValidationFailed
from secrets_vault import crypto, rules
from secrets_vault.crypto import SecretCorrupt, SecretText
from secrets_vault.models import Bundle, BundleUse, BundleVersion, DataKey, SecretValue
from secrets_vault.reading import (
    LLMSecret,
    ReadValue,
    holder_environment,
    holder_environment_names,
    holder_fingerprint,
    holder_llm,
    key_origin_class,
    origin_of,
    values_read,
)
from secrets_vault.rules import NewValue, is_reserved_name
from secrets_vault.sealing import (
    corruption_recorded,
    data_key_ensure,
    data_key_unwrap,
    seal,
    stream_key_seal,
    stream_seal,
    stream_unseal,
    unseal,
)
from secrets_vault.selectors import (
    SESSION_PREFIX,
    BundleState,
    bundle_get,
    bundle_state,
    bundles_of,
    holders_of,
    secret_not_found,
)

__all__ = [
    "BundleChange",
    "LLMSecret",
    "ReadValue",
    "SecretCorrupt",
    "SecretText",
    "bundle_create",
    "bundle_delete",
    "bundle_patch",
    "bundle_replace",
    "bundle_rollback",
    "bundles_attach",
    "bundles_release",
    "holder_environment",
    "holder_environment_names",
    "holder_fingerprint",
    "holder_llm",
    "inline_bundle_create",
    "is_reserved_name",
    "origin_of",
    "seal",
    "stream_key_seal",
    "stream_seal",
    "stream_unseal",
    "unseal",
    "values_read",
]


@dataclass(frozen=True, slots=True)
class BundleChange:
    """A bundle's new state, and how many live sessions will see it."""

    state: BundleState
    sessions_updated: int


def bundle_create(
    *, tenant: Tenant, name: str, values: Mapping[str, Any], actor: str = "", caller: Caller | None = None
) -> BundleState:
    """A new bundle at version 1. `values` as in the API; `actor` is the public id of who did it.

    Raises `ValidationFailed` (`rules.values_check`), `Conflict` `already_exists`, or `secrets_too_large` for
    the 51st.
    """
    rules.bundle_name_check(name)
    checked = _checked(values)
    with transaction.atomic():
        data_key_ensure(tenant)
        _tenant_lock(tenant)
        bundles = bundles_of(tenant)
        if bundles.filter(name=name).exists():
            raise Conflict(f"There is a bundle {name!r} already.", code="already_exists")
        if bundles.count() >= rules.MAX_BUNDLES:
            raise Conflict(f"A tenant has at most {rules.MAX_BUNDLES} bundles.", code="secrets_too_large")
        bundle = Bundle.objects.create(tenant=tenant, name=name)
        _version_write(bundle, checked, actor)
        _audit("secret_bundle.create", bundle, actor, caller, keys=sorted(checked))
        return bundle_state(bundle)


def bundle_replace(
    *, tenant: Tenant, name: str, values: Mapping[str, Any], actor: str = "", caller: Caller | None = None
) -> BundleChange:
    """All values anew, as the next version. Raises `NotFound`, `ValidationFailed`."""
    checked = _checked(values)
    with transaction.atomic():
        bundle = _next_version(tenant, name)
        return _changed(bundle, checked, actor, caller, "secret_bundle.replace")


def bundle_patch(
    *, tenant: Tenant, name: str, values: Mapping[str, Any], actor: str = "", caller: Caller | None = None
) -> BundleChange:
    """Set the given names, remove those that are `None`; the others go on, in the next version.

    A value that is given without `inject` keeps the rule it had. A stored model key does not follow
    `LLM_BASE_URL` to another origin: that needs the key again, in the same call (400 `origin_mismatch`,
    SECURITY 4.9), since who may write values must not thereby learn them. Raises also `NotFound`,
    `ValidationFailed`, `SecretCorrupt`.
    """
    checked = rules.values_check(values, may_remove=True, allow_private=settings.E2A.llm_allow_private)
    # Around the transaction: the record of a corrupt value must outlive the rollback.
    with corruption_recorded(tenant=tenant, target=name, purpose="patch"), transaction.atomic():
        bundle = _next_version(tenant, name)
        current = _carried(bundle, bundle.version - 1, "patch")
        merged = {kept: value for kept, value in current.items() if kept not in checked}
        for changed, value in checked.items():
            if value is not None:
                merged[changed] = _with_kept_inject(changed, value, current.get(changed))
        _key_stays_home(current, merged, checked)
        if len(merged) > rules.MAX_NAMES:
            raise ValidationFailed.of(
                "values", "secrets_too_large", f"A bundle has at most {rules.MAX_NAMES} names."
            )
        return _changed(bundle, merged, actor, caller, "secret_bundle.patch")


def bundle_rollback(
    *, tenant: Tenant, name: str, version: int, actor: str = "", caller: Caller | None = None
) -> BundleChange:
    """The values of an earlier version, as the next one. Raises `NotFound` `secret_not_found`,
    `version_not_found`.
    """
    with corruption_recorded(tenant=tenant, target=name, purpose="rollback"), transaction.atomic():
        bundle = _next_version(tenant, name)
        if not BundleVersion.objects.filter(bundle=bundle, version=version).exists():
            raise NotFound(f"{name!r} has no version {version} any more.", code="version_not_found")
        values = _carried(bundle, version, "rollback")
        return _changed(bundle, values, actor, caller, "secret_bundle.rollback")


def bundle_delete(
    *, tenant: Tenant, name: str, force: bool = False, actor: str = "", caller: Caller | None = None
) -> None:
    """The bundle with its history. Raises `NotFound`; `Conflict` `in_use` while it is held, unless `force`.

    After a forced one its holders simply have no such values any more, from their next look.
    """
    with transaction.atomic():
        found = bundle_get(tenant, name)
        bundle = bundles_of(tenant).select_for_update().filter(pk=found.pk).first()
        if bundle is None:
            raise secret_not_found(name)
        holders = holders_of(bundle)
        if holders and not force:
            shown = ", ".join(holders[:10]) + (", …" if len(holders) > 10 else "")
            raise Conflict(f"It is in use by {shown}. Delete it anyway with ?force=true.", code="in_use")
        _audit("secret_bundle.delete", bundle, actor, caller, holders=holders[:50])
        bundle.delete()


def bundles_attach(*, tenant: Tenant, names: Sequence[str], holder: str) -> list[Bundle]:
    """Make a session or sandbox (by public id) a holder of these bundles, in this order; call it with its own
    insert in one short transaction.

    Raises `NotFound` `secret_not_found`, `ValidationFailed` `secret_collision` or `secrets_too_large`.
    """
    wanted = list(dict.fromkeys(names))
    if len(wanted) > rules.MAX_BUNDLES_A_HOLDER:
        raise ValidationFailed.of(
            "secrets",
            "secrets_too_large",
            f"At most {rules.MAX_BUNDLES_A_HOLDER} bundles can be used at once.",
        )
    with transaction.atomic():
        for name in wanted:
            if not rules.is_bundle_name(name):
                raise secret_not_found(name)
        # Locked against deletion until the use is committed; in one order, so that two callers never wait in
        # a ring.
        rows = bundles_of(tenant).filter(name__in=wanted).order_by("pk").select_for_update(no_key=True)
        by_name = {bundle.name: bundle for bundle in rows}
        for name in wanted:
            if name not in by_name:
                raise secret_not_found(name)
        bundles = [by_name[name] for name in wanted]
        held = set(BundleUse.objects.filter(holder=holder).values_list("bundle_id", flat=True))
        BundleUse.objects.bulk_create(
            BundleUse(bundle=bundle, holder=holder, position=len(held) + index)
            for index, bundle in enumerate(bundles)
            if bundle.pk not in held
        )
        _environment_check(holder)
        return bundles


def inline_bundle_create(*, tenant: Tenant, holder: str, values: Mapping[str, Any]) -> Bundle:
    """A bundle for one holder, made from its request (such as `llm_key`); not listed, gone with the holder.

    The same rules and errors as `bundle_create`; it does not count against the tenant's 50.
    """
    checked = _checked(values)
    with transaction.atomic():
        data_key_ensure(tenant)
        bundle = Bundle.objects.create(tenant=tenant, name=f"~{holder}", is_inline=True)
        _version_write(bundle, checked, holder)
        held = BundleUse.objects.filter(holder=holder).count()
        BundleUse.objects.create(bundle=bundle, holder=holder, position=held)
        _environment_check(holder)
        return bundle


def bundles_release(*, holder: str) -> None:
    """The holder has ended: it holds nothing any more. Safe to repeat."""
    with transaction.atomic():
        Bundle.objects.filter(is_inline=True, uses__holder=holder).delete()
        BundleUse.objects.filter(holder=holder).delete()


def tenant_shred(*, tenant: Tenant) -> None:
    """Delete the tenant's data key, so that nothing of it opens any more, then its bundles. Safe to repeat.

    A backup of the database from before still has the key's row, wrapped by the ring of that time.
    """
    with transaction.atomic():
        keys, _ = DataKey.objects.filter(tenant=tenant).delete()
        bundles, _ = Bundle.objects.filter(tenant=tenant).delete()
        if keys or bundles:
            audit_write("vault.shredded", tenant_id=tenant.pk, target=tenant.public_id)


# ---- Inside a write -------------------------------------------------------------------------------------


def _checked(values: Mapping[str, Any]) -> dict[str, NewValue]:
    checked = rules.values_check(values, allow_private=settings.E2A.llm_allow_private)
    return {name: value for name, value in checked.items() if value is not None}


def _tenant_lock(tenant: Tenant) -> None:
    """Until the end of the transaction nobody else adds a bundle to the tenant."""
    DataKey.objects.filter(tenant=tenant).update(wrapping_key_id=F("wrapping_key_id"))


def _next_version(tenant: Tenant, name: str) -> Bundle:
    """The bundle, locked, already at its next version. Raises `NotFound`."""
    bundles = bundles_of(tenant).filter(name=name)
    if not rules.is_bundle_name(name) or not bundles.update(version=F("version") + 1, updated_at=now()):
        raise secret_not_found(name)
    return bundles.select_related("tenant").get()


def _version_write(bundle: Bundle, values: Mapping[str, NewValue], actor: str) -> None:
    """Encrypt and insert the values of the bundle's current version, and forget the versions past the
    tenth.
    """
    tenant = bundle.tenant
    data_key = data_key_unwrap(data_key_ensure(tenant), tenant)
    row = BundleVersion.objects.create(bundle=bundle, version=bundle.version, created_by=actor)
    SecretValue.objects.bulk_create(
        SecretValue(
            bundle_version=row,
            name=name,
            ciphertext=crypto.value_encrypt(
                value.text,
                data_key=data_key,
                tenant_id=tenant.public_id,
                bundle_id=bundle.public_id,
                name=name,
                version=bundle.version,
            ),
            size=value.size,
            inject=value.inject,
        )
        for name, value in values.items()
    )
    BundleVersion.objects.filter(bundle=bundle, version__lte=bundle.version - rules.MAX_VERSIONS).delete()


def _changed(
    bundle: Bundle, values: Mapping[str, NewValue], actor: str, caller: Caller | None, action: str
) -> BundleChange:
    rules.environment_check(sum(rules.environment_bytes(name, value.size) for name, value in values.items()))
    _version_write(bundle, values, actor)
    holders = holders_of(bundle)
    if holders:
        _environments_check(BundleUse.objects.filter(bundle=bundle), "values")
        enqueue("sessions_app.tasks.bundle_changed", bundle_id=bundle.pk)
    _audit(action, bundle, actor, caller, keys=sorted(values))
    return BundleChange(bundle_state(bundle), sum(holder.startswith(SESSION_PREFIX) for holder in holders))


def _carried(bundle: Bundle, version: int, purpose: str) -> dict[str, NewValue]:
    """The values of one version as new ones: their ciphertext is bound to the version, so they are encrypted
    anew.
    """
    values = values_read(bundles=[bundle], version=version, purpose=purpose)
    return {name: NewValue(value.text, value.inject) for name, value in values.items()}


def _with_kept_inject(name: str, value: NewValue, before: NewValue | None) -> NewValue:
    if not value.keeps_inject or before is None or before.inject is None:
        return value
    rules.header_value_check(f"values.{name}", value.text.reveal())
    return NewValue(value.text, before.inject)


def _key_stays_home(
    current: Mapping[str, NewValue], merged: Mapping[str, NewValue], given: Mapping[str, NewValue | None]
) -> None:
    if rules.LLM_API_KEY in given or rules.LLM_API_KEY not in current:
        return
    before, after = (
        key_origin_class(values[rules.LLM_BASE_URL].text.reveal() if rules.LLM_BASE_URL in values else None)
        for values in (current, merged)
    )
    if before != after:
        raise ValidationFailed.of(
            f"values.{rules.LLM_BASE_URL}",
            "origin_mismatch",
            "The stored LLM_API_KEY belongs to another origin: give the key again in the same request.",
        )


def _environment_check(holder: str) -> None:
    """As `_environments_check`, for one holder: one plain query."""
    rows = SecretValue.objects.filter(
        bundle_version__version=F("bundle_version__bundle__version"),
        bundle_version__bundle__uses__holder=holder,
    )
    sizes: dict[str, int] = {}
    for name, size in rows.order_by("name").values_list("name", "size"):
        if name in sizes:
            raise _collision(name, "secrets")
        sizes[name] = rules.environment_bytes(name, size)
    rules.environment_check(
        sum(sizes.values()), whose="The values of one session or sandbox", field="secrets"
    )


def _collision(name: str, field: str) -> ValidationFailed:
    return ValidationFailed.of(
        field, "secret_collision", f"{name} would come from two bundles of one session or sandbox."
    )


def _environments_check(uses: Any, field: str) -> None:
    """Every holder among `uses`: no name comes from two of its bundles, and all its values fit one
    environment.

    Raises `ValidationFailed` `secret_collision` or `secrets_too_large`. Two queries, whatever the number of
    holders.
    """
    values = SecretValue.objects.filter(
        bundle_version__version=F("bundle_version__bundle__version"),
        bundle_version__bundle__uses__holder__in=uses.values("holder"),
    ).values("bundle_version__bundle__uses__holder")
    by_name = values.values("bundle_version__bundle__uses__holder", "name")
    double = by_name.annotate(n=Count("pk")).filter(n__gt=1)
    if (found := double.order_by("name").first()) is not None:
        raise _collision(found["name"], field)
    biggest = values.annotate(total=Sum(F("size") + Length("name") + 2)).order_by("-total").first()
    total = biggest["total"] if biggest else 0
    rules.environment_check(total, whose="The values of one session or sandbox", field=field)


def _audit(action: str, bundle: Bundle, actor: str, caller: Caller | None, **detail: Any) -> None:
    """By names only."""
    audit_write(
        action,
        actor=actor,
        tenant_id=bundle.tenant_id,
        target=bundle.public_id,
        caller=caller,
        name=bundle.name,
        version=bundle.version,
        **detail,
    )

"""The way out: plaintext leaves the vault through `values_read` only, and every reading leaves a line by
names.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import structlog
from django.conf import settings
from django.db.models import F, QuerySet, Value

from e2a.core.outbound import trusted_url
from e2a.core.prepared import Prepared
from secrets_vault import crypto
from secrets_vault.crypto import SecretCorrupt, SecretText
from secrets_vault.models import Bundle, SecretValue
from secrets_vault.rules import LLM_API_KEY, LLM_BASE_URL, LLM_MODEL, LLM_NAMES, SETTINGS
from secrets_vault.sealing import corruption_recorded, data_key_open

log = structlog.get_logger("e2a.audit")

VENDOR_OWN: Final = "vendor"


@dataclass(frozen=True, slots=True)
class ReadValue:
    """One opened value: where it is from, and how it may be used."""

    name: str
    text: SecretText
    inject: dict[str, Any] | None
    """Not null: it is added by the egress gateway to requests for these hosts, and never enters a sandbox."""
    bundle: str
    version: int

    @property
    def is_setting(self) -> bool:
        """A setting (`LLM_BASE_URL`, `LLM_MODEL`): not a secret, not to be redacted."""
        return self.name in SETTINGS

    @property
    def enters_sandbox(self) -> bool:
        return self.inject is None and self.name not in LLM_NAMES


@dataclass(frozen=True, slots=True)
class LLMSecret:
    """A holder's model key, and what its bundles say besides. `base_url` and `model` may come from another
    bundle.
    """

    api_key: SecretText
    base_url: str | None
    model: str | None
    key_base_url: str | None
    """`LLM_BASE_URL` of the key's own bundle: the key belongs to its origin. `None`: to the vendor's own."""
    fingerprint: str

    @property
    def key_origin(self) -> str | None:
        """The origin that the key belongs to; `None` stands for the vendor's own. Sending the key to another
        one needs `secrets:write` (400 `origin_mismatch`).
        """
        return None if self.key_base_url is None else origin_of(self.key_base_url)


def values_read(
    *,
    purpose: str,
    holder: str = "",
    bundles: Sequence[Bundle] | None = None,
    names: Collection[str] | None = None,
    version: int | None = None,
    environment_only: bool = False,
) -> dict[str, ReadValue]:
    """The values of a holder's bundles, or of these bundles (of one tenant), in clear, by name; the earlier
    bundle wins.

    The one audited function: logs who reads what for which purpose, by names. `names` opens only these,
    `environment_only` only what `enters_sandbox`; `version` is another than the current one. Costs two or
    three queries and a few microseconds a value; nothing is cached. The values of a bundle are of one version,
    never a mix. Raises `SecretCorrupt` (audited).
    """
    if bundles is None:
        bundles = _held(holder)
    if not bundles:
        return {}
    tenant = bundles[0].tenant
    wanted = F("bundle_version__bundle__version") if version is None else Value(version)
    # One statement for all rows: a replacement that happens meanwhile is seen whole or not at all.
    rows = SecretValue.objects.filter(
        bundle_version__bundle__in=[bundle.pk for bundle in bundles], bundle_version__version=wanted
    ).select_related("bundle_version__bundle")
    if names is not None:
        rows = rows.filter(name__in=names)
    if environment_only:
        rows = _entering_sandbox(rows)
    order = {bundle.pk: index for index, bundle in enumerate(bundles)}
    stored = sorted(rows, key=lambda row: (order[row.bundle_version.bundle_id], row.name))
    found: dict[str, ReadValue] = {}
    with corruption_recorded(tenant=tenant, target=holder or bundles[0].public_id, purpose=purpose):
        data_key = data_key_open(tenant) if stored else b""
        for row in stored:
            if row.name not in found:
                found[row.name] = _open(row, data_key=data_key, tenant_id=tenant.public_id)
    log.info(
        "vault.values_read",
        purpose=purpose,
        holder=holder,
        tenant=tenant.public_id,
        names=sorted(found),
        versions=_fingerprint(bundles),
    )
    return found


def _open(row: SecretValue, *, data_key: bytes, tenant_id: str) -> ReadValue:
    version, bundle = row.bundle_version.version, row.bundle_version.bundle
    try:
        text = crypto.value_decrypt(
            bytes(row.ciphertext),
            data_key=data_key,
            tenant_id=tenant_id,
            bundle_id=bundle.public_id,
            name=row.name,
            version=version,
        )
    except SecretCorrupt as error:
        where = f"{bundle.public_id} v{version} {row.name}"
        raise SecretCorrupt(f"{where}: {error.detail}", names=(row.name,)) from None
    return ReadValue(row.name, text, row.inject, bundle.name, version)


def _held(holder: str) -> list[Bundle]:
    """The holder's bundles in the order they were named."""
    rows = Bundle.objects.filter(uses__holder=holder).select_related("tenant")
    return list(rows.order_by("uses__position", "uses__pk"))


def _fingerprint(bundles: Sequence[Bundle]) -> str:
    return ",".join(f"{bundle.pk}:{bundle.version}" for bundle in bundles)


def holder_fingerprint(holder: str) -> str:
    """Which bundles a holder has, at which versions: `bundle_pk:version,…`. Changes whenever a value may
    have; one query.
    """
    return ",".join(f"{pk}:{version}" for pk, version in _VERSIONS.rows(holder))


_VERSIONS: Final = Prepared(
    lambda holder: (
        Bundle.objects.filter(uses__holder=holder)
        .order_by("uses__position", "uses__pk")
        .values_list("pk", "version")
    )
)


def holder_environment(holder: str) -> tuple[dict[str, SecretText], str]:
    """What the holder's commands get as environment variables, and the fingerprint that it belongs to.

    Without `LLM_*` and without values that are injected on the way out. The fingerprint is taken before the
    values: a replacement in between makes them newer than it says, so the next comparison configures once
    more.
    """
    bundles = _held(holder)
    values = values_read(purpose="environment", holder=holder, bundles=bundles, environment_only=True)
    return {name: value.text for name, value in values.items() if value.enters_sandbox}, _fingerprint(bundles)


def holder_environment_names(holder: str) -> frozenset[str]:
    """The names in `holder_environment`, without opening anything; one query."""
    rows = SecretValue.objects.filter(
        bundle_version__bundle__uses__holder=holder,
        bundle_version__version=F("bundle_version__bundle__version"),
    )
    return frozenset(_entering_sandbox(rows).values_list("name", flat=True))


def _entering_sandbox(rows: QuerySet[SecretValue]) -> QuerySet[SecretValue]:
    """`ReadValue.enters_sandbox` as a condition, so that the others are not even opened."""
    return rows.filter(inject__isnull=True).exclude(name__in=LLM_NAMES)


def holder_llm(holder: str) -> LLMSecret | None:
    """The holder's model key, base URL and model; `None` when none of its bundles has an `LLM_API_KEY`."""
    bundles = _held(holder)
    values = values_read(purpose="llm", holder=holder, bundles=bundles, names=LLM_NAMES)
    key, base_url, model = (values.get(name) for name in (LLM_API_KEY, LLM_BASE_URL, LLM_MODEL))
    if key is None:
        return None
    return LLMSecret(
        api_key=key.text,
        base_url=base_url.text.reveal() if base_url is not None else None,
        model=model.text.reveal() if model is not None else None,
        key_base_url=(
            base_url.text.reveal() if base_url is not None and base_url.bundle == key.bundle else None
        ),
        fingerprint=_fingerprint(bundles),
    )


def origin_of(url: str) -> str:
    """Scheme, host and port of a base URL that was checked before, in the one normal form."""
    return trusted_url(url).origin


def key_origin_class(base_url: str | None) -> str:
    """What a change of `LLM_BASE_URL` is compared by: its origin, where all vendors' own and none are the
    same.

    A bundle does not say its vendor; any of them may be named by the session anyway.
    """
    if base_url is None:
        return VENDOR_OWN
    origin = origin_of(base_url)
    vendors = {origin_of(url) for url in settings.E2A.vendor_urls.values() if urlsplit(url).hostname}
    return VENDOR_OWN if origin in vendors else origin

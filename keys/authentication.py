"""`Authorization: Bearer …`: the one way to say who is calling `/v1`."""

from __future__ import annotations

import hmac
import re
from typing import Any

from django.conf import settings
from rest_framework.authentication import BaseAuthentication
from rest_framework.request import Request

from accounts.limits import source_hit
from accounts.models import User
from accounts.principal import Principal
from accounts.tokens import MAX_TOKEN_CHARS, account_sign_in
from e2a.core import rate_limits
from e2a.core.errors import Unauthenticated
from e2a.core.requests import client_address
from e2a.core.rows import only
from keys import formats
from keys.models import ApiKey
from keys.services import key_used

CALLS_PER_MINUTE = 600
REFUSALS_PER_MINUTE = 60
_CREDENTIAL = re.compile(r"Bearer ([A-Za-z0-9._~+/=-]+)")


def principal_for_bearer(header: str | None, *, address: str = "") -> Principal:
    """Who the value of an `Authorization` header stands for: a person or an API key. One query, mostly.

    Raises `Unauthenticated`, with one body for every cause, and `RateLimited`. The scheme is spelled
    `Bearer`, followed by one blank. `address` is the caller's, for `last_used_address` and for limits on
    wrong credentials.
    """
    try:
        principal = _principal(header, address)
    except Unauthenticated:
        if header is not None and address:
            source_hit("bearer-refused", address, limit=REFUSALS_PER_MINUTE, window_seconds=60)
        raise
    if principal.key_id is not None:
        rate_limits.hit("api-key", principal.key_id, limit=CALLS_PER_MINUTE, window_seconds=60)
    return principal


class BearerAuthentication(BaseAuthentication):
    """DRF: `request.user` is the user, `request.auth` the `Principal`. No header: left to the permission."""

    def authenticate(self, request: Request) -> tuple[User, Principal] | None:
        scope: dict[str, Any] = getattr(request._request, "scope", {})
        principal: Principal | None = scope.get("e2a.principal")
        if principal is None:
            header = request.META.get("HTTP_AUTHORIZATION")
            if header is None:
                return None
            principal = principal_for_bearer(header, address=client_address(request._request))
        return principal.user, principal

    def authenticate_header(self, request: Request) -> str:
        return "Bearer"


def _principal(header: str | None, address: str) -> Principal:
    if header is None or len(header) > MAX_TOKEN_CHARS + len("Bearer "):
        raise _refusal()
    match = _CREDENTIAL.fullmatch(header)
    if match is None:
        raise _refusal()
    credential = match[1]
    if credential.startswith(formats.MARKER):
        return _key_principal(credential, address)
    sign_in = account_sign_in(credential)
    return Principal(kind="account", tenant=sign_in.user.tenant, user=sign_in.user, family=sign_in.family)


def _key_principal(raw: str, address: str) -> Principal:
    if not formats.is_well_formed(raw):
        raise _refusal()
    ring = settings.E2A.signing_keys
    key = only(ApiKey.objects.select_related("tenant", "user").filter(lookup=formats.lookup_of(raw)))
    pepper = ring.newest if key is None else ring.find(key.pepper_id)
    if pepper is None:
        raise _refusal()  # Its pepper was taken out of the ring: the key is dead.
    digest = formats.digest_of(raw, pepper)  # Computed for an unknown key too: no difference to be timed.
    if key is None or not hmac.compare_digest(digest, key.digest):
        raise _refusal()
    if (
        not key.is_live()
        or not key.user.is_active
        or not key.tenant.is_active
        or key.tenant_id != key.user.tenant_id
    ):
        raise _refusal()
    key.user.tenant = key.tenant  # The same row; saves whoever asks for it a query.
    key_used(key=key, raw=raw, address=address)
    return Principal(
        kind="key",
        tenant=key.tenant,
        user=key.user,
        key_id=key.public_id,
        key_pk=key.pk,
        scopes=frozenset(key.scopes),
    )


def _refusal() -> Unauthenticated:
    return Unauthenticated("A valid bearer token is needed.")

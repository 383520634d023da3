"""`/v1/api-keys` (CONTRACT 3). An account token only: a key can neither make, see nor widen keys."""

from __future__ import annotations

from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from accounts.audit import caller_of
from accounts.principal import principal_of
from e2a.core.api import ApiView, created, validated
from e2a.core.idempotency import idempotent
from keys import services
from keys.selectors import key_get, keys_of
from keys.serializers import (
    KeyAnswer,
    KeyCreateBody,
    KeyListAnswer,
    KeyRevokedAnswer,
    KeyRotateBody,
    issued_shown,
    key_shown,
)


class AccountView(ApiView):
    accepts = frozenset({"account"})


class KeysView(AccountView):
    @extend_schema(operation_id="api_keys_list", tags=["api keys"], responses={200: KeyListAnswer})
    def get(self, request: Request) -> Response:
        """The tenant's keys, newest first: all that work, and the newest 100 that have ended."""
        return Response({"api_keys": [key_shown(key) for key in keys_of(principal_of(request).tenant)]})

    @extend_schema(
        operation_id="api_keys_create", tags=["api keys"], request=KeyCreateBody, responses={201: KeyAnswer}
    )
    @idempotent(sealed=True)
    def post(self, request: Request) -> Response:
        """Make a key. It is shown this once; only a digest of it is kept."""
        body = validated(KeyCreateBody, request)
        issued = services.key_issue(
            user=principal_of(request).user,
            name=body.get("name") or "",
            scopes=body.get("scopes"),
            expires_at=body.get("expires_at"),
            caller=caller_of(request._request),
        )
        return created(issued_shown(issued))


class KeyView(AccountView):
    @extend_schema(operation_id="api_keys_revoke", tags=["api keys"], responses={200: KeyRevokedAnswer})
    def delete(self, request: Request, key_id: str) -> Response:
        """Refuse the key from now on, and close the streams of its sessions. Twice is fine."""
        key = key_get(principal_of(request).tenant, key_id)
        services.key_revoke(key=key, actor=principal_of(request).user, caller=caller_of(request._request))
        return Response({"key_id": key.public_id, "status": "revoked"})


class KeyRotateView(AccountView):
    @extend_schema(
        operation_id="api_keys_rotate", tags=["api keys"], request=KeyRotateBody, responses={201: KeyAnswer}
    )
    @idempotent(sealed=True)
    def post(self, request: Request, key_id: str) -> Response:
        """Make a new key like this one, which works on for `grace_seconds`."""
        key = key_get(principal_of(request).tenant, key_id)
        body = validated(KeyRotateBody, request)
        issued = services.key_rotate(
            key=key,
            actor=principal_of(request).user,
            grace_seconds=body["grace_seconds"],
            caller=caller_of(request._request),
        )
        return created(issued_shown(issued))

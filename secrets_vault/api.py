"""`/v1/tenants/me/secrets`: bundles of the caller's tenant. No answer holds a value."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from accounts.audit import caller_of
from accounts.models import Tenant
from accounts.principal import Principal
from e2a.core.api import ApiView, created, time_text, validated
from e2a.core.errors import ValidationFailed
from e2a.core.idempotency import idempotent
from e2a.core.pagination import MAX_LIMIT, page
from secrets_vault import serializers as shapes
from secrets_vault import services
from secrets_vault.selectors import (
    BundleState,
    VersionState,
    bundle_get,
    bundle_state,
    bundle_states,
    bundles_of,
    version_states,
    versions_of,
)

_NAME = OpenApiParameter("name", shapes.NAME_SCHEMA, OpenApiParameter.PATH)
_LIMIT = OpenApiParameter(
    "limit", {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": 20}, OpenApiParameter.QUERY
)
_CURSOR = OpenApiParameter("cursor", str, OpenApiParameter.QUERY)
_FORCE = OpenApiParameter("force", {"type": "string", "enum": ["true", "false"]}, OpenApiParameter.QUERY)
_IDEMPOTENCY_KEY = OpenApiParameter(
    "Idempotency-Key", {"type": "string", "minLength": 1, "maxLength": 255}, OpenApiParameter.HEADER
)
_TAGS = ["secrets"]


def _made(state: BundleState) -> dict[str, Any]:
    return {
        "name": state.name,
        "version": state.version,
        "keys": list(state.keys),
        "created_at": time_text(state.created_at),
        "updated_at": time_text(state.updated_at),
    }


def _shown(state: BundleState) -> dict[str, Any]:
    return {**_made(state), "sessions": state.sessions}


def _changed(change: services.BundleChange) -> Response:
    return Response({**_made(change.state), "sessions_updated": change.sessions_updated})


def _version_shown(state: VersionState) -> dict[str, Any]:
    return {
        "version": state.version,
        "keys": list(state.keys),
        "created_at": time_text(state.created_at),
        "created_by": state.created_by,
    }


def _tenant(request: Request) -> Tenant:
    return _principal(request).tenant


def _principal(request: Request) -> Principal:
    return cast(Principal, request.auth)  # The stubs know only DRF's own tokens.


def _who(request: Request) -> dict[str, Any]:
    """Whose bundle, and actor and caller for the audit trail."""
    principal = _principal(request)
    return {
        "tenant": principal.tenant,
        "actor": principal.public_id,
        "caller": caller_of(request._request),
    }


class SecretsView(ApiView):
    scopes: ClassVar = {"GET": "secrets:read", "POST": "secrets:write"}

    @extend_schema(
        tags=_TAGS,
        summary="List secret bundles",
        operation_id="secrets_list",
        parameters=[_LIMIT, _CURSOR],
        responses={200: shapes.BundleListSerializer},
    )
    def get(self, request: Request) -> Response:
        """Names, versions and times, newest first. Never a value."""
        bundles, next_cursor = page(bundles_of(_tenant(request)), request)
        return Response(
            {"secrets": [_shown(state) for state in bundle_states(bundles)], "next_cursor": next_cursor}
        )

    @extend_schema(
        tags=_TAGS,
        summary="Make a secret bundle",
        operation_id="secrets_create",
        parameters=[_IDEMPOTENCY_KEY],
        request=shapes.BundleCreateSerializer,
        responses={201: shapes.BundleCreatedSerializer},
    )
    @idempotent()
    def post(self, request: Request) -> Response:
        """`already_exists` (409) for a name that is taken; at most 50 bundles a tenant."""
        body = validated(shapes.BundleCreateSerializer, request)
        return created(
            _made(services.bundle_create(name=body["name"], values=body["values"], **_who(request)))
        )


class SecretView(ApiView):
    scopes: ClassVar = {
        "GET": "secrets:read",
        "PUT": "secrets:write",
        "PATCH": "secrets:write",
        "DELETE": "secrets:write",
    }

    @extend_schema(
        tags=_TAGS,
        summary="Read a bundle's metadata",
        operation_id="secrets_retrieve",
        parameters=[_NAME],
        responses={200: shapes.BundleSerializer},
    )
    def get(self, request: Request, name: str) -> Response:
        """Name, version, the names of its values, and how many live sessions use it. Never a value."""
        return Response(_shown(bundle_state(bundle_get(_tenant(request), name))))

    @extend_schema(
        tags=_TAGS,
        summary="Replace all values",
        operation_id="secrets_replace",
        parameters=[_NAME],
        request=shapes.BundleReplaceSerializer,
        responses={200: shapes.BundleChangedSerializer},
    )
    def put(self, request: Request, name: str) -> Response:
        """A new version. Running sessions use it from their next model call and their next command."""
        body = validated(shapes.BundleReplaceSerializer, request)
        return _changed(services.bundle_replace(name=name, values=body["values"], **_who(request)))

    @extend_schema(
        tags=_TAGS,
        summary="Set or remove single values",
        operation_id="secrets_update",
        parameters=[_NAME],
        request={"application/json": shapes.PATCH_SCHEMA},
        responses={200: shapes.BundleChangedSerializer},
    )
    def patch(self, request: Request, name: str) -> Response:
        """A new version with the given names set and those that are `null` removed.

        `LLM_BASE_URL` of another origin needs `LLM_API_KEY` again in the same request (`origin_mismatch`).
        """
        body = validated(shapes.BundlePatchSerializer, request)
        return _changed(services.bundle_patch(name=name, values=body["values"], **_who(request)))

    @extend_schema(
        tags=_TAGS,
        summary="Delete a bundle",
        operation_id="secrets_delete",
        parameters=[_NAME, _FORCE],
        responses={204: None},
    )
    def delete(self, request: Request, name: str) -> Response:
        """With its history. 409 `in_use` while a live session or sandbox uses it, unless `force=true`."""
        services.bundle_delete(name=name, force=_force_of(request), **_who(request))
        return Response(status=204)


class SecretVersionsView(ApiView):
    scopes: ClassVar = {"GET": "secrets:read"}

    @extend_schema(
        tags=_TAGS,
        summary="List a bundle's versions",
        operation_id="secrets_versions",
        parameters=[_NAME, _LIMIT, _CURSOR],
        responses={200: shapes.VersionListSerializer},
    )
    def get(self, request: Request, name: str) -> Response:
        """The last ten, newest first. Never a value."""
        versions, next_cursor = page(versions_of(bundle_get(_tenant(request), name)), request)
        return Response(
            {"versions": [_version_shown(v) for v in version_states(versions)], "next_cursor": next_cursor}
        )


class SecretRollbackView(ApiView):
    scopes: ClassVar = {"POST": "secrets:write"}

    @extend_schema(
        tags=_TAGS,
        summary="Go back to an earlier version",
        operation_id="secrets_rollback",
        parameters=[_NAME, _IDEMPOTENCY_KEY],
        request=shapes.BundleRollbackSerializer,
        responses={200: shapes.BundleChangedSerializer},
    )
    @idempotent()
    def post(self, request: Request, name: str) -> Response:
        """Its values become a new version. 404 `version_not_found` for one that is no longer kept."""
        body = validated(shapes.BundleRollbackSerializer, request)
        return _changed(services.bundle_rollback(name=name, version=body["version"], **_who(request)))


def _force_of(request: Request) -> bool:
    raw = request.query_params.get("force", "false")
    if raw not in ("true", "false"):
        raise ValidationFailed.of("force", "invalid", "force is true or false.")
    return raw == "true"

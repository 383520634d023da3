"""`/v1/sandboxes/{id}/previews`: share links."""

from __future__ import annotations

from typing import Any

from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from accounts.principal import principal_of
from e2a.core.api import ClosedSerializer, StrictIntegerField, created, time_text, validated
from e2a.core.idempotency import idempotent
from e2a.core.pagination import MAX_LIMIT, page
from sandboxes.api import TAGS, SandboxApiView
from sandboxes.models import PreviewLink
from sandboxes.preview.links import LONGEST_SECONDS, preview_link_create, preview_link_revoke, preview_links

_LIMIT = OpenApiParameter(
    "limit", {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": 20}, OpenApiParameter.QUERY
)
_CURSOR = OpenApiParameter("cursor", str, OpenApiParameter.QUERY)
_IDEMPOTENCY_KEY = OpenApiParameter(
    "Idempotency-Key", {"type": "string", "minLength": 1, "maxLength": 255}, OpenApiParameter.HEADER
)


class PreviewCreateSerializer(ClosedSerializer):
    port = StrictIntegerField(min_value=1, max_value=65535)
    expires_in_seconds = StrictIntegerField(min_value=60, max_value=LONGEST_SECONDS, default=3600)


class PreviewSerializer(serializers.Serializer[Any]):
    preview_id = serializers.CharField()
    port = serializers.IntegerField()
    created_at = serializers.DateTimeField()
    expires_at = serializers.DateTimeField()


class PreviewCreatedSerializer(PreviewSerializer):
    url = serializers.CharField(help_text="Shown this once.")


class PreviewListSerializer(serializers.Serializer[Any]):
    previews = PreviewSerializer(many=True)
    next_cursor = serializers.CharField(allow_null=True)


class PreviewRevokedSerializer(serializers.Serializer[Any]):
    preview_id = serializers.CharField()
    status = serializers.ChoiceField(choices=["revoked"])


def link_shown(link: PreviewLink) -> dict[str, Any]:
    return {
        "preview_id": link.public_id,
        "port": link.port,
        "created_at": time_text(link.created_at),
        "expires_at": time_text(link.expires_at),
    }


class PreviewsView(SandboxApiView):
    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_previews_list",
        summary="List the share links of a sandbox",
        parameters=[_LIMIT, _CURSOR],
        responses={200: PreviewListSerializer},
    )
    def get(self, request: Request, sandbox_id: str) -> Response:
        """Those that work, newest first. Their addresses are not known any more."""
        rows, next_cursor = page(preview_links(self.sandbox(request)), request)
        return Response({"previews": [link_shown(row) for row in rows], "next_cursor": next_cursor})

    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_previews_create",
        summary="Make a share link for a port",
        parameters=[_IDEMPOTENCY_KEY],
        request=PreviewCreateSerializer,
        responses={201: PreviewCreatedSerializer},
    )
    @idempotent(sealed=True)
    def post(self, request: Request, sandbox_id: str) -> Response:
        """Whoever has `url` sees that port, without an account, until `expires_at`, or until it is revoked, or the
        API key that made it is. Nothing need listen there yet."""
        body = validated(PreviewCreateSerializer, request)
        link, url = preview_link_create(
            sandbox=self.sandbox(request),
            port=body["port"],
            expires_in_seconds=body["expires_in_seconds"],
            made_by=principal_of(request).public_id,
        )
        return created(link_shown(link) | {"url": url})


class PreviewView(SandboxApiView):
    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_previews_revoke",
        summary="Revoke a share link",
        responses={200: PreviewRevokedSerializer},
    )
    def delete(self, request: Request, sandbox_id: str, preview_id: str) -> Response:
        """Who is looking is cut off. Twice is fine."""
        link = preview_link_revoke(sandbox=self.sandbox(request), link_id=preview_id)
        return Response({"preview_id": link.public_id, "status": "revoked"})

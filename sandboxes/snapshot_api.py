"""`/v1/sandboxes/{id}/snapshot`, `/v1/snapshots` and `/v1/workspaces`."""

from __future__ import annotations

from typing import Any, ClassVar

from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from e2a.core.api import ApiView, ClosedSerializer, StrictCharField, created, time_text, validated
from e2a.core.idempotency import idempotent
from e2a.core.pagination import MAX_LIMIT, page
from sandboxes.api import SCOPES, TAGS, SandboxApiView, tenant_of
from sandboxes.services import sandbox_used, sandbox_wait_running
from sandboxes.snapshot_models import Snapshot
from sandboxes.snapshots import SHOWN_STATES, snapshot_create, snapshot_delete, snapshot_get, snapshots_of
from sandboxes.workspaces import (
    WorkspaceKey,
    workspace_delete,
    workspace_get,
    workspace_shown,
    workspaces_of,
)

_LIMIT = OpenApiParameter(
    "limit", {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": 20}, OpenApiParameter.QUERY
)
_CURSOR = OpenApiParameter("cursor", str, OpenApiParameter.QUERY)
_STATE = OpenApiParameter("state", {"type": "string", "enum": sorted(SHOWN_STATES)}, OpenApiParameter.QUERY)
_IDEMPOTENCY_KEY = OpenApiParameter(
    "Idempotency-Key", {"type": "string", "minLength": 1, "maxLength": 255}, OpenApiParameter.HEADER
)
_USER = OpenApiParameter("user_id", str, OpenApiParameter.QUERY, description="Of a session's workspace.")
_APP = OpenApiParameter(
    "app", str, OpenApiParameter.QUERY, description="Of a session's workspace, as the list shows it."
)


class SnapshotCreateSerializer(ClosedSerializer):
    name = StrictCharField(required=False, default="", allow_blank=True, max_length=128)


class SnapshotErrorSerializer(serializers.Serializer[Any]):
    code = serializers.CharField()
    detail = serializers.CharField()


class SnapshotSerializer(serializers.Serializer[Any]):
    snapshot_id = serializers.CharField()
    name = serializers.CharField()
    sandbox_id = serializers.CharField(help_text="Where the files are from; it may be gone.")
    template = serializers.CharField()
    state = serializers.ChoiceField(choices=sorted(SHOWN_STATES))
    size_bytes = serializers.IntegerField(allow_null=True, help_text="In the storage, compressed.")
    files = serializers.IntegerField(allow_null=True)
    files_bytes = serializers.IntegerField(allow_null=True, help_text="Of the files themselves.")
    skipped = serializers.IntegerField(help_text="Sockets, FIFOs and devices, which are not kept.")
    error = SnapshotErrorSerializer(allow_null=True)
    created_at = serializers.DateTimeField()
    ready_at = serializers.DateTimeField(allow_null=True)


class SnapshotListSerializer(serializers.Serializer[Any]):
    snapshots = SnapshotSerializer(many=True)
    next_cursor = serializers.CharField(allow_null=True)


class WorkspaceSerializer(serializers.Serializer[Any]):
    name = serializers.CharField()
    user_id = serializers.CharField(allow_null=True)
    app = serializers.CharField(allow_null=True)
    size_bytes = serializers.IntegerField(allow_null=True, help_text="Of the current version, compressed.")
    versions = serializers.IntegerField()
    sandbox_id = serializers.CharField(allow_null=True, help_text="The living sandbox that has it.")
    created_at = serializers.DateTimeField()
    saved_at = serializers.DateTimeField(allow_null=True)


class WorkspaceListSerializer(serializers.Serializer[Any]):
    workspaces = WorkspaceSerializer(many=True)
    next_cursor = serializers.CharField(allow_null=True)


def snapshot_shown(snapshot: Snapshot) -> dict[str, Any]:
    error = {"code": snapshot.error_code, "detail": snapshot.error_detail} if snapshot.error_code else None
    return {
        "snapshot_id": snapshot.public_id,
        "name": snapshot.name,
        "sandbox_id": snapshot.sandbox_public_id,
        "template": snapshot.template_name,
        "state": str(snapshot.state),
        "size_bytes": snapshot.size_bytes,
        "files": snapshot.files,
        "files_bytes": snapshot.files_bytes,
        "skipped": snapshot.skipped,
        "error": error,
        "created_at": time_text(snapshot.created_at),
        "ready_at": time_text(snapshot.ready_at),
    }


class SandboxSnapshotView(SandboxApiView):
    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_snapshot",
        summary="Keep a sandbox's files",
        parameters=[_IDEMPOTENCY_KEY],
        request=SnapshotCreateSerializer,
        responses={201: SnapshotSerializer},
    )
    @idempotent()
    def post(self, request: Request, sandbox_id: str) -> Response:
        """`/workspace` and `/home/agent` as they are, while the sandbox runs on. `ready` when that took less than
        10 s, else `saving`: look again with `GET /v1/snapshots/{id}`. A paused sandbox is resumed."""
        body = validated(SnapshotCreateSerializer, request)
        sandbox = self.sandbox(request)
        sandbox_wait_running(sandbox)
        sandbox_used(sandbox)
        return created(snapshot_shown(snapshot_create(sandbox=sandbox, name=body["name"])))


class SnapshotsView(ApiView):
    scopes: ClassVar = SCOPES

    @extend_schema(
        tags=["snapshots"],
        operation_id="snapshots_list",
        summary="List snapshots",
        parameters=[_STATE, _LIMIT, _CURSOR],
        responses={200: SnapshotListSerializer},
    )
    def get(self, request: Request) -> Response:
        """Newest first. Versions of workspaces are not among them."""
        rows, next_cursor = page(snapshots_of(tenant_of(request), request.GET.get("state")), request)
        return Response({"snapshots": [snapshot_shown(row) for row in rows], "next_cursor": next_cursor})


class SnapshotView(ApiView):
    scopes: ClassVar = SCOPES

    @extend_schema(
        tags=["snapshots"],
        operation_id="snapshots_get",
        summary="Show a snapshot",
        responses={200: SnapshotSerializer},
    )
    def get(self, request: Request, snapshot_id: str) -> Response:
        return Response(snapshot_shown(snapshot_get(tenant_of(request), snapshot_id)))

    @extend_schema(
        tags=["snapshots"],
        operation_id="snapshots_delete",
        summary="Delete a snapshot",
        responses={204: None},
    )
    def delete(self, request: Request, snapshot_id: str) -> Response:
        """At once. Sandboxes that start from it already get their files; all others keep theirs."""
        snapshot_delete(snapshot_get(tenant_of(request), snapshot_id))
        return Response(status=204)


class WorkspacesView(ApiView):
    scopes: ClassVar = SCOPES

    @extend_schema(
        tags=["workspaces"],
        operation_id="workspaces_list",
        summary="List persistent workspaces",
        parameters=[_LIMIT, _CURSOR],
        responses={200: WorkspaceListSerializer},
    )
    def get(self, request: Request) -> Response:
        rows, next_cursor = page(workspaces_of(tenant_of(request)), request)
        return Response({"workspaces": [workspace_shown(row) for row in rows], "next_cursor": next_cursor})


def _key(request: Request, name: str) -> WorkspaceKey:
    query = request.GET
    return WorkspaceKey(
        *(text.replace("\0", "") for text in (name, query.get("user_id", ""), query.get("app", "")))
    )


class WorkspaceView(ApiView):
    scopes: ClassVar = SCOPES

    @extend_schema(
        tags=["workspaces"],
        operation_id="workspaces_get",
        summary="Show a workspace",
        parameters=[_USER, _APP],
        responses={200: WorkspaceSerializer},
    )
    def get(self, request: Request, name: str) -> Response:
        return Response(workspace_shown(workspace_get(tenant_of(request), _key(request, name))))

    @extend_schema(
        tags=["workspaces"],
        operation_id="workspaces_delete",
        summary="Delete a workspace with all its versions",
        parameters=[_USER, _APP],
        responses={204: None},
    )
    def delete(self, request: Request, name: str) -> Response:
        """409 `workspace_in_use` while a living sandbox has it."""
        workspace_delete(workspace_get(tenant_of(request), _key(request, name)))
        return Response(status=204)

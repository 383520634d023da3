"""`/v1/sandboxes` and `/v1/templates`."""

from __future__ import annotations

from typing import Any, ClassVar, cast
from urllib.parse import quote, urlencode

from django.http import StreamingHttpResponse
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.renderers import BaseRenderer, JSONRenderer
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.serializers import Serializer

from accounts.models import Tenant
from accounts.principal import Principal
from e2a.core.api import ApiView, created, validated
from e2a.core.idempotency import idempotent
from e2a.core.openapi import SERVER_SENT_EVENT
from e2a.core.pagination import MAX_LIMIT, page
from sandboxes import presenting
from sandboxes import serializers as shapes
from sandboxes.execution import Command, ExecStream, sandbox_exec
from sandboxes.models import DeathReason, Sandbox
from sandboxes.pages import after_of
from sandboxes.selectors import (
    SHOWN_STATES,
    log_entries,
    sandbox_get,
    sandboxes_by_state,
    soft_limits,
    templates_enabled,
)
from sandboxes.services import sandbox_create, sandbox_destroy, sandbox_extend
from sandboxes.streams import event_stream, stream_open, streamed
from sandboxes.templates import templates_available
from sandboxes.workspaces import WorkspaceKey

TAGS = ["sandboxes"]
SCOPES = {
    "GET": "sandboxes:read",
    "POST": "sandboxes:write",
    "PUT": "sandboxes:write",
    "DELETE": "sandboxes:write",
}
LOG_PAGE = 100

_LIMIT = OpenApiParameter(
    "limit", {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": 20}, OpenApiParameter.QUERY
)
_CURSOR = OpenApiParameter("cursor", str, OpenApiParameter.QUERY)
_STATE = OpenApiParameter("state", {"type": "string", "enum": sorted(SHOWN_STATES)}, OpenApiParameter.QUERY)
_AFTER = OpenApiParameter("after", {"type": "integer", "minimum": 0, "default": 0}, OpenApiParameter.QUERY)
_IDEMPOTENCY_KEY = OpenApiParameter(
    "Idempotency-Key", {"type": "string", "minLength": 1, "maxLength": 255}, OpenApiParameter.HEADER
)


def tenant_of(request: Request) -> Tenant:
    """The caller's tenant; the permission has seen to it that there is a caller."""
    principal = cast(Principal, request.auth)
    return principal.tenant


class SandboxesView(ApiView):
    """To be subclassed: `create_serializer` and `create` are what a richer POST replaces."""

    scopes: ClassVar = SCOPES
    create_serializer: ClassVar[type[Serializer[Any]]] = shapes.SandboxCreateSerializer

    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_list",
        summary="List sandboxes",
        parameters=[_STATE, _LIMIT, _CURSOR],
        responses={200: shapes.SandboxSerializer(many=True)},
    )
    def get(self, request: Request) -> Response:
        """Live ones, or those in `state`, newest first. A bare array; `Link: rel="next"` when there is
        more."""
        rows, next_cursor = page(sandboxes_by_state(tenant_of(request), request.GET.get("state")), request)
        response = Response([presenting.sandbox_shown(row) for row in rows])
        if next_cursor is not None:
            query = urlencode({**request.GET.dict(), "cursor": next_cursor})
            response["Link"] = f'<{request.build_absolute_uri(request.path)}?{query}>; rel="next"'
        return response

    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_create",
        summary="Make a sandbox",
        parameters=[_IDEMPOTENCY_KEY],
        request=shapes.SandboxCreateSerializer,
        responses={201: shapes.SandboxSerializer},
    )
    @idempotent()
    def post(self, request: Request) -> Response:
        """`running` when a warm one was there, else `creating`: what is done with it then waits until it
        runs."""
        return created(self.create(request, validated(self.create_serializer, request)))

    def create(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """Make what the checked body asks for; returns the answer."""
        sandbox = sandbox_create(
            tenant=tenant_of(request),
            template_name=body["template"],
            idle_timeout_seconds=body["idle_timeout_seconds"],
            max_lifetime_seconds=body["max_lifetime_seconds"],
            env_vars=body.get("env_vars"),
            bundle_names=body.get("secrets", ()),
            metadata=body.get("metadata"),
            egress=body.get("egress"),
            snapshot=body.get("snapshot", ""),
            workspace=WorkspaceKey(body["workspace"]) if "workspace" in body else None,
        )
        return presenting.sandbox_shown(sandbox)


class SandboxApiView(ApiView):
    """A view of one sandbox of the caller's tenant."""

    scopes: ClassVar = SCOPES

    def sandbox(self, request: Request) -> Sandbox:
        """Raises `NotFound`, also for a stranger's."""
        return sandbox_get(tenant_of(request), self.kwargs["sandbox_id"])


class SandboxView(SandboxApiView):
    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_get",
        summary="Show a sandbox",
        responses={200: shapes.SandboxDetailSerializer},
    )
    def get(self, request: Request, sandbox_id: str) -> Response:
        """With why it lives, or how it died; kept for 30 days."""
        return Response(presenting.sandbox_detailed(self.sandbox(request)))

    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_destroy",
        summary="Destroy a sandbox",
        responses={200: shapes.DestroyedSerializer},
    )
    def delete(self, request: Request, sandbox_id: str) -> Response:
        """The same answer when it was gone already."""
        sandbox = self.sandbox(request)
        sandbox_destroy(sandbox=sandbox, reason=DeathReason.USER)
        return Response({"vm_id": sandbox.public_id, "status": "destroyed"})


class ExtendView(SandboxApiView):
    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_extend",
        summary="Keep a sandbox that idles",
        request=shapes.ExtendSerializer,
        responses={200: shapes.SandboxDetailSerializer},
    )
    def post(self, request: Request, sandbox_id: str) -> Response:
        """For so many seconds it is not ended for idleness; it never lives beyond `expires_at`."""
        body = validated(shapes.ExtendSerializer, request)
        sandbox = sandbox_extend(sandbox=self.sandbox(request), seconds_more=body["seconds"])
        return Response(presenting.sandbox_detailed(sandbox))


class EventStreamRenderer(BaseRenderer):
    """Names the media type, so that it can be asked for; what it renders are problems, the stream has its own
    way."""

    media_type = "text/event-stream"
    format = "sse"
    charset = None

    def render(
        self, data: Any, accepted_media_type: str | None = None, renderer_context: Any = None
    ) -> bytes:
        rendered: bytes = JSONRenderer().render(data)
        return rendered


class ExecView(SandboxApiView):
    renderer_classes = [JSONRenderer, EventStreamRenderer]

    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_exec",
        summary="Run a command",
        request=shapes.ExecSerializer,
        responses={
            (200, "application/json"): shapes.CompletedSerializer,
            (200, "text/event-stream"): SERVER_SENT_EVENT,
        },
    )
    def post(self, request: Request, sandbox_id: str) -> Response | StreamingHttpResponse:
        """Answers when it has ended; with `Accept: text/event-stream` as it goes: `stdout`, `stderr`, then
        one `exit`.

        After `timeout_seconds` the command and all that it started is killed, and `exit_code` is 124.
        """
        body = validated(shapes.ExecSerializer, request)
        command = Command(
            command=body.get("command"),
            argv=tuple(body["argv"]) if "argv" in body else None,
            cwd=body.get("cwd"),
            env=body.get("env"),
            stdin=body.get("stdin"),
            timeout_seconds=body["timeout_seconds"],
        )
        sandbox = self.sandbox(request)
        if not isinstance(request.accepted_renderer, EventStreamRenderer):
            return Response(presenting.completed_shown(sandbox_exec(sandbox=sandbox, command=command)))
        stream = stream_open(lambda: ExecStream(sandbox, command))
        response = streamed(event_stream(stream), stream, content_type="text/event-stream")
        response["X-Accel-Buffering"] = "no"
        return response


class LogsView(SandboxApiView):
    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_logs",
        summary="What ran and what it printed",
        parameters=[_AFTER],
        responses={200: shapes.LogSerializer},
    )
    def get(self, request: Request, sandbox_id: str) -> Response:
        """Commands of `exec`, and jobs once they have ended, oldest first, up to 100 a page; `next_after` is the next
        page's `after`."""
        after = after_of(request)
        rows = log_entries(self.sandbox(request), after=after, limit=LOG_PAGE)
        return Response(
            {
                "entries": [presenting.log_entry_shown(row) for row in rows],
                "next_after": rows[-1].pk if rows else after,
            }
        )


class TemplatesView(ApiView):
    scopes: ClassVar = SCOPES

    @extend_schema(
        tags=["templates"],
        operation_id="templates_list",
        summary="List templates",
        parameters=[_LIMIT, _CURSOR],
        responses={200: shapes.TemplateListSerializer},
    )
    def get(self, request: Request) -> Response:
        """What sandboxes can be made from, whether one could be made now, and which limits do not hold here.

        A create of one that is not `available` answers 503 `template_not_ready` and has its image built.
        """
        rows, next_cursor = page(templates_enabled(), request)
        soft, available = soft_limits(), templates_available(rows)
        shown = [presenting.template_shown(row, soft, available) for row in rows]
        return Response({"templates": shown, "next_cursor": next_cursor})


def attachment(path: str) -> str:
    """A `Content-Disposition` that no browser shows in place (RFC 6266)."""
    name = path.rstrip("/").rpartition("/")[2] or "file"
    return f"attachment; filename*=UTF-8''{quote(name, safe='')}"

"""`/v1/sandboxes/{id}/pause` and `/resume`."""

from __future__ import annotations

from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from sandboxes import presenting
from sandboxes import serializers as shapes
from sandboxes.api import TAGS, SandboxApiView
from sandboxes.pausing import sandbox_pause, sandbox_resume


class PauseView(SandboxApiView):
    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_pause",
        summary="Freeze a sandbox",
        request=None,
        responses={200: shapes.SandboxDetailSerializer},
    )
    def post(self, request: Request, sandbox_id: str) -> Response:
        """All that runs in it stops where it is and costs no CPU; commands and files resume it. It is not
        ended for idleness; it ends at `expires_at`. Limits on a command's time go on counting."""
        return Response(presenting.sandbox_detailed(sandbox_pause(sandbox=self.sandbox(request))))


class ResumeView(SandboxApiView):
    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_resume",
        summary="Thaw a sandbox",
        request=None,
        responses={200: shapes.SandboxDetailSerializer},
    )
    def post(self, request: Request, sandbox_id: str) -> Response:
        """Everything goes on where it was; its idle time starts anew."""
        return Response(presenting.sandbox_detailed(sandbox_resume(sandbox=self.sandbox(request))))

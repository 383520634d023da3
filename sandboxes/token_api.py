"""`POST /v1/sandboxes/{id}/token`: what a browser shows to attach to one sandbox."""

from __future__ import annotations

from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from accounts.tokens import sandbox_token_issue
from e2a.core.api import created, time_text
from sandboxes import serializers as shapes
from sandboxes.api import TAGS, SandboxApiView, tenant_of
from sandboxes.guest_answers import not_running
from sandboxes.models import LIVE_STATES


class TokenView(SandboxApiView):
    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_token",
        summary="Get a token for a sandbox's terminal",
        request=None,
        responses={201: shapes.TokenSerializer},
    )
    def post(self, request: Request, sandbox_id: str) -> Response:
        """For this sandbox only, 15 minutes; a socket that was opened with it lives on."""
        sandbox = self.sandbox(request)
        if sandbox.state not in LIVE_STATES:
            raise not_running(sandbox)
        token, expires_at = sandbox_token_issue(
            sandbox_public_id=sandbox.public_id, tenant_public_id=tenant_of(request).public_id
        )
        return created({"token": token, "expires_at": time_text(expires_at)})

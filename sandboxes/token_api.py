"""`POST /v1/sandboxes/{id}/token`: what a browser shows to attach to one sandbox."""

from __future__ import annotations

from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from accounts.principal import principal_of
from e2a.core.api import created, time_text
from sandboxes import serializers as shapes
from sandboxes.api import TAGS, SandboxApiView
from sandboxes.tokens import sandbox_token


class TokenView(SandboxApiView):
    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_token",
        summary="Get a token for a sandbox's terminal, desktop and previews",
        request=None,
        responses={201: shapes.TokenSerializer},
    )
    def post(self, request: Request, sandbox_id: str) -> Response:
        """For this sandbox only, 15 minutes. A socket that was opened with it lives on, until the caller's key is
        revoked."""
        token, expires_at = sandbox_token(self.sandbox(request), holder=principal_of(request).public_id)
        return created({"token": token, "expires_at": time_text(expires_at)})

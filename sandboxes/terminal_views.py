"""The dashboard's page of a sandbox's terminal."""

from __future__ import annotations

from csp.constants import UNSAFE_INLINE
from csp.decorators import csp_update
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST, require_safe

from e2a.core.errors import E2AError
from e2a.core.socket_addresses import socket_url
from sandboxes.models import LIVE_STATES
from sandboxes.page_access import for_people, tenant_of, user_of
from sandboxes.selectors import sandbox_get
from sandboxes.tokens import sandbox_token


@csp_update({"style-src": [UNSAFE_INLINE]})  # xterm.js makes style elements as it goes.
@require_safe
@for_people
def terminal_page(request: HttpRequest, sandbox_id: str) -> HttpResponse:
    sandbox = sandbox_get(tenant_of(request), sandbox_id)
    if sandbox.state not in LIVE_STATES:
        return redirect("sandbox", sandbox_id=sandbox.public_id)
    context = {
        "sandbox": sandbox,
        "nav": "sandboxes",
        "connect_url": socket_url(request, f"/v1/sandboxes/{sandbox.public_id}/terminal"),
    }
    return render(request, "sandboxes/terminal.html", context)


@require_POST
@for_people
def sandbox_token_page(request: HttpRequest, sandbox_id: str) -> HttpResponse:
    """A fresh token for what a page attaches to the sandbox."""
    try:
        token, _ = sandbox_token(
            sandbox_get(tenant_of(request), sandbox_id), holder=user_of(request).public_id
        )
    except E2AError as error:
        return JsonResponse({"detail": error.detail}, status=error.status)
    return JsonResponse({"token": token})

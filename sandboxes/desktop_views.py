"""The dashboard's page of a sandbox's desktop."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_safe

from e2a.core.socket_addresses import socket_url
from sandboxes.models import LIVE_STATES
from sandboxes.page_access import for_people, tenant_of
from sandboxes.selectors import sandbox_get


@require_safe
@for_people
def desktop_page(request: HttpRequest, sandbox_id: str) -> HttpResponse:
    sandbox = sandbox_get(tenant_of(request), sandbox_id)
    if sandbox.state not in LIVE_STATES:
        return redirect("sandbox", sandbox_id=sandbox.public_id)
    context = {
        "sandbox": sandbox,
        "nav": "sandboxes",
        "connect_url": socket_url(request, f"/v1/sandboxes/{sandbox.public_id}/desktop"),
    }
    return render(request, "sandboxes/desktop.html", context)

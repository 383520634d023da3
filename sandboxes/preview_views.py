"""The dashboard's way into a preview."""

from __future__ import annotations

from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect
from django.views.decorators.http import require_POST

from e2a.core.errors import E2AError
from sandboxes.page_access import for_people, tenant_of, user_of
from sandboxes.preview.links import preview_address
from sandboxes.selectors import sandbox_get
from sandboxes.tokens import sandbox_token


@require_POST
@for_people
def preview_open_page(request: HttpRequest, sandbox_id: str) -> HttpResponse:
    """Sends a browser into the preview of a port, with a token of its own."""
    sandbox = sandbox_get(tenant_of(request), sandbox_id)
    raw = request.POST.get("port", "")
    if not (raw.isascii() and raw.isdigit() and 1 <= int(raw[:6]) <= 65535):
        messages.error(request, "A port is a number from 1 to 65535.")
        return redirect("sandbox", sandbox_id=sandbox.public_id)
    try:
        token, _ = sandbox_token(sandbox, holder=user_of(request).public_id)
        address = preview_address(sandbox, int(raw), token)
    except E2AError as error:
        messages.error(request, error.detail)
        return redirect("sandbox", sandbox_id=sandbox.public_id)
    return redirect(address)

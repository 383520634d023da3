"""The button that allows what a sandbox was refused."""

from __future__ import annotations

from django.conf import settings
from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect
from django.views.decorators.http import require_POST

from e2a.core.errors import E2AError
from sandboxes.egress.rules import EgressRules, rule_text
from sandboxes.page_access import for_people, tenant_of
from sandboxes.selectors import sandbox_get
from sandboxes.services import sandbox_egress_add
from sandboxes.views import sandbox_part


@require_POST
@for_people
def sandbox_egress_allow_page(request: HttpRequest, sandbox_id: str) -> HttpResponse:
    """Add one host to the sandbox's own rules."""
    sandbox = sandbox_get(tenant_of(request), sandbox_id)
    rule, problem = rule_text(request.POST.get("host", ""), request.POST.get("port", "")), ""
    try:
        asked = EgressRules.parse({"allow": [rule]}, allow_private=settings.E2A.egress_allow_private)
        sandbox = sandbox_egress_add(sandbox=sandbox, rules=asked)
    except E2AError as error:
        problem = error.detail or f"{rule} cannot be allowed."
    if getattr(request, "htmx", False):
        return sandbox_part(request, sandbox_id, problem=problem)
    if problem:
        messages.error(request, problem)
    return redirect("sandbox", sandbox_id=sandbox.public_id)

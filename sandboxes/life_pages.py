"""The buttons of a sandbox's page that keep it, freeze it and thaw it; htmx gets the page's part back."""

from __future__ import annotations

from collections.abc import Callable

from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect
from django.views.decorators.http import require_POST

from e2a.core.errors import E2AError
from sandboxes.models import Sandbox
from sandboxes.page_access import for_people, tenant_of
from sandboxes.pausing import sandbox_pause, sandbox_resume
from sandboxes.selectors import sandbox_get
from sandboxes.services import sandbox_extend
from sandboxes.views import sandbox_part

EXTEND_SECONDS = 900


@require_POST
@for_people
def sandbox_extend_page(request: HttpRequest, sandbox_id: str) -> HttpResponse:
    """For 15 minutes more it is not ended for idleness."""
    return _done(request, sandbox_id, lambda row: sandbox_extend(sandbox=row, seconds_more=EXTEND_SECONDS))


@require_POST
@for_people
def sandbox_pause_page(request: HttpRequest, sandbox_id: str) -> HttpResponse:
    return _done(request, sandbox_id, lambda row: sandbox_pause(sandbox=row))


@require_POST
@for_people
def sandbox_resume_page(request: HttpRequest, sandbox_id: str) -> HttpResponse:
    return _done(request, sandbox_id, lambda row: sandbox_resume(sandbox=row))


def _done(request: HttpRequest, sandbox_id: str, act: Callable[[Sandbox], Sandbox]) -> HttpResponse:
    """The page after it was done, or with why it was not."""
    sandbox = sandbox_get(tenant_of(request), sandbox_id)
    problem = ""
    try:
        act(sandbox)
    except E2AError as error:
        problem = error.detail
    if getattr(request, "htmx", False):
        return sandbox_part(request, sandbox_id, problem=problem)
    if problem:
        messages.error(request, problem)
    return redirect("sandbox", sandbox_id=sandbox.public_id)

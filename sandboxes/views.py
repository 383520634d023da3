"""The dashboard's Sandboxes pages: what lives, what became of it, and a way to end it."""

from __future__ import annotations

from csp.decorators import csp_update
from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST, require_safe

from e2a.core.pagination import page
from sandboxes.activity import alive_look
from sandboxes.catalogue import WITHOUT_DESKTOP
from sandboxes.curve_picture import curve_picture
from sandboxes.egress_card import egress_card
from sandboxes.models import LIVE_STATES, DeathReason, Sandbox
from sandboxes.page_access import for_people, tenant_of
from sandboxes.presenting import death_shown
from sandboxes.preview.hosts import preview_sources
from sandboxes.selectors import log_entries_latest, sandbox_get, sandboxes_live, sandboxes_of
from sandboxes.services import sandbox_destroy

_COLUMNS = ["Sandbox", "State", "Template", "Made", "Ends", ""]
_LOG_ROWS = 50


def _is_live(sandbox: Sandbox) -> bool:
    return sandbox.state in LIVE_STATES


@require_safe
@for_people
def sandboxes_page(request: HttpRequest) -> HttpResponse:
    """Live ones, with `?all=1` also those that ended; htmx asks for the table alone."""
    is_all = request.GET.get("all") == "1"
    tenant = tenant_of(request)
    rows, next_cursor = page(
        sandboxes_of(tenant).defer("death") if is_all else sandboxes_live(tenant), request
    )
    context = {
        "rows": [{"sandbox": row, "is_live": _is_live(row)} for row in rows],
        "columns": _COLUMNS,
        "next_cursor": next_cursor,
        "is_all": is_all,
    }
    is_part = getattr(request, "htmx", False) and request.headers.get("HX-Target") == "sandbox-table"
    return render(request, "sandboxes/table.html" if is_part else "sandboxes/list.html", context)


@csp_update({"form-action": preview_sources()})  # The form "Preview port" leads there.
@require_safe
@for_people
def sandbox_page(request: HttpRequest, sandbox_id: str) -> HttpResponse:
    is_part = getattr(request, "htmx", False) and request.headers.get("HX-Target") == "sandbox-detail"
    return sandbox_part(request, sandbox_id, is_part=is_part)


def sandbox_part(
    request: HttpRequest, sandbox_id: str, *, is_part: bool = True, problem: str = ""
) -> HttpResponse:
    """What the page shows of a sandbox, as it is now. Asks a running one's guest, at most 1 s."""
    sandbox = sandbox_get(tenant_of(request), sandbox_id)
    death = death_shown(sandbox)
    context = {
        "sandbox": sandbox,
        "is_live": _is_live(sandbox),
        "has_previews": bool(preview_sources()),
        "may_have_desktop": sandbox.template.name not in WITHOUT_DESKTOP,
        "alive": alive_look(sandbox),
        "problem": problem,
        "death": death,
        "curve": death and curve_picture(death["memory_curve"], limit_mib=sandbox.template.memory_mib),
        "egress": egress_card(sandbox),
        "moves": sandbox.moves.order_by("pk"),
        "log": log_entries_latest(sandbox, limit=_LOG_ROWS),
    }
    return render(request, "sandboxes/facts.html" if is_part else "sandboxes/detail.html", context)


@require_POST
@for_people
def sandbox_destroy_page(request: HttpRequest, sandbox_id: str) -> HttpResponse:
    sandbox = sandbox_get(tenant_of(request), sandbox_id)
    if sandbox_destroy(sandbox=sandbox, reason=DeathReason.USER):
        messages.success(request, f"{sandbox.public_id} is being destroyed.")
    else:
        messages.info(request, f"{sandbox.public_id} had ended already.")
    return redirect("sandboxes")

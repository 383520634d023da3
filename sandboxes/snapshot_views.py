"""The dashboard's page of saved files: snapshots and workspaces."""

from __future__ import annotations

from typing import Any, cast

from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST, require_safe

from accounts.models import Tenant, User
from e2a.core.errors import E2AError, NotFound
from e2a.core.pagination import page
from sandboxes.models import SandboxState
from sandboxes.page_access import for_people
from sandboxes.selectors import sandbox_get
from sandboxes.services import sandbox_create, sandbox_wait_running
from sandboxes.snapshot_models import SnapshotState
from sandboxes.snapshots import snapshot_create, snapshot_delete, snapshot_get, snapshots_of
from sandboxes.workspaces import WorkspaceKey, workspace_delete, workspace_get, workspace_shown, workspaces_of

_COLUMNS = ["Snapshot", "State", "Size", "From", "Made", ""]
_WORKSPACE_COLUMNS = ["Workspace", "Whose", "Size", "Versions", "Saved", ""]
_WORKSPACES = 100


def _tenant(request: HttpRequest) -> Tenant:
    return cast(User, request.user).tenant


@require_safe
@for_people
def snapshots_page(request: HttpRequest) -> HttpResponse:
    """Both lists; htmx asks for the tables alone."""
    tenant = _tenant(request)
    rows, next_cursor = page(snapshots_of(tenant), request)
    workspaces = workspaces_of(tenant).order_by("-pk")[:_WORKSPACES]
    context: dict[str, Any] = {
        "rows": [{"snapshot": row, "is_ready": row.state == SnapshotState.READY} for row in rows],
        "columns": _COLUMNS,
        "next_cursor": next_cursor,
        "workspace_columns": _WORKSPACE_COLUMNS,
        "workspaces": [{"row": row, "shown": workspace_shown(row)} for row in workspaces],
    }
    is_part = getattr(request, "htmx", False) and request.headers.get("HX-Target") == "snapshot-tables"
    return render(
        request, "sandboxes/snapshot_tables.html" if is_part else "sandboxes/snapshots.html", context
    )


@require_POST
@for_people
def snapshot_create_page(request: HttpRequest, sandbox_id: str) -> HttpResponse:
    sandbox = sandbox_get(_tenant(request), sandbox_id)
    try:
        sandbox_wait_running(sandbox)
        snapshot = snapshot_create(
            sandbox=sandbox, name=request.POST.get("name", "").replace("\0", "")[:128], wait_seconds=1
        )
    except NotFound:
        raise
    except E2AError as error:
        messages.error(request, error.detail)
        return redirect("sandbox", sandbox_id=sandbox.public_id)
    messages.success(request, f"{snapshot.public_id} is {snapshot.state}.")
    return redirect("snapshots")


@require_POST
@for_people
def snapshot_start_page(request: HttpRequest, snapshot_id: str) -> HttpResponse:
    """A new sandbox with its files."""
    tenant = _tenant(request)
    snapshot = snapshot_get(tenant, snapshot_id)
    try:
        sandbox = sandbox_create(
            tenant=tenant, template_name=snapshot.template_name, snapshot=snapshot.public_id
        )
    except E2AError as error:
        messages.error(request, error.detail)
        return redirect("snapshots")
    if sandbox.state != SandboxState.RUNNING:
        messages.info(request, "Its files are being put back.")
    return redirect("sandbox", sandbox_id=sandbox.public_id)


@require_POST
@for_people
def snapshot_delete_page(request: HttpRequest, snapshot_id: str) -> HttpResponse:
    snapshot = snapshot_get(_tenant(request), snapshot_id)
    snapshot_delete(snapshot)
    messages.success(request, f"{snapshot.name or snapshot.public_id} is deleted.")
    return redirect("snapshots")


@require_POST
@for_people
def workspace_delete_page(request: HttpRequest) -> HttpResponse:
    given = (request.POST.get(name, "").replace("\0", "") for name in ("name", "user_id", "app"))
    workspace = workspace_get(_tenant(request), WorkspaceKey(*given))
    try:
        workspace_delete(workspace)
    except E2AError as error:
        messages.error(request, error.detail)
    else:
        messages.success(request, f"The workspace {workspace.name} is deleted.")
    return redirect("snapshots")

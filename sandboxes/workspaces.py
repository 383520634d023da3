"""Persistent workspaces: files that a sandbox starts with, and that its end saves. One living writer each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import structlog
from django.db import transaction
from django.db.models import Count, Q, QuerySet

from accounts.models import Tenant
from e2a.core.clock import now, rfc3339, seconds
from e2a.core.enqueue import enqueue
from e2a.core.errors import Conflict, E2AError, NotFound
from sandboxes.configuration import guest_client
from sandboxes.models import Restore, Sandbox, SandboxState
from sandboxes.snapshot_models import Snapshot, SnapshotState, Workspace
from sandboxes.snapshots import quota_hold, snapshot_delete, snapshot_ready

log = structlog.get_logger(__name__)

SAVE_AT_END_SECONDS = 240.0
"""How long the end of a sandbox waits for its workspace. Below the grace of a guest's own life
(`provision.LIFETIME_GRACE_SECONDS`)."""
KEPT_VERSIONS = 3
AUTOSAVE_SECONDS = 300.0
A_PASS = 50
_STATS_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class WorkspaceKey:
    """Whose and which: a session's has its `user_id` and app, a sandbox alone only a name."""

    name: str
    user_id: str = ""
    app: str = ""


def files_wanted(tenant: Tenant, snapshot_id: str, key: WorkspaceKey | None) -> dict[str, Any]:
    """What a new sandbox's row must say so that it starts with these files.

    Call it in the transaction that makes the row. Raises `snapshot_not_found`, `snapshot_not_ready`, 409
    `workspace_in_use`, `quota_exceeded`.
    """
    if snapshot_id:
        return {"snapshot": snapshot_ready(tenant, snapshot_id), "restore": Restore.WANTED}
    if key is None:
        return {}
    workspace, is_new = Workspace.objects.get_or_create(
        tenant=tenant, name=key.name, user_id=key.user_id, app=key.app, defaults={"created_at": now()}
    )
    quota_hold(tenant)
    # Locked: whoever saves a version of it now is either seen, or still lives and is seen below.
    workspace = Workspace.objects.select_for_update().get(pk=workspace.pk)
    if not is_new and _writer(workspace) is not None:
        raise Conflict(
            "A living sandbox has this workspace, or it is still being saved.", code="workspace_in_use"
        )
    wanted = {"workspace": workspace, "snapshot": workspace.current}
    return wanted | ({"restore": Restore.WANTED} if workspace.current is not None else {})


def _writer(workspace: Workspace) -> Sandbox | None:
    return Sandbox.objects.filter(workspace=workspace).exclude(state=SandboxState.DESTROYED).first()


def version_create(sandbox: Sandbox) -> Snapshot:
    """Ask for a version of the sandbox's workspace. In a transaction."""
    assert sandbox.tenant is not None, "a workspace has an owner"
    version = Snapshot.objects.create(
        tenant=sandbox.tenant,
        workspace_id=sandbox.workspace_id,
        is_version=True,
        sandbox=sandbox,
        sandbox_public_id=sandbox.public_id,
        template_name=sandbox.template.name,
        created_at=now(),
    )
    enqueue("sandboxes.tasks.snapshot_save", snapshot_id=version.pk)
    return version


def save_at_end(sandbox: Sandbox) -> bool:
    """The sandbox ends: save its workspace first. Whether there is something to wait for. In a transaction.

    One that never was ready is not saved: its files may be half put back. Nor is that of a tenant which is being
    erased: its data key is gone.
    """
    if sandbox.workspace_id is None or sandbox.ready_at is None or sandbox.restore == Restore.WANTED:
        return False
    if sandbox.tenant is None or sandbox.tenant.erase_asked_at is not None:
        return False
    sandbox.save_until = now() + seconds(SAVE_AT_END_SECONDS)
    Sandbox.objects.filter(pk=sandbox.pk).update(save_until=sandbox.save_until)
    version_create(sandbox)
    return True


def version_settled(version: Snapshot) -> None:
    """A version is ready: it is the workspace's current one, unless a newer one is. In a transaction."""
    if version.workspace_id is None:  # Deleted meanwhile.
        snapshot_delete(version)
        return
    older = Q(current__isnull=True) | Q(current_id__lt=version.pk)
    Workspace.objects.filter(older, pk=version.workspace_id).update(current=version, saved_at=now())
    versions = Snapshot.objects.filter(workspace_id=version.workspace_id, state=SnapshotState.READY)
    for old in versions.order_by("-pk")[KEPT_VERSIONS:]:
        snapshot_delete(old)
    removal_go_on(version)


def version_failed(version: Snapshot) -> None:
    """A version could not be saved: the one before stays, and who asks what became of the sandbox is told."""
    log.warning(
        "workspace.not_saved",
        sandbox=version.sandbox_public_id,
        workspace=version.workspace_id,
        code=version.error_code,
        detail=version.error_detail,
    )
    sandbox = version.sandbox
    if sandbox is not None and sandbox.state in (SandboxState.STOPPING, SandboxState.DESTROYED):
        saved_at = version.workspace.saved_at if version.workspace is not None else None
        kept = f"the version of {rfc3339(saved_at)} is kept" if saved_at else "there is no version of it"
        detail = f"{sandbox.death_detail} Its workspace could not be saved: {kept}."
        Sandbox.objects.filter(pk=sandbox.pk).update(death_detail=detail.strip()[:500])
    snapshot_delete(version)
    removal_go_on(version)


def removal_go_on(version: Snapshot) -> None:
    """Its sandbox, if it ends, need not wait any more."""
    if version.sandbox_id is None:
        return
    rows = Sandbox.objects.filter(
        pk=version.sandbox_id, state=SandboxState.STOPPING, save_until__isnull=False
    )
    # A save that began before the end is not the one that is waited for.
    if Snapshot.objects.filter(
        sandbox_id=version.sandbox_id, is_version=True, state=SnapshotState.SAVING
    ).exists():
        return
    sandbox = rows.select_related("node").first()
    if sandbox is not None and rows.update(save_until=None) and sandbox.node is not None:
        enqueue("sandboxes.tasks.sandbox_remove", queue=f"node.{sandbox.node.name}", sandbox_id=sandbox.pk)


def workspaces_of(tenant: Tenant) -> QuerySet[Workspace]:
    """With what is needed to show them."""
    ready = Count("versions", filter=Q(versions__state=SnapshotState.READY))
    return Workspace.objects.filter(tenant=tenant).select_related("current").annotate(version_count=ready)


def workspace_shown(workspace: Workspace) -> dict[str, Any]:
    """For the API and the dashboard. One query."""
    writer = _writer(workspace)
    current = workspace.current
    return {
        "name": workspace.name,
        "user_id": workspace.user_id or None,
        "app": workspace.app or None,
        "size_bytes": current.size_bytes if current is not None else None,
        "versions": getattr(workspace, "version_count", 0),
        "sandbox_id": writer.public_id if writer is not None else None,
        "created_at": rfc3339(workspace.created_at),
        "saved_at": rfc3339(workspace.saved_at),
    }


def workspace_get(tenant: Tenant, key: WorkspaceKey) -> Workspace:
    """Raises `NotFound` (`workspace_not_found`)."""
    found = workspaces_of(tenant).filter(name=key.name, user_id=key.user_id, app=key.app).first()
    if found is None:
        raise NotFound("There is no such workspace.", code="workspace_not_found")
    return found


def workspace_delete(workspace: Workspace) -> None:
    """With all its versions. Raises 409 `workspace_in_use` while a living sandbox has it."""
    with transaction.atomic():
        locked = Workspace.objects.select_for_update().filter(pk=workspace.pk).first()
        if locked is None:
            return
        if _writer(locked) is not None:
            raise Conflict(
                "A living sandbox has this workspace, or it is still being saved.", code="workspace_in_use"
            )
        for version in locked.versions.all():
            snapshot_delete(version)
        locked.delete()


def tenant_files_remove(tenant: Tenant) -> int:
    """Delete every workspace and snapshot of a tenant that has no living sandbox. Returns how many objects are still
    in the storage: they go in the background, and each takes its row along."""
    for workspace in Workspace.objects.filter(tenant=tenant)[:A_PASS]:
        workspace_delete(workspace)
    rows = Snapshot.objects.filter(tenant=tenant)
    for snapshot in rows.exclude(state=SnapshotState.DELETING)[:A_PASS]:
        snapshot_delete(snapshot)
    return rows.count()


def workspaces_autosave() -> int:
    """Save what was used since its last version, at most every 5 minutes: a lost host then loses little.

    Returns how many were begun.
    """
    before = now() - seconds(AUTOSAVE_SECONDS)
    rows = (
        Sandbox.objects.filter(state=SandboxState.RUNNING, workspace__isnull=False, ready_at__lt=before)
        .exclude(restore=Restore.WANTED)
        .exclude(snapshots__is_version=True, snapshots__created_at__gte=before)
        .exclude(snapshots__is_version=True, snapshots__state=SnapshotState.SAVING)
        .select_related("node", "tenant", "template")
    )
    return sum(_autosave(row) for row in rows[:A_PASS])


def _autosave(sandbox: Sandbox) -> bool:
    last = Snapshot.objects.filter(sandbox=sandbox, is_version=True).order_by("-pk").first()
    since = last.created_at if last is not None else sandbox.ready_at
    assert since is not None, "it was asked for rows that have been ready"
    try:
        stats = guest_client(sandbox, timeout_seconds=_STATS_SECONDS).stats()
    except E2AError as error:
        log.info("workspace.guest_silent", sandbox=sandbox.public_id, error=error.detail)
        return False
    if not stats.running and stats.last_activity_seconds > (now() - since).total_seconds():
        return False
    with transaction.atomic():
        version_create(sandbox)
    return True

"""Saved files of sandboxes: snapshots, and the versions of workspaces. The row is the wish; the object in the
storage is the fact."""

from __future__ import annotations

from typing import Final

from django.db import models

from accounts.models import Tenant
from e2a.core.ids import PublicIdField
from e2a.core.states import Transitions


class SnapshotState(models.TextChoices):
    SAVING = "saving"
    READY = "ready"
    FAILED = "failed"
    DELETING = "deleting", "gone for its tenant; its object goes next (internal)"


_S = SnapshotState
SNAPSHOT_TRANSITIONS: Final[Transitions] = {
    _S.READY: frozenset({_S.SAVING}),
    _S.FAILED: frozenset({_S.SAVING}),
    _S.DELETING: frozenset({_S.SAVING, _S.READY, _S.FAILED}),
}


class Workspace(models.Model):
    """Files that outlive sandboxes. At most one living sandbox has it; its end is a new version."""

    tenant = models.ForeignKey(Tenant, on_delete=models.PROTECT, related_name="workspaces")
    name = models.CharField(max_length=128)
    user_id = models.CharField(
        max_length=128, blank=True, help_text="Of the session; empty for sandboxes alone."
    )
    app = models.CharField(max_length=260, blank=True, help_text="The session's app: id, or id/set_id.")
    current = models.ForeignKey(
        "sandboxes.Snapshot", on_delete=models.SET_NULL, null=True, blank=True, related_name="+"
    )
    created_at = models.DateTimeField()
    saved_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["tenant", "user_id", "app", "name"], name="workspace_key_once")
        ]

    def __str__(self) -> str:
        return self.name


class Snapshot(models.Model):
    """The files of one sandbox at one time. Without a `workspace` the tenant asked for it by name.

    Each try to save has an object and a key of its own: `storage_key` is written before the object is, so none is
    ever without a row that names it, but for moments.
    """

    public_id = PublicIdField("snp")
    tenant = models.ForeignKey(Tenant, on_delete=models.PROTECT, related_name="snapshots")
    workspace = models.ForeignKey(
        Workspace, on_delete=models.SET_NULL, null=True, blank=True, related_name="versions"
    )
    sandbox = models.ForeignKey(
        "sandboxes.Sandbox", on_delete=models.SET_NULL, null=True, blank=True, related_name="snapshots"
    )
    sandbox_public_id = models.CharField(max_length=40)
    name = models.CharField(max_length=128, blank=True)
    template_name = models.CharField(max_length=63)
    is_version = models.BooleanField(default=False, help_text="A workspace's, not one that was asked for.")
    state = models.CharField(max_length=16, choices=SnapshotState, default=SnapshotState.SAVING)
    attempt = models.PositiveIntegerField(default=0)
    lease_until = models.DateTimeField(null=True, blank=True)
    lease_holder = models.CharField(max_length=80, blank=True, editable=False)
    storage_key = models.CharField(max_length=128, blank=True)
    sealed_key = models.BinaryField(default=b"", editable=False)
    size_bytes = models.PositiveBigIntegerField(null=True, blank=True, help_text="In the storage.")
    files = models.PositiveBigIntegerField(null=True, blank=True)
    files_bytes = models.PositiveBigIntegerField(null=True, blank=True, help_text="Of the files themselves.")
    skipped = models.PositiveIntegerField(default=0, help_text="Sockets, FIFOs and devices.")
    sha256 = models.CharField(max_length=64, blank=True, editable=False)
    error_code = models.CharField(max_length=64, blank=True)
    error_detail = models.CharField(max_length=300, blank=True)
    created_at = models.DateTimeField()
    ready_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        indexes = [
            models.Index(fields=["tenant", "is_version", "-id"], name="snapshot_tenant"),
            models.Index(fields=["state", "lease_until"], name="snapshot_lease"),
        ]

    def __str__(self) -> str:
        return self.public_id

"""The operator's view. Rows are made and moved by services only; the one action calls the same one as the
API."""

from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest

from e2a.core.admin import ReadOnlyAdmin, ReadOnlyInline
from sandboxes.models import (
    DeathReason,
    Job,
    Node,
    PreviewLink,
    Sandbox,
    SandboxLogEntry,
    SandboxMove,
    Snapshot,
    Workspace,
)
from sandboxes.services import sandbox_destroy
from sandboxes.template_admin import TemplateAdmin

__all__ = ["TemplateAdmin"]


@admin.register(Node)
class NodeAdmin(ReadOnlyAdmin):
    list_display = ("name", "engine", "engine_version", "is_engine_up", "capacity", "heartbeat_at", "notice")
    fields = (
        "name",
        "address",
        "engine",
        "engine_version",
        "is_engine_up",
        "detail",
        "notice",
        "soft_limits",
        "runtimes",
        "images",
        "capacity",
        "pool",
        "heartbeat_at",
    )
    readonly_fields = fields
    search_fields = ("name",)


class SandboxMoveInline(ReadOnlyInline):
    model = SandboxMove
    fields = ("at", "from_state", "to_state", "why")
    readonly_fields = fields


@admin.register(Sandbox)
class SandboxAdmin(ReadOnlyAdmin):
    list_display = (
        "public_id",
        "state",
        "tenant",
        "template",
        "node",
        "is_warm",
        "created_at",
        "death_reason",
    )
    list_filter = ("state", "template", "node", "death_reason", "is_warm", "pool_miss")
    list_select_related = ("tenant", "template", "node")
    search_fields = ("public_id", "owner", "tenant__public_id", "tenant__name")
    fields = (
        "public_id",
        "tenant",
        "owner",
        "state",
        "template",
        "node",
        "slot",
        "generation",
        "container_id",
        "image_id",
        "is_warm",
        "pool_miss",
        "idle_timeout_seconds",
        "max_lifetime_seconds",
        "metadata",
        "created_at",
        "claimed_at",
        "ready_at",
        "last_active_at",
        "frozen_at",
        "expires_at",
        "snapshot",
        "restore",
        "workspace",
        "save_until",
        "lease_until",
        "lease_holder",
        "destroyed_at",
        "death_reason",
        "death_detail",
        "evidence",
    )
    readonly_fields = fields
    inlines = (SandboxMoveInline,)
    actions = ("destroy_selected",)

    @admin.display(description="evidence")
    def evidence(self, sandbox: Sandbox) -> dict[str, Any]:
        """What it printed is the tenant's, and not shown."""
        return {name: value for name, value in sandbox.death.items() if name != "last_output"}

    @admin.action(description="Destroy the selected sandboxes", permissions=["destroy"])
    def destroy_selected(self, request: HttpRequest, queryset: QuerySet[Sandbox]) -> None:
        ended = sum(
            sandbox_destroy(sandbox=sandbox, reason=DeathReason.ADMIN)
            for sandbox in queryset.select_related("node")
        )
        self.message_user(request, f"{ended} of {len(queryset)} are being destroyed.", messages.SUCCESS)

    def has_destroy_permission(self, request: HttpRequest) -> bool:
        """Django's own right to delete rows of this model; the row itself stays."""
        return request.user.has_perm("sandboxes.delete_sandbox")


@admin.register(SandboxMove)
class SandboxMoveAdmin(ReadOnlyAdmin):
    list_display = ("at", "sandbox", "from_state", "to_state", "why")
    list_select_related = ("sandbox",)
    search_fields = ("sandbox__public_id",)
    fields = ("sandbox", "at", "from_state", "to_state", "why")
    readonly_fields = fields


@admin.register(SandboxLogEntry)
class SandboxLogEntryAdmin(ReadOnlyAdmin):
    """When and how commands ended. What they were and printed is the tenant's, and not shown."""

    list_display = ("at", "sandbox", "process_id", "exit_code")
    list_select_related = ("sandbox",)
    search_fields = ("sandbox__public_id", "process_id")
    fields = ("sandbox", "at", "process_id", "exit_code")
    readonly_fields = fields


@admin.register(Job)
class JobAdmin(ReadOnlyAdmin):
    """When and how background processes ended. What they were is the tenant's, and not shown."""

    list_display = ("created_at", "public_id", "sandbox", "state", "exit_code")
    list_select_related = ("sandbox",)
    list_filter = ("state",)
    search_fields = ("public_id", "sandbox__public_id")
    fields = (
        "public_id",
        "sandbox",
        "state",
        "created_at",
        "ended_at",
        "exit_code",
        "signal",
        "timed_out",
        "oom",
        "reason",
    )
    readonly_fields = fields


@admin.register(PreviewLink)
class PreviewLinkAdmin(ReadOnlyAdmin):
    """Who shared which port, and until when. The link itself is not kept."""

    list_display = ("created_at", "public_id", "sandbox", "port", "made_by", "expires_at", "revoked_at")
    list_select_related = ("sandbox",)
    search_fields = ("public_id", "sandbox__public_id", "made_by")
    fields = ("public_id", "sandbox", "port", "made_by", "created_at", "expires_at", "revoked_at")
    readonly_fields = fields


@admin.register(Snapshot)
class SnapshotAdmin(ReadOnlyAdmin):
    """How much was saved, and when. What is in it is the tenant's, and encrypted."""

    list_display = ("created_at", "public_id", "tenant", "state", "size_bytes", "is_version", "error_code")
    list_select_related = ("tenant",)
    list_filter = ("state", "is_version")
    search_fields = ("public_id", "sandbox_public_id", "tenant__public_id", "tenant__name")
    fields = (
        "public_id",
        "tenant",
        "name",
        "sandbox_public_id",
        "template_name",
        "workspace",
        "is_version",
        "state",
        "attempt",
        "lease_until",
        "storage_key",
        "size_bytes",
        "files",
        "files_bytes",
        "skipped",
        "error_code",
        "error_detail",
        "created_at",
        "ready_at",
    )
    readonly_fields = fields


@admin.register(Workspace)
class WorkspaceAdmin(ReadOnlyAdmin):
    list_display = ("name", "tenant", "user_id", "app", "saved_at")
    list_select_related = ("tenant",)
    search_fields = ("name", "user_id", "tenant__public_id", "tenant__name")
    fields = ("tenant", "name", "user_id", "app", "current", "created_at", "saved_at")
    readonly_fields = fields

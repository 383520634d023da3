"""What every admin page of ours is built on, and the pages of core's own tables."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.http import HttpRequest
from unfold.admin import ModelAdmin, TabularInline

from e2a.core.models import AuditEvent, IdempotencyRecord


class LookOnly:
    """Rows that are looked at, never made, changed or removed by hand: services write them."""

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


class ReadOnlyAdmin(LookOnly, ModelAdmin):
    """A model's pages, to look at. `actions` still may call services."""


class ReadOnlyInline(LookOnly, TabularInline):
    extra = 0


@admin.register(AuditEvent)
class AuditEventAdmin(ReadOnlyAdmin):
    list_display = ("created_at", "action", "actor", "target", "address")
    search_fields = ("action", "actor", "target", "address")
    list_filter = ("action",)
    ordering = ("-id",)
    show_full_result_count = False
    fields = ("created_at", "action", "actor", "tenant_id", "target", "address", "user_agent", "detail")


@admin.register(IdempotencyRecord)
class IdempotencyRecordAdmin(ReadOnlyAdmin):
    """That a request was answered, and when. Its digests and the stored answer are not shown."""

    list_display = ("scope", "tenant_id", "status", "is_sealed", "created_at")
    search_fields = ("scope",)
    ordering = ("-id",)
    fields = ("scope", "tenant_id", "status", "is_sealed", "created_at")

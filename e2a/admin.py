"""Admin pages of what other packages brought: groups, second factors, Django's own history."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.contrib.admin.models import LogEntry
from django.contrib.auth.admin import GroupAdmin as DjangoGroupAdmin
from django.contrib.auth.models import Group
from django.http import HttpRequest
from django_otp.plugins.otp_totp.models import TOTPDevice
from unfold.admin import ModelAdmin

from e2a.core.admin import ReadOnlyAdmin

admin.site.unregister(Group)
admin.site.unregister(TOTPDevice)  # Its own pages show the key, and a picture of it.


@admin.register(Group)
class GroupAdmin(DjangoGroupAdmin, ModelAdmin):
    """What operators may do. A change is in the audit trail as `admin.act`, its fields in Django's history."""


@admin.register(TOTPDevice)
class TOTPDeviceAdmin(ReadOnlyAdmin):
    """Who has a second factor. A lost one is deleted here; `manage.py admin_totp` makes a new one."""

    list_display = ("user", "name", "confirmed", "created_at", "last_used_at")
    list_select_related = ("user",)
    search_fields = ("user__email", "user__public_id")
    fields = ("user", "name", "confirmed", "created_at", "last_used_at", "throttling_failure_count")

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return ModelAdmin.has_delete_permission(self, request, obj)  # type: ignore[no-any-return]


@admin.register(LogEntry)
class LogEntryAdmin(ReadOnlyAdmin):
    list_display = ("action_time", "user", "content_type", "object_repr", "action_flag")
    list_select_related = ("user", "content_type")
    list_filter = ("action_flag",)
    search_fields = ("object_repr", "user__email")
    ordering = ("-id",)
    fields = (
        "action_time",
        "user",
        "content_type",
        "object_id",
        "object_repr",
        "action_flag",
        "change_message",
    )

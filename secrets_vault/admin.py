"""The operator's view: who has which bundles and keys, metadata only. Nothing can be changed or read from
here.
"""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.http import HttpRequest
from unfold.admin import ModelAdmin, TabularInline

from secrets_vault.models import Bundle, BundleUse, BundleVersion, DataKey
from secrets_vault.selectors import value_states, version_states


class _ReadOnly:
    """Values are written by their tenants only; removing a data key would shred a tenant."""

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


class BundleVersionInline(_ReadOnly, TabularInline):
    model = BundleVersion
    fields = ("version", "names", "created_by", "created_at")
    readonly_fields = fields
    extra = 0

    @admin.display(description="names")
    def names(self, version: BundleVersion) -> str:
        return ", ".join(version_states([version])[0].keys)


class BundleUseInline(_ReadOnly, TabularInline):
    model = BundleUse
    fields = ("holder", "position", "created_at")
    readonly_fields = fields
    extra = 0


@admin.register(Bundle)
class BundleAdmin(_ReadOnly, ModelAdmin):
    list_display = ("name", "tenant", "version", "is_inline", "created_at", "updated_at")
    list_filter = ("is_inline",)
    list_select_related = ("tenant",)
    search_fields = ("name", "public_id", "tenant__name", "tenant__public_id")
    fields = ("public_id", "tenant", "name", "version", "names", "is_inline", "created_at", "updated_at")
    readonly_fields = fields
    inlines = (BundleVersionInline, BundleUseInline)

    @admin.display(description="names")
    def names(self, bundle: Bundle) -> str:
        return ", ".join(state.name for state in value_states(bundle))


@admin.register(DataKey)
class DataKeyAdmin(_ReadOnly, ModelAdmin):
    list_display = ("tenant", "wrapping_key_id", "created_at", "rewrapped_at")
    list_filter = ("wrapping_key_id",)
    list_select_related = ("tenant",)
    fields = ("tenant", "wrapping_key_id", "created_at", "rewrapped_at")
    readonly_fields = fields

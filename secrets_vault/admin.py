"""The operator's view: who has which bundles and keys, metadata only. Nothing can be changed or read from
here.
"""

from __future__ import annotations

from django.contrib import admin

from e2a.core.admin import ReadOnlyAdmin, ReadOnlyInline
from secrets_vault.models import Bundle, BundleUse, BundleVersion, DataKey, SecretValue
from secrets_vault.selectors import value_states, version_states


class BundleVersionInline(ReadOnlyInline):
    model = BundleVersion
    fields = ("version", "names", "created_by", "created_at")
    readonly_fields = fields

    @admin.display(description="names")
    def names(self, version: BundleVersion) -> str:
        return ", ".join(version_states([version])[0].keys)


class BundleUseInline(ReadOnlyInline):
    model = BundleUse
    fields = ("holder", "position", "created_at")
    readonly_fields = fields


@admin.register(Bundle)
class BundleAdmin(ReadOnlyAdmin):
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
class DataKeyAdmin(ReadOnlyAdmin):
    list_display = ("tenant", "wrapping_key_id", "created_at", "rewrapped_at")
    list_filter = ("wrapping_key_id",)
    list_select_related = ("tenant",)
    fields = ("tenant", "wrapping_key_id", "created_at", "rewrapped_at")
    readonly_fields = fields


@admin.register(BundleVersion)
class BundleVersionAdmin(ReadOnlyAdmin):
    list_display = ("bundle", "version", "created_by", "created_at")
    list_select_related = ("bundle",)
    search_fields = ("bundle__name", "bundle__public_id")
    fields = ("bundle", "version", "created_by", "created_at")
    readonly_fields = fields


@admin.register(SecretValue)
class SecretValueAdmin(ReadOnlyAdmin):
    """That a value is there, and how long it is."""

    list_display = ("name", "bundle_version", "size")
    list_select_related = ("bundle_version__bundle",)
    search_fields = ("name", "bundle_version__bundle__public_id")
    fields = ("name", "bundle_version", "size", "inject")
    readonly_fields = fields


@admin.register(BundleUse)
class BundleUseAdmin(ReadOnlyAdmin):
    list_display = ("holder", "bundle", "position", "created_at")
    list_select_related = ("bundle",)
    search_fields = ("holder", "bundle__public_id")
    fields = ("holder", "bundle", "position", "created_at")
    readonly_fields = fields

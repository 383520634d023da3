"""What operators see of API keys: never the digest, never a way to search by it."""

from __future__ import annotations

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest

from accounts.audit import caller_of
from accounts.models import User
from e2a.core.admin import ReadOnlyAdmin
from keys import services
from keys.models import ApiKey


@admin.register(ApiKey)
class ApiKeyAdmin(ReadOnlyAdmin):
    list_display = ("prefix", "last_four", "name", "user", "tenant", "state", "last_used_at", "created_at")
    search_fields = ("public_id", "prefix", "name", "user__email", "tenant__public_id")
    list_select_related = ("user", "tenant")
    fields = (
        "public_id", "prefix", "last_four", "name", "user", "tenant", "scopes", "state", "created_at",
        "last_used_at",
        "last_used_address", "expires_at", "revoked_at",
    )  # fmt: skip
    actions = ("revoke",)

    def has_revoke_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("keys.change_apikey"))

    @admin.action(description="Revoke: refuse the key from now on", permissions=["revoke"])
    def revoke(self, request: HttpRequest, queryset: QuerySet[ApiKey]) -> None:
        assert isinstance(request.user, User)
        for key in queryset:
            services.key_revoke(key=key, actor=request.user, caller=caller_of(request))

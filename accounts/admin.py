"""What operators see of accounts. No digest or nonce is shown or searchable; changes go through services."""

from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.db.models import Model, QuerySet
from django.http import HttpRequest
from unfold.admin import ModelAdmin

from accounts import services
from accounts.audit import audit_write, caller_of
from accounts.models import LoginFlow, MailboxState, RefreshToken, SignIn, Tenant, User
from e2a.core.admin import ReadOnlyAdmin
from e2a.core.errors import Conflict


def operator(request: HttpRequest) -> str:
    """The public id of the signed-in operator, for the audit trail."""
    return str(getattr(request.user, "public_id", ""))


class AuditedAdmin(ModelAdmin):
    """Changes of a row by hand are in the audit trail with before and after, beside Django's own history."""

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        super().save_model(request, obj, form, change)
        changes = [
            (name, str(form.initial.get(name)), str(form.cleaned_data[name])) for name in form.changed_data
        ]
        audit_write(
            f"{obj._meta.model_name}.{'changed' if change else 'added'}",
            actor=operator(request),
            tenant_id=obj.pk if isinstance(obj, Tenant) else None,
            target=str(getattr(obj, "public_id", obj))[:64],
            caller=caller_of(request),
            fields={name: [before, after] for name, before, after in changes if before != after},
        )


@admin.register(Tenant)
class TenantAdmin(AuditedAdmin):
    list_display = ("name", "public_id", "plan_tier", "max_live_sandboxes", "suspended_at", "created_at")
    search_fields = ("name", "public_id")
    readonly_fields = ("public_id", "suspended_at", "erase_asked_at", "created_at")
    actions = ("suspend", "resume", "erase")

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    @admin.action(description="Suspend: refuse its people and keys", permissions=["change"])
    def suspend(self, request: HttpRequest, queryset: QuerySet[Tenant]) -> None:
        for tenant in queryset:
            services.tenant_suspend(tenant=tenant, actor=operator(request), caller=caller_of(request))

    @admin.action(description="Resume: let it in again", permissions=["change"])
    def resume(self, request: HttpRequest, queryset: QuerySet[Tenant]) -> None:
        for tenant in queryset:
            services.tenant_resume(tenant=tenant, actor=operator(request), caller=caller_of(request))

    @admin.action(description="Erase for good: only what is suspended", permissions=["change"])
    def erase(self, request: HttpRequest, queryset: QuerySet[Tenant]) -> None:
        for tenant in queryset:
            try:
                services.tenant_erase(tenant=tenant, actor=operator(request), caller=caller_of(request))
            except Conflict as refused:
                self.message_user(request, f"{tenant}: {refused.detail}", messages.ERROR)


@admin.register(User)
class UserAdmin(ReadOnlyAdmin):
    list_display = ("email", "public_id", "tenant", "is_active", "is_staff", "last_login", "created_at")
    search_fields = ("email", "public_id", "tenant__name", "tenant__public_id")
    list_filter = ("is_active", "is_staff")
    list_select_related = ("tenant",)
    fields = (
        "email",
        "public_id",
        "tenant",
        "is_active",
        "is_staff",
        "is_superuser",
        "last_login",
        "created_at",
    )
    actions = ("disable", "enable")

    def has_disable_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("accounts.change_user"))

    @admin.action(description="Disable: refuse every token, cookie and key", permissions=["disable"])
    def disable(self, request: HttpRequest, queryset: QuerySet[User]) -> None:
        for user in queryset:
            services.user_disable(user=user, actor=operator(request), caller=caller_of(request))

    @admin.action(description="Enable: may sign in again", permissions=["disable"])
    def enable(self, request: HttpRequest, queryset: QuerySet[User]) -> None:
        for user in queryset:
            services.user_enable(user=user, actor=operator(request), caller=caller_of(request))


@admin.register(LoginFlow)
class LoginFlowAdmin(ReadOnlyAdmin):
    list_display = ("email", "created_at", "failures", "closed_at", "close_reason", "mailed_at", "source")
    search_fields = ("email", "login_id")
    fields = (
        "email", "login_id", "is_long", "failures", "source", "is_known_browser", "created_at", "expires_at",
        "closed_at", "close_reason", "mail_claimed_at", "mailed_at",
    )  # fmt: skip


@admin.register(SignIn)
class SignInAdmin(ReadOnlyAdmin):
    list_display = ("user", "created_at", "source", "user_agent", "ended_at", "end_reason")
    search_fields = ("user__email", "user__public_id")
    list_select_related = ("user",)
    fields = ("user", "created_at", "source", "user_agent", "ended_at", "end_reason")


@admin.register(RefreshToken)
class RefreshTokenAdmin(ReadOnlyAdmin):
    list_display = ("sign_in", "created_at", "spent_at", "expires_at")
    search_fields = ("sign_in__user__email", "sign_in__user__public_id")
    list_select_related = ("sign_in__user",)
    fields = ("sign_in", "created_at", "spent_at", "expires_at")


@admin.register(MailboxState)
class MailboxStateAdmin(ReadOnlyAdmin):
    list_display = ("email_key", "failures_in_a_row")
    search_fields = ("email_key",)
    fields = ("email_key", "failures_in_a_row")

"""Sessions for operators. Ending one calls the same service as the API's DELETE."""

from __future__ import annotations

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest

from e2a.core.admin import ReadOnlyAdmin
from sandboxes.models import DeathReason
from sessions_app.models import Event, ModelCall, Session, Task
from sessions_app.services import session_end


@admin.register(Session)
class SessionAdmin(ReadOnlyAdmin):
    list_display = (
        "public_id",
        "tenant",
        "agent_kind",
        "status",
        "end_reason",
        "user_id",
        "created_at",
        "last_seq",
    )
    list_filter = ("status", "agent_kind", "end_reason")
    search_fields = ("public_id", "user_id", "tenant__name", "sandbox__public_id")
    list_select_related = ("tenant",)
    actions = ("end_selected",)
    ordering = ("-id",)

    @admin.action(description="End (and destroy the sandbox)", permissions=["end"])
    def end_selected(self, request: HttpRequest, queryset: QuerySet[Session]) -> None:
        ended = sum(
            session_end(session=session, reason=DeathReason.ADMIN, detail="ended by an operator")
            for session in queryset
        )
        self.message_user(request, f"{ended} ended.", messages.SUCCESS)

    def has_end_permission(self, request: HttpRequest) -> bool:
        """Django's own right to delete rows of this model; the row itself stays."""
        return request.user.has_perm("sessions_app.delete_session")


@admin.register(Task)
class TaskAdmin(ReadOnlyAdmin):
    list_display = ("public_id", "session", "state", "attempt", "exit_code", "created_at", "ended_at")
    list_filter = ("state",)
    search_fields = ("public_id", "session__public_id")
    list_select_related = ("session",)
    ordering = ("-id",)


@admin.register(ModelCall)
class ModelCallAdmin(ReadOnlyAdmin):
    """The ledger: what each model call cost whom."""

    list_display = (
        "tenant",
        "session",
        "sandbox_id",
        "model",
        "input_tokens",
        "output_tokens",
        "cost_usd",
        "is_whole",
        "ended_at",
    )
    list_filter = ("vendor", "is_whole")
    search_fields = ("=sandbox_id", "=session__public_id", "model")
    list_select_related = ("tenant", "session")
    ordering = ("-id",)


@admin.register(Event)
class EventAdmin(ReadOnlyAdmin):
    list_display = ("session", "seq", "type", "ts")
    list_filter = ("type",)
    search_fields = ("=session__public_id",)
    list_select_related = ("session",)
    exclude = ("private",)
    show_full_result_count = False
    ordering = ("-id",)

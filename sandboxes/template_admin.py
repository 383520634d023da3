"""Templates in the admin: an operator's own is added by its image's name, and usable once its trial run passed."""

from __future__ import annotations

from typing import Any, cast

from django import forms
from django.conf import settings
from django.contrib import admin, messages
from django.db import transaction
from django.db.models import QuerySet
from django.forms import ModelForm
from django.http import HttpRequest

from accounts.admin import AuditedAdmin
from e2a.core.errors import Unavailable, ValidationFailed
from sandboxes.egress.rules import EgressRules
from sandboxes.models import Template, TemplateState
from sandboxes.pool_figures import pool_figures_of
from sandboxes.selectors import nodes_usable
from sandboxes.templates import (
    CUSTOM_AGENTS,
    template_changed,
    template_nodes,
    template_problems,
    template_try_again,
    trial_ask,
)

OWN = ("name", "image", "vcpu", "memory_mib", "disk_mib", "pids", "shm_mib")
"""What an operator chooses once, when the template is added."""


class TemplateForm(ModelForm[Template]):
    """A new template of an operator's own. What it says is checked before any node looks at the image."""

    class Meta:
        model = Template
        fields = (*OWN, "description", "runtime", "egress", "is_enabled")

    def clean(self) -> dict[str, Any]:
        cleaned = cast(dict[str, Any], super().clean())
        if self.instance._state.adding and all(cleaned.get(name) is not None for name in OWN):
            for problem in template_problems(**{name: cleaned[name] for name in OWN}):
                self.add_error(problem.field, forms.ValidationError(problem.detail, code=problem.code))
        return cleaned

    def clean_egress(self) -> dict[str, list[str]]:
        """In the form that rules are kept in; every entry that is wrong is said."""
        given = self.cleaned_data.get("egress") or {}
        try:
            return EgressRules.parse(given, allow_private=settings.E2A.egress_allow_private).as_json()
        except ValidationFailed as failed:
            raise forms.ValidationError([f"{one.field}: {one.detail}" for one in failed.errors]) from None


@admin.register(Template)
class TemplateAdmin(AuditedAdmin):
    """A template can be switched off and be given a runtime and egress rules, which reach a running sandbox when it is
    next used; what else it is made of is the catalogue's, or was said when it was added."""

    form = TemplateForm
    list_display = (
        "name",
        "image",
        "vcpu",
        "memory_mib",
        "disk_mib",
        "runtime",
        "state",
        "is_enabled",
        "pool_now",
        "pool_served",
    )
    list_filter = ("state", "is_custom")
    search_fields = ("name",)
    actions = ("try_again",)
    fields = (
        "name",
        "description",
        "is_enabled",
        "state",
        "refusal",
        "usable",
        "image",
        "image_id",
        "vcpu",
        "memory_mib",
        "disk_mib",
        "pids",
        "shm_mib",
        "agents",
        "runtime",
        "egress",
        "created_at",
        "pool_now",
        "pool_served",
        "pool_missed",
    )

    @admin.display(description="Pool")
    def pool_now(self, template: Template) -> str:
        figures = pool_figures_of(template.name)
        return f"{figures.parked} of {figures.wanted} parked, {figures.coming} coming"

    @admin.display(description="Creates in 24 h")
    def pool_served(self, template: Template) -> str:
        figures = pool_figures_of(template.name)
        return f"{figures.hits} warm, {figures.missed} cold"

    @admin.display(description="Why they came cold")
    def pool_missed(self, template: Template) -> str:
        return pool_figures_of(template.name).reasons or "-"

    @admin.display(description="Usable now")
    def usable(self, template: Template) -> str:
        """Whether a sandbox could be made of it now, and if not, why."""
        if template.state != TemplateState.READY:
            return "no: its trial run has not passed"
        try:
            names = [node.name for node in template_nodes(template, nodes_usable())]
        except Unavailable as error:
            return f"no: {error.detail}"
        return f"yes, on {', '.join(names)}"

    def get_fields(self, request: HttpRequest, obj: Template | None = None) -> Any:
        return self.fields if obj is not None else (*OWN, "description", "runtime", "egress")

    def get_readonly_fields(self, request: HttpRequest, obj: Template | None = None) -> Any:
        if obj is None:
            return ()
        changeable = {"runtime", "egress"}
        if obj.state == TemplateState.READY:
            changeable.add("is_enabled")
        return tuple(name for name in self.fields if name not in changeable)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """An operator's own that was refused. What sandboxes were made of stays, for their history."""
        return (
            isinstance(obj, Template)
            and obj.is_custom
            and obj.state == TemplateState.REFUSED
            and super().has_delete_permission(request, obj)
        )

    def save_model(self, request: HttpRequest, obj: Template, form: Any, change: bool) -> None:
        with transaction.atomic():
            if not change:
                obj.is_custom, obj.is_enabled, obj.state = True, False, TemplateState.TRYING
                obj.agents = list(CUSTOM_AGENTS)
            super().save_model(request, obj, form, change)
            if not change:
                trial_ask(obj)
                self.message_user(
                    request,
                    f"{obj.name} is being tried on a node. Its page says how that ended.",
                    messages.INFO,
                )
            elif "runtime" in form.changed_data:
                template_changed(obj)

    @admin.action(description="Try again: another trial run of an own image", permissions=["change"])
    def try_again(self, request: HttpRequest, queryset: QuerySet[Template]) -> None:
        begun = sum(template_try_again(template=template) for template in queryset)
        self.message_user(request, f"{begun} of {len(queryset)} are being tried.", messages.SUCCESS)

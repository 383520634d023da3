"""The form that starts a session from the dashboard."""

from __future__ import annotations

from typing import Any

from django import forms

from accounts.models import Tenant
from sandboxes.selectors import templates_enabled
from secrets_vault.selectors import bundles_of
from sessions_app.llm import BUILT_VENDORS
from sessions_app.rules import BUILT_AGENTS

AGENT_WORDS = {
    "shell": "shell: your message is a command line",
    "deictic": "deictic: a model with bash and an editor",
}


class SessionForm(forms.Form):
    agent = forms.ChoiceField(
        label="Agent", choices=[(kind, AGENT_WORDS[kind]) for kind in sorted(BUILT_AGENTS, reverse=True)]
    )
    template = forms.ChoiceField(label="Template")
    secrets = forms.MultipleChoiceField(
        label="Secret bundles",
        required=False,
        widget=forms.CheckboxSelectMultiple,
        help_text="deictic needs one with an LLM_API_KEY. Other values become variables of the agent's commands.",
    )
    model = forms.CharField(
        label="Model",
        required=False,
        max_length=128,
        help_text="For deictic; empty takes LLM_MODEL of a bundle.",
    )
    ttl_minutes = forms.IntegerField(
        label="Lives for at most (minutes)", min_value=1, max_value=120, initial=60
    )

    def __init__(self, tenant: Tenant, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["template"] = forms.ChoiceField(
            label="Template", choices=[(t.name, t.name) for t in templates_enabled()], initial="standard"
        )
        bundles = [(bundle.name, bundle.name) for bundle in bundles_of(tenant)]
        secrets = self.fields["secrets"]
        assert isinstance(secrets, forms.MultipleChoiceField)
        secrets.choices = bundles
        if not bundles:
            del self.fields["secrets"]

    @property
    def vendor(self) -> str:
        """The only vendor that is built."""
        return next(iter(BUILT_VENDORS))

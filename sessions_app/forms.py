"""The form that starts a session from the dashboard."""

from __future__ import annotations

from typing import Any

from django import forms

from accounts.models import Tenant
from sandboxes.selectors import templates_enabled
from secrets_vault.selectors import bundles_of

AGENT_WORDS = {
    "shell": "shell: your message is a command line",
    "deictic": "deictic: a model with bash and an editor",
    "codex": "codex: OpenAI's program, with a model of OpenAI",
    "claude-code": "claude-code: Anthropic's program, with a Claude model",
}


class SessionForm(forms.Form):
    agent = forms.ChoiceField(label="Agent", choices=list(AGENT_WORDS.items()))
    template = forms.ChoiceField(label="Template")
    secrets = forms.MultipleChoiceField(
        label="Secret bundles",
        required=False,
        widget=forms.CheckboxSelectMultiple,
        help_text="All but shell need one with an LLM_API_KEY. Other values become variables of the agent's commands.",
    )
    model = forms.CharField(
        label="Model",
        required=False,
        max_length=128,
        help_text="For all but shell; empty takes LLM_MODEL of a bundle.",
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

"""The form that makes a key."""

from __future__ import annotations

import datetime as dt

from django import forms

from e2a.core.clock import now
from keys.services import SCOPES

_LIFETIMES = (("", "Never"), ("30", "In 30 days"), ("90", "In 90 days"), ("365", "In a year"))


class KeyForm(forms.Form):
    name = forms.CharField(
        label="Name",
        max_length=100,
        required=False,
        help_text="What it is for, such as the program that uses it.",
    )
    lifetime = forms.ChoiceField(label="Ends", choices=_LIFETIMES, required=False)
    scopes = forms.MultipleChoiceField(
        label="It may",
        choices=[(scope, scope) for scope in SCOPES],
        initial=list(SCOPES),
        widget=forms.CheckboxSelectMultiple,
    )

    @property
    def expires_at(self) -> dt.datetime | None:
        """The end that was chosen. Of a valid form only."""
        days = self.cleaned_data["lifetime"]
        return now() + dt.timedelta(days=int(days)) if days else None

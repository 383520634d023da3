"""The dashboard's small forms. What was typed into a value's input is never written back into a page."""

from __future__ import annotations

from typing import Any

from django import forms

from e2a.core.errors import E2AError, ValidationFailed
from secrets_vault import rules

EXTRA_ROWS = 3


class WriteOnlyInput(forms.PasswordInput):
    """Hidden while typing, never filled in again, nothing for the browser to keep."""

    def __init__(self, **attrs: Any) -> None:
        kept_out = {"autocomplete": "off", "autocapitalize": "none", "spellcheck": "false", "class": "mono"}
        super().__init__(attrs={**kept_out, **attrs}, render_value=False)


class WriteOnlyTextInput(WriteOnlyInput):
    """The same for settings, which are no secrets: readable while typing."""

    input_type = "text"


def _name_field(**kwargs: Any) -> forms.CharField:
    widget = forms.TextInput(
        attrs={"autocomplete": "off", "spellcheck": "false", "class": "mono", "placeholder": "GITHUB_TOKEN"}
    )
    return forms.CharField(label="Name", max_length=128, widget=widget, **kwargs)


def _value_field(
    label: str = "Value", widget: type[WriteOnlyInput] = WriteOnlyInput, **kwargs: Any
) -> forms.CharField:
    return forms.CharField(
        label=label, strip=False, max_length=rules.MAX_VALUE_BYTES, widget=widget(), **kwargs
    )


class FailsLikeTheApi(forms.Form):
    """Shows a service's refusal at the field that it names, else above the form."""

    def refuse(self, error: E2AError) -> None:
        shown = error.errors if isinstance(error, ValidationFailed) else ()
        for item in shown:
            self.add_error(self._field_of(item.field), item.detail)
        if not shown:
            self.add_error(None, error.detail)

    def _field_of(self, api_field: str) -> str | None:
        return api_field if api_field in self.fields else None


class BundleForm(FailsLikeTheApi):
    """A new bundle: its name, the model's values, and a few others."""

    name = forms.CharField(
        max_length=63,
        widget=forms.TextInput(
            attrs={
                "autocomplete": "off",
                "spellcheck": "false",
                "autocapitalize": "none",
                "placeholder": "default",
            }
        ),
        help_text="Lower-case letters, digits and '-'. Sessions name it in “secrets”.",
    )
    llm_api_key = _value_field(
        "LLM_API_KEY", required=False, help_text="The model key. It never enters a sandbox."
    )
    llm_base_url = _value_field(
        "LLM_BASE_URL",
        WriteOnlyTextInput,
        required=False,
        help_text="Only for another address than the vendor's own.",
    )
    llm_model = _value_field(
        "LLM_MODEL", WriteOnlyTextInput, required=False, help_text="Used when a session names no model."
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for row in range(EXTRA_ROWS):
            self.fields[f"name_{row}"] = _name_field(required=False)
            self.fields[f"value_{row}"] = _value_field(required=False)

    def rows(self) -> list[tuple[forms.BoundField, forms.BoundField]]:
        """The inputs for other names, in pairs."""
        return [(self[f"name_{row}"], self[f"value_{row}"]) for row in range(EXTRA_ROWS)]

    def clean(self) -> dict[str, Any]:
        data = super().clean() or {}
        values = {
            name: data.get(name.lower()) for name in (rules.LLM_API_KEY, rules.LLM_BASE_URL, rules.LLM_MODEL)
        }
        for row in range(EXTRA_ROWS):
            name, value = data.get(f"name_{row}"), data.get(f"value_{row}")
            if not name and not value:
                continue
            if not name or not value:
                self.add_error(f"name_{row}", "Give both a name and a value.")
            elif values.get(name):
                self.add_error(f"name_{row}", "This name is there twice.")
            else:
                values[name] = value
        data["values"] = {name: value for name, value in values.items() if value}
        return data

    def _field_of(self, api_field: str) -> str | None:
        name = api_field.removeprefix("values.").partition(".")[0]
        if name.lower() in self.fields:
            return name.lower()
        for row in range(EXTRA_ROWS):
            if self.data.get(f"name_{row}") == name:
                return f"value_{row}"
        return None


class ValueForm(FailsLikeTheApi):
    """One value to set, of a new name or of one that is there."""

    name = _name_field()
    value = _value_field()

    def _field_of(self, api_field: str) -> str | None:
        return "value" if api_field.startswith("values.") else "name"


class NameForm(forms.Form):
    name = forms.CharField(max_length=128)


class VersionForm(forms.Form):
    version = forms.IntegerField(min_value=1, max_value=2**31 - 1)

"""Forms of the sign-in pages."""

from __future__ import annotations

from django import forms

from accounts.addresses import AddressError, address_clean


class AddressForm(forms.Form):
    email = forms.CharField(
        label="Mail address",
        max_length=300,
        strip=False,
        widget=forms.EmailInput(attrs={"autocomplete": "email", "autofocus": True, "inputmode": "email"}),
    )

    def clean_email(self) -> str:
        try:
            return address_clean(self.cleaned_data["email"])
        except AddressError as error:
            raise forms.ValidationError(str(error)) from error


class CodeForm(forms.Form):
    code = forms.CharField(
        label="Code",
        max_length=64,
        widget=forms.TextInput(
            attrs={
                "autocomplete": "one-time-code",
                "autofocus": True,
                "class": "code-input",
                "spellcheck": "false",
            }
        ),
    )

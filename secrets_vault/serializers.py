"""The shapes of requests and answers. Values go in and never come out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from e2a.core.api import ClosedSerializer, StrictIntegerField
from secrets_vault import rules

NAME_SCHEMA: Final[dict[str, Any]] = {"type": "string", "pattern": f"^{rules.BUNDLE_NAME_PATTERN}$"}

_TEXT: Final[dict[str, Any]] = {
    "type": "string",
    "minLength": rules.MIN_VALUE_LENGTH,
    "maxLength": rules.MAX_VALUE_BYTES,
    "pattern": r"^[^\u0000]*[^\s\u0000][^\u0000]*$",
    "description": "At most 64 KiB in UTF-8; not blanks alone.",
    "writeOnly": True,
}
_HEADER_TEXT: Final[dict[str, Any]] = {
    **_TEXT,
    "pattern": r"^[\x20-\x7e]*[\x21-\x7e][\x20-\x7e]*$",
    "description": "For a header: printable ASCII.",
}
_LABEL: Final = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_PORT: Final = "[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"
_INJECT: Final[dict[str, Any]] = {
    "type": "object",
    "description": (
        "Kept out of the sandbox: the egress gateway adds the header to requests for these hosts. "
        "A PATCH that leaves it out keeps the rule that the value has; `null` removes it."
    ),
    "required": ["hosts", "header"],
    "additionalProperties": False,
    "properties": {
        "hosts": {
            "type": "array",
            "minItems": 1,
            "maxItems": rules.MAX_INJECT_HOSTS,
            "items": {
                "type": "string",
                "pattern": rf"^(\*\.)?({_LABEL}\.){{1,8}}[A-Za-z]{{2,24}}(:({_PORT}))?$",
                "examples": ["api.example.com", "*.example.org:443"],
            },
        },
        "header": {
            "type": "string",
            "maxLength": rules.MAX_HEADER_LENGTH,
            "pattern": f"^{rules.HEADER_PATTERN}$",
            "description": "`{value}` once; not a header of the connection itself, such as `Host`.",
            "examples": ["Authorization: Bearer {value}"],
        },
    },
}


def _value_schema(text: dict[str, Any], *, may_remove: bool, may_inject: bool = True) -> dict[str, Any]:
    def form(value: dict[str, Any], inject: dict[str, Any], *required: str) -> dict[str, Any]:
        return {
            "type": "object",
            "required": ["value", *required],
            "additionalProperties": False,
            "properties": {"value": value, "inject": inject},
        }

    forms: list[dict[str, Any]] = [text, form(text, {"type": "null"})]
    if may_inject:
        forms.append(form(_HEADER_TEXT, _INJECT, "inject"))
    if may_remove:
        forms.append({"type": "null", "description": "Removes the name."})
    return {"anyOf": forms}


def _values_schema(*, may_remove: bool) -> dict[str, Any]:
    key = {**_TEXT, "pattern": rf"^[\x21-\x7e]{{{rules.MIN_VALUE_LENGTH},}}$"}
    base_url = {
        "type": "string",
        "maxLength": 2048,
        "pattern": rf"^https://({_LABEL}\.){{1,8}}[A-Za-z]{{2,24}}(:443)?(/[a-z0-9][a-z0-9._~-]*)*/?$",
        "description": "HTTPS, port 443 and a public host; also what the operator allows besides.",
        "examples": ["https://llm.example.com/v1"],
    }
    model = {"type": "string", "pattern": f"^{rules.MODEL_PATTERN}$"}
    return {
        "type": "object",
        "description": "Name to value. `LLM_API_KEY`, `LLM_BASE_URL` and `LLM_MODEL` never enter a sandbox.",
        "writeOnly": True,
        "minProperties": 1,
        "maxProperties": rules.MAX_NAMES,
        "propertyNames": {"pattern": f"^(?!({rules.RESERVED_PATTERN})$){rules.VALUE_NAME_PATTERN}$"},
        "properties": {
            rules.LLM_API_KEY: _value_schema(key, may_remove=may_remove, may_inject=False),
            rules.LLM_BASE_URL: _value_schema(base_url, may_remove=may_remove, may_inject=False),
            rules.LLM_MODEL: _value_schema(model, may_remove=may_remove, may_inject=False),
        },
        "additionalProperties": _value_schema(_TEXT, may_remove=may_remove),
        "examples": [
            {
                "LLM_API_KEY": "your-model-key",
                "GITHUB_TOKEN": {
                    "value": "your-token",
                    "inject": {"hosts": ["api.example.com"], "header": "Authorization: Bearer {value}"},
                },
            }
        ],
    }


@extend_schema_field(_values_schema(may_remove=False))
class ValuesField(serializers.Field[dict[str, Any], Any, Any, Any]):
    """An object; what is in it is judged by `rules.values_check`, for pages and API alike."""

    default_error_messages = {"invalid": "This is an object of names and values."}

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(write_only=True, **kwargs)

    def to_internal_value(self, data: Any) -> dict[str, Any]:
        if not isinstance(data, Mapping):
            self.fail("invalid")
        return dict(data)


@extend_schema_field(NAME_SCHEMA)
class BundleNameField(serializers.Field[str, Any, Any, Any]):
    """A text, judged by `rules.bundle_name_check`."""

    default_error_messages = {"invalid": "A name is a text."}

    def to_internal_value(self, data: Any) -> str:
        if not isinstance(data, str):
            self.fail("invalid")
        return data


class BundleCreateSerializer(ClosedSerializer):
    name = BundleNameField()
    values = ValuesField()


class BundleReplaceSerializer(ClosedSerializer):
    values = ValuesField()


class BundlePatchSerializer(ClosedSerializer):
    values = ValuesField()


PATCH_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["values"],
    "additionalProperties": False,
    "properties": {"values": _values_schema(may_remove=True)},
}
"""Written out, because drf-spectacular makes every field of a PATCH optional."""


class BundleRollbackSerializer(ClosedSerializer):
    version = StrictIntegerField(min_value=1, max_value=2**31 - 1)


class BundleCreatedSerializer(serializers.Serializer[Any]):
    name = serializers.CharField()
    version = serializers.IntegerField()
    keys = serializers.ListField(child=serializers.CharField(), help_text="The names, sorted.")
    created_at = serializers.DateTimeField()
    updated_at = serializers.DateTimeField()


class BundleSerializer(BundleCreatedSerializer):
    sessions = serializers.IntegerField(help_text="How many live sessions use it.")


class BundleChangedSerializer(BundleCreatedSerializer):
    sessions_updated = serializers.IntegerField(help_text="How many live sessions see the new values.")


class BundleListSerializer(serializers.Serializer[Any]):
    secrets = BundleSerializer(many=True)
    next_cursor = serializers.CharField(allow_null=True)


class VersionSerializer(serializers.Serializer[Any]):
    version = serializers.IntegerField()
    keys = serializers.ListField(child=serializers.CharField())
    created_at = serializers.DateTimeField()
    created_by = serializers.CharField(help_text="The id of the user or API key that wrote it.")


class VersionListSerializer(serializers.Serializer[Any]):
    versions = VersionSerializer(many=True)
    next_cursor = serializers.CharField(allow_null=True)

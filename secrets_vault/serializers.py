"""The shapes of requests and answers. Values go in and never come out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from e2a.core.api import ClosedSerializer, StrictCharField, StrictIntegerField
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
_INJECT: Final[dict[str, Any]] = {
    "type": ["object", "null"],
    "description": (
        "Kept out of the sandbox: the egress gateway adds the header to requests for these hosts. "
        "A PATCH that leaves it out keeps the rule that the value has."
    ),
    "required": ["hosts", "header"],
    "additionalProperties": False,
    "properties": {
        "hosts": {
            "type": "array",
            "minItems": 1,
            "maxItems": rules.MAX_INJECT_HOSTS,
            "items": {"type": "string", "examples": ["api.example.com", "*.example.org:443"]},
        },
        "header": {
            "type": "string",
            "maxLength": rules.MAX_HEADER_LENGTH,
            "pattern": f"^{rules.HEADER_PATTERN}$",
            "examples": ["Authorization: Bearer {value}"],
        },
    },
}


def _value_schema(text: dict[str, Any], *, may_remove: bool, may_inject: bool = True) -> dict[str, Any]:
    properties = {"value": text, "inject": _INJECT if may_inject else {"type": "null"}}
    forms: list[dict[str, Any]] = [
        text,
        {"type": "object", "required": ["value"], "additionalProperties": False, "properties": properties},
    ]
    if may_remove:
        forms.append({"type": "null", "description": "Removes the name."})
    return {"anyOf": forms}


def _values_schema(*, may_remove: bool) -> dict[str, Any]:
    key = {**_TEXT, "pattern": rf"^[\x21-\x7e]{{{rules.MIN_VALUE_LENGTH},}}$"}
    base_url = {
        "type": "string",
        "maxLength": 2048,
        "pattern": "^https?://.+$",
        "description": "HTTPS and a public host.",
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


class _ValuesField(serializers.Field[dict[str, Any], Any, Any, Any]):
    """An object; what is in it is judged by `rules.values_check`, for pages and API alike."""

    default_error_messages = {"invalid": "This is an object of names and values."}

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(write_only=True, **kwargs)

    def to_internal_value(self, data: Any) -> dict[str, Any]:
        if not isinstance(data, Mapping):
            self.fail("invalid")
        return dict(data)


@extend_schema_field(_values_schema(may_remove=False))
class ValuesField(_ValuesField):
    pass


@extend_schema_field(_values_schema(may_remove=True))
class PatchedValuesField(_ValuesField):
    pass


@extend_schema_field(NAME_SCHEMA)
class BundleNameField(StrictCharField):
    """Judged by `rules.bundle_name_check`."""


class BundleCreateSerializer(ClosedSerializer):
    name = BundleNameField(allow_blank=True)
    values = ValuesField()


class BundleReplaceSerializer(ClosedSerializer):
    values = ValuesField()


class BundlePatchSerializer(ClosedSerializer):
    values = PatchedValuesField()


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

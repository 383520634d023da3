"""The shapes of requests and answers of `/v1/sandboxes` and `/v1/templates`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from django.conf import settings
from django.core.validators import RegexValidator
from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from e2a.core.api import ClosedSerializer, StrictCharField, StrictIntegerField
from sandboxes.activity import TEXTS
from sandboxes.egress.rules import MAX_RULE_CHARS, MAX_RULES, EgressRules
from sandboxes.models import SandboxState
from sandboxes.paths import LONGEST_PATH_BYTES
from sandboxes.selectors import SHOWN_STATES
from secrets_vault.rules import BUNDLE_NAME_PATTERN, LLM_NAMES, is_reserved_name

MAX_ENV_NAMES: Final = 100
MAX_ENV_BYTES: Final = 128 * 1024
MAX_ARGV: Final = 256
MAX_COMMAND_BYTES: Final = 512 * 1024

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_NUL_FREE: Final = "^[^\\u0000]*$"


def _text_map(*, most: int, key: str, value_length: int) -> dict[str, Any]:
    return {
        "type": "object",
        "maxProperties": most,
        "propertyNames": {"pattern": key},
        "additionalProperties": {"type": "string", "maxLength": value_length, "pattern": _NUL_FREE},
    }


class _TextMapField(serializers.Field[dict[str, str], Any, dict[str, str], Any]):
    """A JSON object of texts."""

    default_error_messages = {
        "not_an_object": "This is an object of texts.",
        "too_many": "At most {most} entries.",
        "not_text": "The value of {name!r} is not a text.",
        "bad_name": "{name!r} is not a good name.",
        "too_long": "The value of {name!r} is too long.",
    }

    def __init__(self, *, most: int, value_bytes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._most = most
        self._value_bytes = value_bytes

    def to_internal_value(self, data: Any) -> dict[str, str]:
        if not isinstance(data, Mapping):
            self.fail("not_an_object")
        if len(data) > self._most:
            self.fail("too_many", most=self._most)
        for name, value in data.items():
            if not self.is_name(name):
                self.fail("bad_name", name=name[:128])
            if not isinstance(value, str) or "\0" in value:
                self.fail("not_text", name=name)
            if len(value.encode()) > self._value_bytes:
                self.fail("too_long", name=name)
        return dict(data)

    def to_representation(self, value: dict[str, str]) -> dict[str, str]:
        return value

    def is_name(self, name: str) -> bool:
        return 0 < len(name) <= 64 and name.isprintable()


@extend_schema_field(_text_map(most=16, key="^.{1,64}$", value_length=512))
class MetadataField(_TextMapField):
    """At most 16 string pairs."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(most=16, value_bytes=512, **kwargs)


@extend_schema_field(_text_map(most=MAX_ENV_NAMES, key=f"^{_ENV_NAME.pattern}$", value_length=MAX_ENV_BYTES))
class EnvField(_TextMapField):
    """Environment variables. `may_reserve` False refuses the names that would change how e2a works
    (`reserved_name`)."""

    default_error_messages = {
        "reserved_name": "{name!r} is reserved.",
        "env_too_large": "The variables have at most {most} bytes in all.",
    }

    def __init__(self, *, may_reserve: bool = False, **kwargs: Any) -> None:
        super().__init__(most=MAX_ENV_NAMES, value_bytes=MAX_ENV_BYTES, **kwargs)
        self._may_reserve = may_reserve

    def to_internal_value(self, data: Any) -> dict[str, str]:
        found = super().to_internal_value(data)
        if sum(len(name) + len(value.encode()) + 2 for name, value in found.items()) > MAX_ENV_BYTES:
            self.fail("env_too_large", most=MAX_ENV_BYTES)
        for name in found:
            if not self._may_reserve and (is_reserved_name(name) or name in LLM_NAMES):
                self.fail("reserved_name", name=name)
        return found

    def is_name(self, name: str) -> bool:
        return _ENV_NAME.fullmatch(name) is not None


WORKSPACE_NAME: Final = "[A-Za-z0-9][A-Za-z0-9._-]{0,127}"


def workspace_field() -> StrictCharField:
    return StrictCharField(
        required=False,
        max_length=128,
        validators=[RegexValidator(f"^{WORKSPACE_NAME}\\Z")],
        help_text="Files that outlive the sandbox: restored when it starts, saved when it ends.",
    )


def one_source(attrs: dict[str, Any]) -> dict[str, Any]:
    """A sandbox starts with the files of a snapshot or of a workspace, not of both."""
    if "workspace" in attrs and "snapshot" in attrs:
        raise serializers.ValidationError(
            {"snapshot": "Give a snapshot or a workspace, one of them."}, code="snapshot_and_workspace"
        )
    return attrs


def _bundle_names() -> serializers.ListField:
    names = serializers.RegexField(f"^{BUNDLE_NAME_PATTERN}\\Z")
    return serializers.ListField(child=names, max_length=10, required=False)


@extend_schema_field(
    {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            name: {
                "type": "array",
                "maxItems": MAX_RULES,
                "items": {"type": "string", "maxLength": MAX_RULE_CHARS},
            }
            for name in ("allow", "deny")
        },
    }
)
class EgressField(serializers.Field[dict[str, list[str]], Any, dict[str, list[str]], Any]):
    """`{"allow": ["host", "*.host:443"], "deny": []}`: where a sandbox may connect to besides its template's."""

    def to_internal_value(self, data: Any) -> dict[str, list[str]]:
        """Raises `ValidationFailed` (`bad_egress`), which names every entry that is wrong."""
        rules = EgressRules.parse(data, allow_private=settings.E2A.egress_allow_private)
        return rules.as_json()

    def to_representation(self, value: dict[str, list[str]]) -> dict[str, list[str]]:
        return value


class EgressSerializer(ClosedSerializer):
    """`PUT …/egress`."""

    allow = serializers.ListField(
        child=StrictCharField(max_length=MAX_RULE_CHARS), max_length=MAX_RULES, default=list
    )
    deny = serializers.ListField(
        child=StrictCharField(max_length=MAX_RULE_CHARS), max_length=MAX_RULES, default=list
    )


class EgressEntrySerializer(serializers.Serializer[Any]):
    host = serializers.CharField()
    port = serializers.IntegerField()
    is_allowed = serializers.BooleanField()
    reason = serializers.CharField()
    rule = serializers.CharField()
    count = serializers.IntegerField()
    first_at = serializers.DateTimeField()
    last_at = serializers.DateTimeField()
    bytes_out = serializers.IntegerField()
    bytes_in = serializers.IntegerField()


class EgressShownSerializer(serializers.Serializer[Any]):
    allow = serializers.ListField(child=serializers.CharField(), help_text="Its own rules.")
    deny = serializers.ListField(child=serializers.CharField())
    template_allow = serializers.ListField(child=serializers.CharField())
    template_deny = serializers.ListField(child=serializers.CharField())
    entries = EgressEntrySerializer(many=True)
    is_complete = serializers.BooleanField(
        help_text="False: its gateway did not answer, so the newest are missing."
    )


class SandboxCreateSerializer(ClosedSerializer):
    """`POST /v1/sandboxes`. `sessions_app` adds what runs a task at once."""

    template = StrictCharField(default="standard", max_length=63)
    idle_timeout_seconds = StrictIntegerField(default=300, min_value=10, max_value=7200)
    max_lifetime_seconds = StrictIntegerField(default=7200, min_value=10, max_value=7200)
    env_vars = EnvField(required=False)
    secrets = _bundle_names()
    metadata = MetadataField(required=False)
    egress = EgressField(required=False)
    workspace = workspace_field()
    snapshot = StrictCharField(required=False, max_length=64, help_text="A snapshot to start from.")

    def validate_secrets(self, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise serializers.ValidationError("A bundle is named twice.", code="duplicate")
        return value

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        return one_source(attrs)


class ExecSerializer(ClosedSerializer):
    """`command` for a shell, or `argv` as it is: exactly one of them."""

    command = StrictCharField(required=False, max_length=MAX_COMMAND_BYTES)
    argv = serializers.ListField(
        child=StrictCharField(allow_blank=True, max_length=128 * 1024),
        min_length=1,
        max_length=MAX_ARGV,
        required=False,
    )
    cwd = StrictCharField(required=False, max_length=LONGEST_PATH_BYTES)
    env = EnvField(required=False, may_reserve=True)
    stdin = StrictCharField(required=False, allow_blank=True, max_length=1024 * 1024)
    timeout_seconds = StrictIntegerField(default=60, min_value=1, max_value=3600)

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        if ("command" in attrs) == ("argv" in attrs):
            raise serializers.ValidationError(
                {"command": "Give command or argv, one of them."}, code="command_or_argv"
            )
        if "argv" in attrs and not attrs["argv"][0]:
            raise serializers.ValidationError(
                {"argv": "The program's name is empty."}, code="command_or_argv"
            )
        return attrs


class ExtendSerializer(ClosedSerializer):
    seconds = StrictIntegerField(min_value=1, max_value=7200)


class MoveSerializer(ClosedSerializer):
    to = StrictCharField(max_length=LONGEST_PATH_BYTES)

    def get_fields(self) -> dict[str, Any]:
        # `from` is a word of Python, so it cannot be an attribute.
        return {"from": StrictCharField(max_length=LONGEST_PATH_BYTES), **super().get_fields()}


class MkdirSerializer(ClosedSerializer):
    path = StrictCharField(max_length=LONGEST_PATH_BYTES)


# Answers: for the schema only, the views write plain dicts.


class SandboxSerializer(serializers.Serializer[Any]):
    vm_id = serializers.CharField(help_text="The same as sandbox_id.")
    sandbox_id = serializers.CharField()
    state = serializers.ChoiceField(choices=sorted(SHOWN_STATES))
    template = serializers.CharField()
    vcpu = serializers.FloatField()
    cpu_fraction = serializers.FloatField(help_text="Of one CPU.")
    memory_mib = serializers.IntegerField()
    created_at = serializers.DateTimeField()
    expires_at = serializers.DateTimeField(allow_null=True)
    metadata = serializers.DictField(child=serializers.CharField())


class DeathSerializer(serializers.Serializer[Any]):
    reason = serializers.CharField()
    detail = serializers.CharField()
    exit_code = serializers.IntegerField(allow_null=True)
    oom = serializers.BooleanField(help_text="Memory ended all of it, not a command of it.")
    oom_kills = serializers.IntegerField(
        allow_null=True, help_text="Processes that the kernel killed for memory in its life. null: not known."
    )
    memory_peak_mib = serializers.IntegerField(
        allow_null=True, help_text="The kernel's own, with the file cache. null: not known."
    )
    memory_curve = serializers.ListField(
        child=serializers.ListField(child=serializers.FloatField(), min_length=2, max_length=2),
        help_text="At most 121 pairs: seconds since created_at, and MiB in use, without the file cache.",
    )
    last_output = serializers.CharField(help_text="What was printed last in it, at most 64 KiB, redacted.")


class SandboxDetailSerializer(SandboxSerializer):
    disk_mib = serializers.IntegerField()
    idle_timeout_seconds = serializers.IntegerField()
    max_lifetime_seconds = serializers.IntegerField()
    last_active_at = serializers.DateTimeField(allow_null=True)
    ready_at = serializers.DateTimeField(allow_null=True)
    destroyed_at = serializers.DateTimeField(allow_null=True)
    workspace = serializers.CharField(allow_null=True)
    snapshot_id = serializers.CharField(allow_null=True, help_text="The snapshot that it was started from.")
    queue_position = serializers.IntegerField(allow_null=True)
    alive_because = serializers.ChoiceField(
        choices=list(TEXTS),
        allow_null=True,
        help_text="Why it is not ended for idleness; null once it is over.",
    )
    alive_detail = serializers.CharField(allow_null=True, help_text="The same for a person.")
    alive_since = serializers.DateTimeField(allow_null=True)
    ends_at = serializers.DateTimeField(
        allow_null=True, help_text="When it ends if nothing more happens; at the latest at `expires_at`."
    )
    death = DeathSerializer(allow_null=True)


class DestroyedSerializer(serializers.Serializer[Any]):
    vm_id = serializers.CharField()
    status = serializers.ChoiceField(choices=[SandboxState.DESTROYED.value])


class CompletedSerializer(serializers.Serializer[Any]):
    exit_code = serializers.IntegerField(allow_null=True, help_text="124: timed out. null: unknown, never 0.")
    stdout = serializers.CharField()
    stderr = serializers.CharField()
    duration_ms = serializers.IntegerField()
    truncated = serializers.BooleanField(help_text="There was more than 1 MiB of one of them.")
    oom = serializers.BooleanField(help_text="The kernel killed it, or a part of it, for memory.")


class FileWrittenSerializer(serializers.Serializer[Any]):
    path = serializers.CharField()
    size = serializers.IntegerField()


class ArchiveWrittenSerializer(serializers.Serializer[Any]):
    path = serializers.CharField()
    files = serializers.IntegerField()
    size = serializers.IntegerField(help_text="Bytes of these files.")


class FileSerializer(serializers.Serializer[Any]):
    name = serializers.CharField(help_text="With U+FFFD for bytes that are not UTF-8.")
    name_base64 = serializers.CharField(allow_null=True, help_text="Its bytes, when it is not UTF-8.")
    path = serializers.CharField()
    type = serializers.ChoiceField(choices=["file", "directory", "symlink", "other"])
    size = serializers.IntegerField()
    mode = serializers.CharField(help_text="Octal, such as 0644.")
    modified_at = serializers.DateTimeField()


class FileStatSerializer(FileSerializer):
    target = serializers.CharField(allow_null=True, help_text="Of a symlink, where it leads.")


class FileListSerializer(serializers.Serializer[Any]):
    path = serializers.CharField()
    entries = FileSerializer(many=True)
    next_cursor = serializers.CharField(allow_null=True, help_text="Of the next 10,000, null at the end.")


class TokenSerializer(serializers.Serializer[Any]):
    token = serializers.CharField()
    expires_at = serializers.DateTimeField()


class PathSerializer(serializers.Serializer[Any]):
    path = serializers.CharField()


class DeletedSerializer(PathSerializer):
    deleted = serializers.BooleanField()


class LogEntrySerializer(serializers.Serializer[Any]):
    id = serializers.IntegerField()
    at = serializers.DateTimeField()
    process_id = serializers.CharField()
    command = serializers.CharField()
    exit_code = serializers.IntegerField(allow_null=True)
    output = serializers.CharField()


class LogSerializer(serializers.Serializer[Any]):
    entries = LogEntrySerializer(many=True)
    next_after = serializers.IntegerField()


class TemplateSerializer(serializers.Serializer[Any]):
    name = serializers.CharField()
    description = serializers.CharField()
    vcpu = serializers.FloatField()
    memory_mib = serializers.IntegerField()
    disk_mib = serializers.IntegerField()
    agents = serializers.ListField(child=serializers.CharField())
    available = serializers.BooleanField(help_text="Whether a living node has its image and runtime.")
    soft_limits = serializers.ListField(
        child=serializers.CharField(), help_text="Limits that do not hold here."
    )


class TemplateListSerializer(serializers.Serializer[Any]):
    templates = TemplateSerializer(many=True)
    next_cursor = serializers.CharField(allow_null=True)

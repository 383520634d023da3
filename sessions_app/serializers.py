"""Bodies of `/v1/sessions…`, in both directions: what is refused here is refused with a field's name."""

from __future__ import annotations

import posixpath
from typing import Any, ClassVar, Final

from rest_framework import serializers
from rest_framework.fields import empty

from e2a.core.api import ClosedSerializer, StrictCharField, StrictIntegerField
from e2a.core.errors import NotBuilt
from sandboxes.activity import TEXTS
from sandboxes.serializers import EgressField, one_source, workspace_field
from sessions_app.rules import AGENT_KINDS, MODEL, VENDORS

_LATER_AGENT = ("tools", "mcp_servers")
_TAKEN_BY: Final = {
    "system": ("deictic",),
    "max_turns": ("deictic", "claude-code"),
    "cwd": ("claude-code", "codex", "shell"),
}
"""Fields that only some agents have."""
_WORKSPACE: Final = "/workspace"


class AgentBody(ClosedSerializer):
    kind = StrictCharField()
    system = StrictCharField(max_length=32 * 1024, required=False)
    max_turns = StrictIntegerField(min_value=1, max_value=1000, required=False)
    cwd = StrictCharField(
        max_length=1024, required=False, help_text="Where it works, at or below /workspace. It is made."
    )
    approvals = serializers.JSONField(required=False)
    tools = serializers.JSONField(required=False)
    mcp_servers = serializers.JSONField(required=False)

    def validate_kind(self, value: str) -> str:
        if value not in AGENT_KINDS:
            raise serializers.ValidationError(f"One of {', '.join(AGENT_KINDS)}.", code="unknown_agent")
        return value

    def validate_cwd(self, value: str) -> str:
        if "\0" in value or ".." in value.split("/"):
            raise serializers.ValidationError("This is not a folder below /workspace.", code="invalid_cwd")
        folder = posixpath.normpath(posixpath.join(_WORKSPACE, value))
        if folder != _WORKSPACE and not folder.startswith(f"{_WORKSPACE}/"):
            raise serializers.ValidationError("This is not a folder below /workspace.", code="invalid_cwd")
        return folder

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        for name in _LATER_AGENT:
            if attrs.get(name):
                raise NotBuilt(f"agent.{name} is not built yet.", code="not_built")
        if attrs.get("approvals", "never") != "never":
            raise NotBuilt("agent.approvals other than `never` are not built yet.", code="not_built")
        misplaced = {
            name: f"Only for {', '.join(kinds)}."
            for name, kinds in _TAKEN_BY.items()
            if name in attrs and attrs["kind"] not in kinds
        }
        if misplaced:
            raise serializers.ValidationError(misplaced, code="not_allowed")
        return attrs


class ModelField(StrictCharField):
    """A model's name. Whatever is wrong with it is `invalid_model`."""

    default_error_messages: ClassVar[Any] = {"invalid_model": "This is not the form of a model name."}

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_blank=True, **kwargs)

    def to_internal_value(self, data: Any) -> str:
        if isinstance(data, str) and not MODEL.match(data):
            self.fail("invalid_model")
        return super().to_internal_value(data)

    def run_validation(self, data: Any = empty) -> Any:
        if data == "":
            self.fail("invalid_model")
        return super().run_validation(data)


class NumberField(serializers.FloatField):
    """JSON numbers only: DRF's own takes `"5"` and `true`."""

    def to_internal_value(self, data: Any) -> float:
        if isinstance(data, bool) or not isinstance(data, int | float):
            self.fail("invalid")
        return super().to_internal_value(data)


class LLMBody(ClosedSerializer):
    vendor = serializers.ChoiceField(choices=VENDORS)
    model = ModelField(required=False)
    base_url = StrictCharField(
        max_length=2048, required=False, error_messages={"max_length": "This URL is too long."}
    )


class BudgetBody(ClosedSerializer):
    max_usd = NumberField(min_value=0, max_value=1_000_000, required=False)
    max_tokens = StrictIntegerField(min_value=0, max_value=10**12, required=False)


class AppBody(ClosedSerializer):
    id = StrictCharField(max_length=128)
    set_id = StrictCharField(max_length=128, required=False)
    capability_sets = serializers.ListField(
        child=StrictCharField(max_length=128), max_length=64, required=False
    )


class MetadataField(serializers.DictField):
    """At most 16 pairs of text."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(child=StrictCharField(max_length=1024, allow_blank=True), **kwargs)

    def to_internal_value(self, data: Any) -> Any:
        if isinstance(data, dict) and (len(data) > 16 or any(not 1 <= len(key) <= 64 for key in data)):
            raise serializers.ValidationError(
                "At most 16 pairs, names of 1 to 64 characters.", code="too_many"
            )
        if isinstance(data, dict) and any("\0" in key for key in data):
            raise serializers.ValidationError("A name holds a null character.", code="invalid_name")
        return super().to_internal_value(data)


class SessionCreateBody(ClosedSerializer):
    agent = AgentBody()
    user_id = StrictCharField(min_length=1, max_length=128)
    template = StrictCharField(required=False, default="standard")
    llm = LLMBody(required=False)
    secrets = serializers.ListField(
        child=StrictCharField(max_length=63), max_length=10, required=False, default=list
    )
    ttl_seconds = StrictIntegerField(min_value=60, max_value=7200, required=False, default=3600)
    idle_timeout_seconds = StrictIntegerField(min_value=10, max_value=7200, required=False, default=900)
    budget = BudgetBody(required=False)
    metadata = MetadataField(required=False, default=dict)
    app = AppBody(required=False)
    egress = EgressField(required=False)
    workspace = workspace_field()
    snapshot = StrictCharField(max_length=64, required=False)

    def validate_secrets(self, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise serializers.ValidationError("A bundle is named twice.", code="duplicate")
        return value

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        return one_source(attrs)


class SessionPatchBody(ClosedSerializer):
    budget = BudgetBody(required=False, allow_null=True)
    ttl_seconds = StrictIntegerField(min_value=60, max_value=7200, required=False)
    metadata = MetadataField(required=False)
    egress = EgressField(required=False)


class TaskSubmitBody(ClosedSerializer):
    prompt = StrictCharField(allow_blank=True)
    id = StrictCharField(min_length=1, max_length=128, required=False)


class SessionAnswer(serializers.Serializer[Any]):
    """A session. No key and no secret is ever in it."""

    chat_session_id = serializers.CharField()
    status = serializers.ChoiceField(choices=("starting", "idle", "running", "waiting", "ended"))
    agent = serializers.DictField()
    llm = serializers.DictField(allow_null=True)
    template = serializers.CharField()
    sandbox_id = serializers.CharField(allow_null=True)
    user_id = serializers.CharField()
    usage = serializers.DictField()
    budget = serializers.DictField(allow_null=True)
    metadata = serializers.DictField()
    app = serializers.DictField(allow_null=True)
    workspace = serializers.CharField(allow_null=True)
    ttl_seconds = serializers.IntegerField()
    idle_timeout_seconds = serializers.IntegerField()
    last_seq = serializers.IntegerField()
    created_at = serializers.DateTimeField()
    expires_at = serializers.DateTimeField()
    ended_at = serializers.DateTimeField(allow_null=True)
    end_reason = serializers.CharField(allow_null=True)
    end_detail = serializers.CharField(allow_null=True)
    stop_reason = serializers.CharField(allow_null=True)


class SessionDetailAnswer(SessionAnswer):
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


class SessionCreatedAnswer(SessionAnswer):
    jwt = serializers.CharField()
    connect_url = serializers.CharField()
    token_expires_at = serializers.DateTimeField()


class SessionListAnswer(serializers.Serializer[Any]):
    sessions = SessionAnswer(many=True)
    next_cursor = serializers.CharField(allow_null=True)


class SessionEndedAnswer(serializers.Serializer[Any]):
    chat_session_id = serializers.CharField()
    status = serializers.ChoiceField(choices=("ended",))


class SessionTokenAnswer(serializers.Serializer[Any]):
    jwt = serializers.CharField()
    connect_url = serializers.CharField()
    expires_at = serializers.DateTimeField()


class TaskAnswer(serializers.Serializer[Any]):
    task_id = serializers.CharField()
    id = serializers.CharField(allow_null=True)
    status = serializers.ChoiceField(choices=("queued", "running", "done"))
    prompt = serializers.CharField()
    attempt = serializers.IntegerField()
    exit_code = serializers.IntegerField(allow_null=True)
    exit_reason = serializers.CharField(allow_null=True)
    result = serializers.CharField(allow_null=True)
    usage = serializers.DictField()
    created_at = serializers.DateTimeField()
    started_at = serializers.DateTimeField(allow_null=True)
    ended_at = serializers.DateTimeField(allow_null=True)


class TaskListAnswer(serializers.Serializer[Any]):
    tasks = TaskAnswer(many=True)
    next_cursor = serializers.CharField(allow_null=True)


class TaskQueuedAnswer(serializers.Serializer[Any]):
    task_id = serializers.CharField()
    status = serializers.ChoiceField(choices=("queued", "running", "done"))


class EventsAnswer(serializers.Serializer[Any]):
    events = serializers.ListField(child=serializers.DictField())
    next_after = serializers.IntegerField()

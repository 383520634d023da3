"""`POST /v1/sandboxes` with `agent` and `task`: a sandbox and one task in one call (CONTRACT 7)."""

from __future__ import annotations

from typing import Any, ClassVar

from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from accounts.principal import principal_of
from e2a.core.api import StrictCharField
from e2a.core.errors import Forbidden
from e2a.core.idempotency import idempotent
from sandboxes import presenting
from sandboxes.api import TAGS, SandboxesView
from sandboxes.serializers import SandboxCreateSerializer, SandboxSerializer
from sessions_app.rules import AGENT_KINDS, LLMChoice
from sessions_app.serializers import ModelField
from sessions_app.services import SessionSpec, session_create
from sessions_app.task_queue import prompt_check, task_submit


class SandboxWithTaskBody(SandboxCreateSerializer):
    agent = StrictCharField(max_length=32, required=False)
    task = StrictCharField(max_length=256 * 1024, required=False)
    model = ModelField(required=False)
    llm_key = StrictCharField(max_length=64 * 1024, required=False, write_only=True)

    def validate_agent(self, value: str) -> str:
        if value not in AGENT_KINDS:
            raise serializers.ValidationError(f"One of {', '.join(AGENT_KINDS)}.", code="unknown_agent")
        return value

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        attrs = super().validate(attrs)
        if ("agent" in attrs) != ("task" in attrs):
            raise serializers.ValidationError({"task": "agent and task go together."}, code="agent_and_task")
        if "agent" not in attrs and ("model" in attrs or "llm_key" in attrs):
            raise serializers.ValidationError(
                {"agent": "model and llm_key need an agent."}, code="agent_and_task"
            )
        return attrs


class SandboxWithTaskAnswer(SandboxSerializer):
    chat_session_id = serializers.CharField(required=False)
    task_id = serializers.CharField(required=False)


class SandboxesWithTaskView(SandboxesView):
    create_serializer: ClassVar = SandboxWithTaskBody

    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_create",
        summary="Make a sandbox",
        request=SandboxWithTaskBody,
        responses={201: SandboxWithTaskAnswer},
    )
    @idempotent()
    def post(self, request: Request) -> Response:
        """Make a sandbox; with `agent` and `task` it runs one task, and the answer has its session."""
        return super().post.__wrapped__(self, request)  # type: ignore[attr-defined,no-any-return]

    def create(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        if "agent" not in body:
            return super().create(request, body)
        if not principal_of(request).has_scope("sessions:write"):
            raise Forbidden("This key has no scope sessions:write.", code="missing_scope")
        prompt_check(body["task"])
        kind = body["agent"]
        session = session_create(
            principal=principal_of(request),
            spec=SessionSpec(
                agent_kind=kind,
                user_id="sandbox",
                template=body["template"],
                llm=LLMChoice("", body.get("model", "")) if kind != "shell" else None,
                secrets=tuple(body.get("secrets") or ()),
                inline_values={"LLM_API_KEY": body["llm_key"]} if "llm_key" in body else None,
                ttl_seconds=max(60, body["max_lifetime_seconds"]),
                idle_timeout_seconds=body["idle_timeout_seconds"],
                metadata=body.get("metadata") or {},
                egress=body.get("egress", {}),
                env_vars=body.get("env_vars") or {},
                snapshot=body.get("snapshot", ""),
                workspace=body.get("workspace", ""),
            ),
        )
        task, _ = task_submit(session=session, prompt=body["task"])
        assert session.sandbox is not None, "session_create gives it one"
        return presenting.sandbox_shown(session.sandbox) | {
            "chat_session_id": session.public_id,
            "task_id": task.public_id,
        }

"""`/v1/sessions…` (CONTRACT 5)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from django.http import HttpResponse, StreamingHttpResponse
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from accounts.principal import principal_of
from e2a.core.api import ApiView, created, time_text, validated
from e2a.core.errors import NotFound, ValidationFailed
from e2a.core.idempotency import idempotent
from e2a.core.openapi import SERVER_SENT_EVENT
from e2a.core.pagination import page
from e2a.core.threads import in_thread
from sandboxes.models import DeathReason
from sandboxes.presenting import alive_shown
from sessions_app import log as event_log
from sessions_app import serializers as bodies
from sessions_app.addresses import connect_url
from sessions_app.idling import session_alive
from sessions_app.models import Session, SessionStatus
from sessions_app.renderers import EventStreamRenderer
from sessions_app.rules import LLMChoice
from sessions_app.selectors import (
    events_readable,
    session_get,
    session_json,
    sessions_of,
    task_get,
    task_json,
)
from sessions_app.services import SessionSpec, session_create, session_end, session_patch, session_token
from sessions_app.task_queue import prompt_check, task_cancel, task_submit

SCOPES = {
    "GET": "sessions:read",
    "HEAD": "sessions:read",
    "POST": "sessions:write",
    "PATCH": "sessions:write",
    "DELETE": "sessions:write",
}
SSE_WAIT_SECONDS = 1.0
SSE_QUIET_SECONDS = 15.0
CURSOR = [
    OpenApiParameter("limit", OpenApiTypes.INT, description="1 to 100, default 20."),
    OpenApiParameter("cursor", OpenApiTypes.STR),
]


def session_spec(body: dict[str, Any]) -> SessionSpec:
    """The checked body of POST /v1/sessions as what the service takes."""
    agent = dict(body["agent"])
    kind = agent.pop("kind")
    llm = body.get("llm")
    return SessionSpec(
        agent_kind=kind,
        agent=agent,
        user_id=body["user_id"],
        template=body["template"],
        llm=LLMChoice(llm["vendor"], llm.get("model", ""), llm.get("base_url", ""))
        if llm is not None
        else None,
        secrets=tuple(body["secrets"]),
        ttl_seconds=body["ttl_seconds"],
        idle_timeout_seconds=body["idle_timeout_seconds"],
        budget=dict(body.get("budget") or {}),
        metadata=body["metadata"],
        egress=body.get("egress", {}),
        app=body.get("app"),
        snapshot=body.get("snapshot", ""),
        workspace=body.get("workspace", ""),
    )


class SessionsView(ApiView):
    scopes = SCOPES

    @extend_schema(
        operation_id="sessions_list",
        parameters=[
            *CURSOR,
            OpenApiParameter("status", OpenApiTypes.STR, enum=list(SessionStatus.values)),
            OpenApiParameter("user_id", OpenApiTypes.STR),
        ],
        responses=bodies.SessionListAnswer,
    )
    def get(self, request: Request) -> Response:
        """Sessions of the tenant, newest first."""
        rows = sessions_of(principal_of(request).tenant)
        status = request.query_params.get("status")
        if status is not None:
            if status not in SessionStatus.values:
                raise ValidationFailed.of(
                    "status", "invalid_choice", f"One of {', '.join(SessionStatus.values)}."
                )
            rows = rows.filter(status=status)
        user_id = request.query_params.get("user_id")
        if user_id is not None:
            if "\0" in user_id:
                raise ValidationFailed.of("user_id", "invalid", "A user_id holds no null character.")
            rows = rows.filter(user_id=user_id)
        found, cursor = page(rows, request)
        return Response({"sessions": [session_json(session) for session in found], "next_cursor": cursor})

    @extend_schema(
        operation_id="sessions_create",
        request=bodies.SessionCreateBody,
        responses={201: bodies.SessionCreatedAnswer},
    )
    @idempotent(sealed=True)
    def post(self, request: Request) -> Response:
        """Start an agent session: its sandbox comes warm from the pool, or the answer says `starting`."""
        body = validated(bodies.SessionCreateBody, request)
        session = session_create(principal=principal_of(request), spec=session_spec(body))
        return created(created_json(session, request))


def created_json(session: Session, request: Request) -> dict[str, Any]:
    """A new session with its token and address."""
    token, expires = session_token(session)
    return session_json(session) | {
        "jwt": token,
        "connect_url": connect_url(session, request),
        "token_expires_at": time_text(expires),
    }


def session_detailed(session: Session) -> dict[str, Any]:
    """With what keeps it alive. Asks its sandbox's guest, at most 1 s."""
    return session_json(session) | alive_shown(session_alive(session))


class SessionView(ApiView):
    scopes = SCOPES

    @extend_schema(operation_id="sessions_get", responses=bodies.SessionDetailAnswer)
    def get(self, request: Request, session_id: str) -> Response:
        """One session, with why it lives and when it ends if nothing more happens."""
        return Response(session_detailed(session_get(principal_of(request).tenant, session_id)))

    @extend_schema(
        operation_id="sessions_patch", request=bodies.SessionPatchBody, responses=bodies.SessionDetailAnswer
    )
    def patch(self, request: Request, session_id: str) -> Response:
        """Change a live session's budget, time to live, metadata, egress rules."""
        session = session_get(principal_of(request).tenant, session_id)
        return Response(
            session_detailed(
                session_patch(session=session, changes=validated(bodies.SessionPatchBody, request))
            )
        )

    @extend_schema(operation_id="sessions_end", responses={200: bodies.SessionEndedAnswer})
    def delete(self, request: Request, session_id: str) -> Response:
        """End a session and destroy its sandbox. Twice is fine."""
        session = session_get(principal_of(request).tenant, session_id)
        session_end(session=session, reason=DeathReason.USER)
        return Response({"chat_session_id": session.public_id, "status": "ended"})


class SessionTokenView(ApiView):
    scopes = SCOPES

    @extend_schema(operation_id="sessions_token", request=None, responses={201: bodies.SessionTokenAnswer})
    @idempotent(sealed=True)
    def post(self, request: Request, session_id: str) -> Response:
        """A fresh session token, for a socket that reconnects."""
        session = session_get(principal_of(request).tenant, session_id)
        token, expires = session_token(session)
        return created(
            {"jwt": token, "connect_url": connect_url(session, request), "expires_at": time_text(expires)}
        )


class TasksView(ApiView):
    scopes = SCOPES

    @extend_schema(operation_id="tasks_list", parameters=CURSOR, responses=bodies.TaskListAnswer)
    def get(self, request: Request, session_id: str) -> Response:
        """The session's tasks, newest first."""
        found, cursor = page(session_get(principal_of(request).tenant, session_id).tasks.all(), request)
        return Response({"tasks": [task_json(task) for task in found], "next_cursor": cursor})

    @extend_schema(
        operation_id="tasks_submit", request=bodies.TaskSubmitBody, responses={202: bodies.TaskQueuedAnswer}
    )
    @idempotent()
    def post(self, request: Request, session_id: str) -> Response:
        """Queue a task: the twin of the socket's `task` frame."""
        session = session_get(principal_of(request).tenant, session_id)
        body = validated(bodies.TaskSubmitBody, request)
        prompt_check(body["prompt"])
        task, _ = task_submit(session=session, prompt=body["prompt"], client_id=body.get("id"))
        return Response({"task_id": task.public_id, "status": task.state}, status=202)


class TaskView(ApiView):
    scopes = SCOPES

    @extend_schema(operation_id="tasks_get", responses=bodies.TaskAnswer)
    def get(self, request: Request, session_id: str, task_id: str) -> Response:
        """One task: state, exit code, result text, usage."""
        return Response(task_json(task_get(session_get(principal_of(request).tenant, session_id), task_id)))


class TaskCancelView(ApiView):
    scopes = SCOPES

    @extend_schema(operation_id="tasks_cancel", request=None, responses=bodies.TaskAnswer)
    def post(self, request: Request, session_id: str, task_id: str) -> Response:
        """Cancel a task: its `exit` has 130."""
        task = task_get(session_get(principal_of(request).tenant, session_id), task_id)
        return Response(task_json(task_cancel(task)))


class EventsView(ApiView):
    scopes = SCOPES

    def get_renderers(self) -> list[Any]:
        return [*super().get_renderers(), EventStreamRenderer()]

    @extend_schema(
        operation_id="events_list",
        parameters=[
            OpenApiParameter("after", OpenApiTypes.INT, description="Frames after this seq; default 0."),
            OpenApiParameter("limit", OpenApiTypes.INT, description="1 to 500, default 500."),
        ],
        responses={
            (200, "application/json"): bodies.EventsAnswer,
            (200, "text/event-stream"): SERVER_SENT_EVENT,
        },
    )
    def get(self, request: Request, session_id: str) -> Response | HttpResponse | StreamingHttpResponse:
        """The stored log; with `Accept: text/event-stream` it goes on live, from `Last-Event-ID`."""
        session = session_get(principal_of(request).tenant, session_id)
        events_readable(session)
        wants_stream = getattr(request.accepted_renderer, "media_type", "") == EventStreamRenderer.media_type
        after = _after(request, request.headers.get("Last-Event-ID") if wants_stream else None)
        if wants_stream:
            response = StreamingHttpResponse(
                event_stream(session.pk, after), content_type="text/event-stream; charset=utf-8"
            )
            response["X-Accel-Buffering"] = "no"
            return response
        limit = _limit(request)
        stored = event_log.read(session.pk, after=after, limit=limit)
        return Response(
            {
                "events": [frame.as_json() for frame in stored],
                "next_after": stored[-1].seq if stored else after,
            }
        )


def _after(request: Request, last_event_id: str | None) -> int:
    raw = last_event_id if last_event_id is not None else request.query_params.get("after", "0")
    if not (raw.isascii() and raw.isdigit() and len(raw) <= 18):
        raise ValidationFailed.of("after", "invalid_after", "`after` is a whole number, 0 or more.")
    return int(raw)


def _limit(request: Request) -> int:
    from e2a.core.pagination import limit_of

    return limit_of(request, default=event_log.PAGE, most=event_log.PAGE)


async def event_stream(session_pk: int, after: int) -> AsyncIterator[bytes]:
    """Server-sent events from the log, until the session has ended and all was sent. One query a second when quiet."""
    quiet = 0.0
    while True:
        stored = await in_thread(event_log.read, session_pk, after=after)
        for frame in stored:
            after = frame.seq
            body = json.dumps(frame.as_json(), ensure_ascii=False)
            yield f"id: {frame.seq}\nevent: {frame.type}\ndata: {body}\n\n".encode()
        if stored:
            quiet = 0.0
            continue
        if await in_thread(_is_finished, session_pk, after):
            yield b"event: end\ndata: {}\n\n"
            return
        await asyncio.sleep(SSE_WAIT_SECONDS)
        quiet += SSE_WAIT_SECONDS
        if quiet >= SSE_QUIET_SECONDS:
            quiet = 0.0
            yield b": still here\n\n"


def _is_finished(session_pk: int, cursor: int) -> bool:
    row = Session.objects.filter(pk=session_pk).values_list("status", "last_seq").first()
    if row is None:
        raise NotFound("There is no such session.")
    return row[0] == SessionStatus.ENDED and row[1] <= cursor

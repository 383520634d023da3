"""Reads. A tenant's rows are fetched through the tenant: a stranger's id and a missing one give the same 404."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.db.models import QuerySet

from accounts.models import Tenant
from e2a.core.clock import now, rfc3339, seconds
from e2a.core.errors import Gone, NotFound
from e2a.core.ids import PATTERN
from e2a.core.rows import only
from sessions_app.models import Session, SessionStatus, Task

EVENTS_KEPT_SECONDS = 30 * 24 * 3600


def sessions_of(tenant: Tenant) -> QuerySet[Session]:
    """All sessions of a tenant, with what their JSON needs."""
    return Session.objects.filter(tenant=tenant).select_related("sandbox")


def session_get(tenant: Tenant, public_id: str) -> Session:
    """Raises `NotFound` for a missing and for a foreign id alike."""
    found = only(sessions_of(tenant).filter(public_id=public_id)) if PATTERN.match(public_id) else None
    if found is None:
        raise NotFound("There is no such session.")
    return found


def task_get(session: Session, public_id: str) -> Task:
    """Raises `NotFound`."""
    found = session.tasks.filter(public_id=public_id).first() if PATTERN.match(public_id) else None
    if found is None:
        raise NotFound("There is no such task.")
    return found


def live_sessions(session_pks: Iterable[int] | None = None) -> QuerySet[Session]:
    """Sessions that have not ended."""
    rows = Session.objects.exclude(status=SessionStatus.ENDED)
    return rows if session_pks is None else rows.filter(pk__in=session_pks)


def events_readable(session: Session) -> None:
    """Raises `Gone` 30 days after the session's end, when its events are no longer kept."""
    if session.ended_at is not None and now() - session.ended_at > seconds(EVENTS_KEPT_SECONDS):
        raise Gone("The events of this session are no longer kept.", code="events_expired")


def session_json(session: Session) -> dict[str, Any]:
    """A session as the API shows it: no key, no secret, only names."""
    body: dict[str, Any] = {
        "chat_session_id": session.public_id,
        "status": session.status,
        "agent": {"kind": session.agent_kind} | session.agent,
        "llm": (
            {
                "vendor": session.llm_vendor,
                "model": session.llm_model or None,
                "base_url": session.llm_base_url or None,
            }
            if session.llm_vendor
            else None
        ),
        "template": session.template_name,
        "sandbox_id": session.sandbox.public_id if session.sandbox else None,
        "user_id": session.user_id,
        "usage": {
            "input_tokens": session.input_tokens,
            "output_tokens": session.output_tokens,
            "cache_read_tokens": session.cache_read_tokens,
            "cost_usd": float(session.cost_usd),
        },
        "budget": session.budget or None,
        "metadata": session.metadata,
        "app": session.app,
        "ttl_seconds": session.ttl_seconds,
        "idle_timeout_seconds": session.idle_timeout_seconds,
        "last_seq": session.last_seq,
        "created_at": rfc3339(session.created_at),
        "expires_at": rfc3339(session.expires_at),
        "ended_at": rfc3339(session.ended_at),
        "end_reason": session.end_reason or None,
        "end_detail": session.end_detail or None,
        "stop_reason": session.stop_reason or None,
    }
    return body


def task_json(task: Task) -> dict[str, Any]:
    """A task as the API shows it."""
    return {
        "task_id": task.public_id,
        "id": task.client_id,
        "status": task.state,
        "prompt": task.prompt,
        "attempt": task.attempt,
        "exit_code": task.exit_code,
        "exit_reason": task.exit_reason or None,
        "result": task.result if task.state == "done" else None,
        "usage": task.usage,
        "created_at": rfc3339(task.created_at),
        "started_at": rfc3339(task.started_at),
        "ended_at": rfc3339(task.ended_at),
    }

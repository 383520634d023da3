"""Why a session lives, and its end for idleness: by the clock and the rule of its sandbox (`sandboxes.activity`)."""

from __future__ import annotations

import datetime as dt
import random
from dataclasses import dataclass, replace
from typing import Final

from django.db.models import Exists, OuterRef, Q

from e2a.core.clock import now, seconds
from sandboxes.activity import TEXTS, Alive, alive_look, idle_among
from sandboxes.models import DeathReason, SandboxState
from sessions_app.models import Session, SessionStatus, Task, TaskState
from sessions_app.selectors import live_sessions
from sessions_app.services import session_end

A_PASS: Final = 200
SHORTEST_IDLE_SECONDS: Final = 10
WARN_SECONDS: Final = 60.0
"""Before its end a session's sockets are told (CONTRACT 6); half of an idle time that is shorter than 120 s."""
_WORK: Final = ("model_call", "task_running")


def session_alive(session: Session) -> Alive | None:
    """Why it lives and when it ends if nothing more happens; None once it has ended. Asks its sandbox's guest, at most
    1 s, and Redis; one query."""
    if session.status == SessionStatus.ENDED:
        return None
    alive = alive_look(session.sandbox) if session.sandbox is not None else None
    if alive is None or session.status == SessionStatus.STARTING:
        return Alive(
            "starting", TEXTS["starting"], session.created_at, is_held=True, ends_at=session.expires_at
        )
    if alive.reason not in _WORK and alive.reason != "paused":
        # A task that waits, or whose worker has just died, holds the session as well.
        task = session.tasks.exclude(state=TaskState.DONE).order_by("pk").first()
        if task is not None:
            since = task.started_at or task.created_at
            alive = Alive(
                "task_running", TEXTS["task_running"], since, is_held=True, ends_at=session.expires_at
            )
    if alive.is_held:
        return replace(alive, ends_at=session.expires_at)
    return replace(alive, ends_at=min(idle_at(session), session.expires_at))


def idle_at(session: Session) -> dt.datetime:
    """When it is idle if nothing holds it and nothing more happens."""
    active = session.last_active_at
    if session.sandbox is not None and session.sandbox.last_active_at is not None:
        active = max(active, session.sandbox.last_active_at)
    return active + seconds(session.idle_timeout_seconds)


@dataclass(frozen=True, slots=True)
class Ending:
    """When a session ends if nothing more happens. `alive_because` None: it idles, and use keeps it; else its time is
    what ends it. `warn_seconds`: from how long before on clients are told."""

    at: dt.datetime
    alive_because: str | None
    warn_seconds: float


def session_ending(session_pk: int) -> Ending | None:
    """None for one that has ended. Three queries at most and one call of Redis; guests are asked only when the end is
    near."""
    rows = Session.objects.select_related("sandbox__node", "sandbox__template")
    session = rows.filter(pk=session_pk).exclude(status=SessionStatus.ENDED).first()
    if session is None:
        return None
    to_idle = min(WARN_SECONDS, session.idle_timeout_seconds / 2)
    moment = now()
    if min(session.expires_at - seconds(WARN_SECONDS), idle_at(session) - seconds(to_idle)) > moment:
        return Ending(min(session.expires_at, idle_at(session)), None, 0.0)  # Neither is near.
    alive = session_alive(session)
    if alive is None:
        return None
    ends_at = alive.ends_at or session.expires_at
    if ends_at >= session.expires_at:
        return Ending(session.expires_at, alive.reason, WARN_SECONDS)
    return Ending(ends_at, None, to_idle)


def sessions_reap_idle() -> None:
    """End sessions that idle. One query for the rows; guests are asked as `idle_among` says; at most 200 in a pass."""
    moment = now()
    working = Exists(Task.objects.filter(session=OuterRef("pk")).exclude(state=TaskState.DONE))
    rows = live_sessions().filter(
        ~working, status=SessionStatus.IDLE, last_active_at__lte=moment - seconds(SHORTEST_IDLE_SECONDS)
    )
    due = [
        session
        for session in rows.select_related("tenant", "sandbox__node", "sandbox__template").iterator()
        if idle_at(session) <= moment
    ]
    chosen = random.sample(due, min(A_PASS, len(due)))
    by_sandbox = {
        session.sandbox.pk: session
        for session in chosen
        if session.sandbox is not None and session.sandbox.state == SandboxState.RUNNING
    }
    asked = [session.sandbox for session in by_sandbox.values() if session.sandbox is not None]
    for sandbox in idle_among(asked):
        _end_idle(by_sandbox[sandbox.pk], Q(sandbox__last_active_at=sandbox.last_active_at))
    for session in chosen:
        if session.sandbox is None:
            _end_idle(session, Q())


def _end_idle(session: Session, unchanged: Q) -> None:
    """Unless somebody used it since the row was read."""
    session_end(
        session=session,
        reason=DeathReason.IDLE,
        detail=f"nothing happened for {session.idle_timeout_seconds} s",
        only_if=unchanged & Q(status=SessionStatus.IDLE, last_active_at=session.last_active_at),
    )

"""A strip on a live session's page: why it lives, when it ends, and buttons to move that."""

from __future__ import annotations

from collections.abc import Callable

from django.contrib.auth.decorators import login_required
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_POST

from accounts.models import User
from e2a.core.clock import now
from e2a.core.errors import Conflict, E2AError, NotFound
from sandboxes.models import Sandbox
from sandboxes.pausing import sandbox_pause, sandbox_resume
from sessions_app.idling import session_alive
from sessions_app.models import Session
from sessions_app.selectors import session_get
from sessions_app.services import session_patch

EXTEND_SECONDS = 900
LONGEST_SECONDS = 7200


def _session(request: HttpRequest, session_id: str) -> Session:
    assert isinstance(request.user, User)
    try:
        return session_get(request.user.tenant, session_id)
    except NotFound as error:
        raise Http404 from error


@login_required
@require_GET
def session_life(request: HttpRequest, session_id: str) -> HttpResponse:
    """The strip as it is now; asked for every 10 s."""
    return _strip(request, session_id)


@login_required
@require_POST
def session_life_extend(request: HttpRequest, session_id: str) -> HttpResponse:
    """Its time limit is 15 minutes later, at most two hours after its start."""

    def extend(session: Session) -> None:
        lived = (session.expires_at - session.created_at).total_seconds()
        wanted = min(LONGEST_SECONDS, round(lived) + EXTEND_SECONDS)
        if wanted <= session.ttl_seconds or session.expires_at <= now():
            raise Conflict("It cannot live longer.", code="too_long")
        session_patch(session=session, changes={"ttl_seconds": wanted})

    return _done(request, session_id, extend)


@login_required
@require_POST
def session_life_pause(request: HttpRequest, session_id: str) -> HttpResponse:
    return _done(request, session_id, lambda session: sandbox_pause(sandbox=_sandbox(session)))


@login_required
@require_POST
def session_life_resume(request: HttpRequest, session_id: str) -> HttpResponse:
    return _done(request, session_id, lambda session: sandbox_resume(sandbox=_sandbox(session)))


def _sandbox(session: Session) -> Sandbox:
    if session.sandbox is None:
        raise Conflict("Its sandbox is not there.", code="not_running")
    return session.sandbox


def _done(request: HttpRequest, session_id: str, act: Callable[[Session], object]) -> HttpResponse:
    problem = ""
    try:
        act(_session(request, session_id))
    except E2AError as error:
        problem = error.detail
    if getattr(request, "htmx", False):
        return _strip(request, session_id, problem=problem)
    return redirect("session", session_id=session_id)


def _strip(request: HttpRequest, session_id: str, *, problem: str = "") -> HttpResponse:
    session = _session(request, session_id)
    context = {"session": session, "alive": session_alive(session), "problem": problem}
    return render(request, "sessions_app/life.html", context)

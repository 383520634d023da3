"""Dashboard pages of sessions: list, start, the live chat."""

from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from accounts.models import User
from accounts.principal import Principal
from e2a.core.errors import E2AError, NotFound, ValidationFailed
from e2a.core.pagination import page
from sandboxes.models import DeathReason
from sessions_app.addresses import connect_url
from sessions_app.forms import SessionForm
from sessions_app.idling import session_alive
from sessions_app.models import Session
from sessions_app.rules import LLMChoice
from sessions_app.selectors import session_get, sessions_of
from sessions_app.services import SessionSpec, session_create, session_end, session_token

COLUMNS = ("Session", "Agent", "State", "For", "Tokens", "Started", "")


def _user(request: HttpRequest) -> User:
    assert isinstance(request.user, User)
    return request.user


def _session(request: HttpRequest, session_id: str) -> Session:
    try:
        return session_get(_user(request).tenant, session_id)
    except NotFound as error:
        raise Http404 from error


@login_required
@require_GET
def sessions_page(request: HttpRequest) -> HttpResponse:
    """The tenant's sessions, newest first."""
    try:
        found, cursor = page(sessions_of(_user(request).tenant), request)
    except ValidationFailed:
        return redirect("sessions")
    return render(
        request, "sessions_app/list.html", {"rows": found, "columns": COLUMNS, "next_cursor": cursor}
    )


@login_required
@require_http_methods(["GET", "POST"])
def session_new(request: HttpRequest) -> HttpResponse:
    """Start a session; its chat page is where it goes on."""
    user = _user(request)
    form = SessionForm(user.tenant, request.POST or None)
    status = 200
    if request.method == "POST":
        status = 400
        if form.is_valid():
            try:
                session = session_create(
                    principal=Principal("account", user.tenant, user),
                    spec=_spec(user, form.cleaned_data),
                )
            except E2AError as error:
                status = error.status
                form.add_error(None, error.detail)
            else:
                return redirect("session", session_id=session.public_id)
    return render(request, "sessions_app/new.html", {"form": form, "nav": "sessions"}, status=status)


def _spec(user: User, data: dict[str, Any]) -> SessionSpec:
    return SessionSpec(
        agent_kind=data["agent"],
        user_id=user.public_id,
        template=data["template"],
        llm=LLMChoice("", data["model"].strip()) if data["agent"] != "shell" else None,
        secrets=tuple(data.get("secrets") or ()),
        ttl_seconds=data["ttl_minutes"] * 60,
    )


@login_required
@require_GET
def session_page(request: HttpRequest, session_id: str) -> HttpResponse:
    """The live chat: the same element that others embed."""
    session = _session(request, session_id)
    is_live = session.status != "ended"
    return render(
        request,
        "sessions_app/detail.html",
        {
            "session": session,
            "is_live": is_live,
            "alive": session_alive(session),
            "token": session_token(session)[0] if is_live else "",
            "connect_url": connect_url(session, request),
            "tasks": [] if is_live else session.tasks.order_by("pk"),
        },
    )


@login_required
@require_POST
def session_page_token(request: HttpRequest, session_id: str) -> HttpResponse:
    """A fresh token for the page's chat, when the one it has expires."""
    try:
        token, _ = session_token(_session(request, session_id))
    except E2AError as error:
        return JsonResponse({"detail": error.detail}, status=error.status)
    return JsonResponse({"token": token})


@login_required
@require_POST
def session_page_end(request: HttpRequest, session_id: str) -> HttpResponse:
    """End the session and destroy its sandbox."""
    session = _session(request, session_id)
    if session_end(session=session, reason=DeathReason.USER):
        messages.success(request, "The session has ended and its sandbox is gone.")
    return redirect("sessions")

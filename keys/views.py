"""The dashboard page of API keys."""

from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods, require_POST

from accounts.audit import caller_of
from accounts.models import User
from e2a.core.errors import NotFound, QuotaExceeded, RateLimited
from keys import services
from keys.forms import KeyForm
from keys.selectors import key_get, keys_of

COLUMNS = ("Key", "Name", "State", "Scopes", "Made", "Last used", "")


@login_required
@require_http_methods(["GET", "POST"])
def api_keys(request: HttpRequest) -> HttpResponse:
    """List the tenant's keys; make one, which this answer shows once."""
    assert isinstance(request.user, User)
    if request.method == "GET":
        return _page(request, KeyForm())
    form = KeyForm(request.POST)
    if not form.is_valid():
        return _page(request, form, status=400)
    try:
        issued = services.key_issue(
            user=request.user,
            name=form.cleaned_data["name"],
            scopes=form.cleaned_data["scopes"],
            expires_at=form.expires_at,
            caller=caller_of(request),
        )
    except (QuotaExceeded, RateLimited) as error:
        form.add_error(None, error.detail)
        return _page(request, form, status=error.status)
    return _page(request, KeyForm(), issued=issued)


@login_required
@require_POST
def api_key_revoke(request: HttpRequest, key_id: str) -> HttpResponse:
    """Revoke a key of the tenant. Twice is fine."""
    assert isinstance(request.user, User)
    try:
        key = key_get(request.user.tenant, key_id)
    except NotFound as error:
        raise Http404 from error
    services.key_revoke(key=key, actor=request.user, caller=caller_of(request))
    messages.success(request, f"The key {key} is revoked.")
    return redirect("api-keys")


def _page(request: HttpRequest, form: KeyForm, *, status: int = 200, **context: Any) -> HttpResponse:
    assert isinstance(request.user, User)
    context |= {"form": form, "columns": COLUMNS, "keys": keys_of(request.user.tenant)}
    return render(request, "keys/list.html", context, status=status)

"""The dashboard's Secrets pages: names and times to see, values to put in, nothing to read back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.debug import sensitive_post_parameters
from django.views.decorators.http import require_http_methods, require_POST

from accounts.audit import caller_of
from accounts.models import User
from e2a.core.errors import CallerError, NotFound
from e2a.core.pagination import page
from secrets_vault import services
from secrets_vault.forms import BundleForm, NameForm, ValueForm, VersionForm
from secrets_vault.models import Bundle
from secrets_vault.selectors import (
    bundle_get,
    bundle_state,
    bundle_states,
    bundles_of,
    value_states,
    version_states,
    versions_of,
)

View = Callable[..., HttpResponse]


def _page(view: View) -> View:
    """For signed-in people; a missing bundle is a missing page; posted values stay out of error reports."""

    @functools.wraps(view)
    def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        try:
            return view(request, *args, **kwargs)
        except NotFound as error:
            raise Http404(error.detail) from error

    return cast(View, login_required(sensitive_post_parameters()(guarded)))


def _who(request: HttpRequest) -> dict[str, Any]:
    user = cast(User, request.user)
    return {"tenant": user.tenant, "actor": user.public_id, "caller": caller_of(request)}


def _list_shown(request: HttpRequest, form: BundleForm) -> HttpResponse:
    bundles, next_cursor = page(bundles_of(cast(User, request.user).tenant), request)
    context = {
        "form": form,
        "bundles": bundle_states(bundles),
        "columns": ["Name", "Values", "Version", "Sessions", "Changed"],
        "next_cursor": next_cursor,
    }
    return render(request, "secrets_vault/list.html", context, status=400 if form.errors else 200)


def _bundle_of(request: HttpRequest, name: str) -> Bundle:
    return bundle_get(cast(User, request.user).tenant, name)


def _bundle_shown(request: HttpRequest, name: str, form: ValueForm) -> HttpResponse:
    bundle = _bundle_of(request, name)
    context = {
        "form": form,
        "bundle": bundle_state(bundle),
        "values": value_states(bundle),
        "versions": version_states(list(versions_of(bundle).order_by("-version"))),
    }
    return render(request, "secrets_vault/detail.html", context, status=400 if form.errors else 200)


@_page
@require_http_methods(["GET", "POST"])
def secrets(request: HttpRequest) -> HttpResponse:
    """All bundles, and the form for a new one."""
    form = BundleForm(request.POST or None)
    if request.method == "POST" and form.is_valid():
        try:
            made = services.bundle_create(
                name=form.cleaned_data["name"], values=form.cleaned_data["values"], **_who(request)
            )
        except CallerError as error:
            form.refuse(error)
        else:
            messages.success(request, f"Bundle {made.name} is made.")
            return redirect("secret", name=made.name)
    return _list_shown(request, form)


@_page
@require_http_methods(["GET"])
def secret(request: HttpRequest, name: str) -> HttpResponse:
    """One bundle; `?value=NAME` prepares the form to replace that value."""
    return _bundle_shown(request, name, ValueForm(initial={"name": request.GET.get("value", "")[:128]}))


@_page
@require_POST
def secret_value_set(request: HttpRequest, name: str) -> HttpResponse:
    form = ValueForm(request.POST)
    if form.is_valid():
        value = form.cleaned_data["name"]
        try:
            change = services.bundle_patch(
                name=name, values={value: form.cleaned_data["value"]}, **_who(request)
            )
        except NotFound:
            raise
        except CallerError as error:
            form.refuse(error)
        else:
            messages.success(request, f"{value} is set{_reach(change)}.")
            return redirect("secret", name=name)
    return _bundle_shown(request, name, form)


@_page
@require_POST
def secret_value_remove(request: HttpRequest, name: str) -> HttpResponse:
    form = NameForm(request.POST)
    if form.is_valid():
        value = form.cleaned_data["name"]
        _attempt(
            request,
            lambda: services.bundle_patch(name=name, values={value: None}, **_who(request)),
            done=f"{value} is removed",
        )
    return redirect("secret", name=name)


@_page
@require_POST
def secret_rollback(request: HttpRequest, name: str) -> HttpResponse:
    form = VersionForm(request.POST)
    if form.is_valid():
        version = form.cleaned_data["version"]
        _attempt(
            request,
            lambda: services.bundle_rollback(name=name, version=version, **_who(request)),
            done=f"The values of version {version} are back",
        )
    return redirect("secret", name=name)


@_page
@require_POST
def secret_delete(request: HttpRequest, name: str) -> HttpResponse:
    """With `force` also one that is in use."""
    try:
        services.bundle_delete(name=name, force=request.POST.get("force") == "true", **_who(request))
    except NotFound:
        raise
    except CallerError as error:
        messages.error(request, error.detail)
        return redirect("secret", name=name)
    messages.success(request, f"Bundle {name} is deleted.")
    return redirect("secrets")


def _attempt(request: HttpRequest, change: Callable[[], services.BundleChange], *, done: str) -> None:
    try:
        messages.success(request, f"{done}{_reach(change())}.")
    except NotFound:
        raise
    except CallerError as error:
        messages.error(request, error.detail)


def _reach(change: services.BundleChange) -> str:
    count = change.sessions_updated
    return f"; {count} running session{'' if count == 1 else 's'} will use it" if count else ""

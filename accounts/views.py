"""Pages: sign in by a mailed code, sign out, and the development page that shows the mails."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.contrib import messages
from django.contrib.auth import login as session_begin
from django.contrib.auth import logout as session_end
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import NoReverseMatch, reverse
from django.utils.http import url_has_allowed_host_and_scheme
from django.views.decorators.cache import cache_control
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from accounts import login, services
from accounts.addresses import address_key
from accounts.audit import caller_of
from accounts.forms import AddressForm, CodeForm
from accounts.mail import goes_to_folder, mails_newest
from accounts.tokens import BROWSER_MARK_SECONDS, browser_mark_check, browser_mark_issue
from e2a.core.errors import RateLimited

PENDING = "sign_in"
FAMILY = "family"
MAILS_SHOWN = 20


@require_http_methods(["GET", "POST"])
@cache_control(no_store=True)
def sign_in(request: HttpRequest) -> HttpResponse:
    """Ask for the address and have a code mailed to it."""
    target = safe_next(request.POST.get("next") or request.GET.get("next"))
    if request.user.is_authenticated:
        return redirect(target)
    form = AddressForm(request.POST or None)
    if request.method == "GET" or not form.is_valid():
        return _page(request, "accounts/sign_in.html", form=form, next=target)
    email = form.cleaned_data["email"]
    pending = request.session.get(PENDING, {})
    replaces = pending.get("login_id") if pending.get("email") == email else None
    try:
        login_id = login.login_start(
            email=email, caller=caller_of(request), known_browser=_is_known(request, email), replaces=replaces
        )
    except RateLimited as error:
        if replaces is not None:
            messages.info(request, f"The code is on its way. Another can be sent in {error.retry_after} s.")
            return redirect("sign-in-code")
        form.add_error(None, f"Too many codes were asked for. Try again in {error.retry_after} s.")
        return _limited(_page(request, "accounts/sign_in.html", status=429, form=form, next=target), error)
    request.session[PENDING] = {"login_id": login_id, "email": email, "next": target}
    return redirect("sign-in-code")


@require_http_methods(["GET", "POST"])
@cache_control(no_store=True)
def sign_in_code(request: HttpRequest) -> HttpResponse:
    """Take the code that belongs to this browser's flow, and begin a signed-in session."""
    pending = request.session.get(PENDING)
    if pending is None:
        return redirect("sign-in")
    form = CodeForm(request.POST or None)
    shown = {
        "form": form,
        "email": pending["email"],
        "dev_mail_url": _dev_mail_url(),
        "next": pending["next"],
    }
    if request.method == "GET" or not form.is_valid():
        return _page(request, "accounts/code.html", **shown)
    try:
        made = login.login_redeem(
            email=pending["email"],
            code=form.cleaned_data["code"],
            login_id=pending["login_id"],
            caller=caller_of(request),
        )
    except login.InvalidCode as error:
        form.add_error("code", error.detail)
        return _page(request, "accounts/code.html", status=401, **shown)
    except RateLimited as error:
        form.add_error(None, f"Too many tries. Try again in {error.retry_after} s.")
        return _limited(_page(request, "accounts/code.html", status=429, **shown), error)
    del request.session[PENDING]
    session_begin(request, made.user, backend="django.contrib.auth.backends.ModelBackend")  # Rotates the id.
    request.session[FAMILY] = made.family
    response = redirect(safe_next(pending["next"]))
    response.set_cookie(
        _browser_cookie(),
        browser_mark_issue(made.user.email_key),
        max_age=BROWSER_MARK_SECONDS,
        httponly=True,
        secure=settings.E2A.production,
        samesite="Lax",
    )
    return response


@require_POST
def sign_out(request: HttpRequest) -> HttpResponse:
    """End the sign-in and its session."""
    services.sign_in_end(family=request.session.get(FAMILY, ""), caller=caller_of(request))
    session_end(request)
    return redirect("sign-in")


@require_GET
@cache_control(no_store=True)
def dev_mail(request: HttpRequest) -> HttpResponse:
    """The newest mails of a development installation. 404 in production, and when mail goes elsewhere."""
    if settings.E2A.production or not goes_to_folder():
        raise Http404
    return _page(request, "accounts/dev_mail.html", mails=mails_newest(MAILS_SHOWN))


def safe_next(target: str | None) -> str:
    """`target` when it is a path of this site, else `/` (SECURITY 9.7)."""
    if not target or not target.startswith("/") or not target.isprintable() or "\\" in target:
        return "/"
    return target if url_has_allowed_host_and_scheme(target, allowed_hosts=None) else "/"


def _page(request: HttpRequest, template: str, *, status: int = 200, **context: Any) -> HttpResponse:
    return render(request, template, context, status=status)


def _limited(response: HttpResponse, error: RateLimited) -> HttpResponse:
    response.headers["Retry-After"] = str(error.retry_after)
    return response


def _browser_cookie() -> str:
    return "__Host-e2a-browser" if settings.E2A.production else "e2a-browser"


def _is_known(request: HttpRequest, email: str) -> bool:
    return browser_mark_check(request.COOKIES.get(_browser_cookie(), ""), address_key(email))


def _dev_mail_url() -> str | None:
    if settings.E2A.production or not goes_to_folder():
        return None
    try:
        return reverse("dev-mail")
    except NoReverseMatch:
        return None

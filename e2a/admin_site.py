"""The operators' site: staff with a second factor, and every act in the audit trail (SECURITY 9.12).

The first factor is the mailed code of the dashboard's sign-in page, or a password (`manage.py createsuperuser`). The
second is a TOTP device (`manage.py admin_totp`): always in production; in development only for those who have one.
"""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Callable
from typing import Any, Final

from django import forms
from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.utils.crypto import salted_hmac
from django_otp import DEVICE_ID_SESSION_KEY, devices_for_user, match_token
from unfold.forms import AuthenticationForm
from unfold.sites import UnfoldAdminSite
from unfold.widgets import UnfoldAdminTextInputWidget

from accounts.addresses import address_key
from accounts.audit import Caller, audit_write, caller_of
from accounts.limits import source_of
from accounts.models import User
from e2a.core.clock import now
from e2a.core.models import AuditEvent

IDLE_SECONDS: Final = 15 * 60
TRIES: Final = 5
TRIES_SECONDS: Final = 15 * 60
TRIES_OF_A_SOURCE: Final = 50
"""All accounts together; what is beyond it is refused without a row."""

SEEN: Final = "admin_seen"
_TRIED, _PASSED = "admin.sign_in_tried", "admin.sign_in"


def needs_second_factor(user: User) -> bool:
    """Whether the first factor is not enough for this person."""
    return bool(settings.E2A.production) or next(devices_for_user(user), None) is not None


def try_is_allowed(*, account: str, caller: Caller) -> bool:
    """Write one try to sign in, and say whether it may go on.

    At most 5 for one account from one source in 15 minutes since the last success: a guesser locks out nobody
    elsewhere. The row is there before it is counted, so parallel tries are no way around it. `account` is the name as
    it was typed or the person's own; the trail has a digest of it, since people type passwords into the wrong field.
    """
    caller = Caller(source_of(caller.address), caller.user_agent)
    target = salted_hmac("e2a.admin.try", account, algorithm="sha256").hexdigest()[:32]
    recent = AuditEvent.objects.filter(
        action__in=(_TRIED, _PASSED),
        address=caller.address,
        created_at__gt=now() - dt.timedelta(seconds=TRIES_SECONDS),
    ).order_by("-pk")
    if recent.filter(action=_TRIED).count() >= TRIES_OF_A_SOURCE:
        return False
    if _tries_since_success(recent.filter(target=target)) >= TRIES:
        return False
    audit_write(_TRIED, target=target, caller=caller)
    return _tries_since_success(recent.filter(target=target)) <= TRIES


def _tries_since_success(recent: Any) -> int:
    count = 0
    for action in recent.values_list("action", flat=True)[: TRIES + 1]:
        if action == _PASSED:
            break
        count += 1
    return count


def passed(*, user: User, account: str, caller: Caller) -> None:
    """Write that somebody is in; it sets the count of their tries back."""
    target = salted_hmac("e2a.admin.try", account, algorithm="sha256").hexdigest()[:32]
    caller = Caller(source_of(caller.address), caller.user_agent)
    audit_write(_PASSED, actor=user.public_id, tenant_id=user.tenant_id, target=target, caller=caller)


class OperatorForm(AuthenticationForm):
    """E-mail, password and code; of a person who is signed in by mail already, the code alone."""

    otp_token = forms.CharField(
        label="Code of your authenticator",
        required=False,
        widget=UnfoldAdminTextInputWidget(attrs={"autocomplete": "one-time-code", "inputmode": "numeric"}),
    )

    def __init__(self, request: HttpRequest | None = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(request, *args, **kwargs)
        person = getattr(request, "user", None)
        self.person = person if isinstance(person, User) and person.is_active and person.is_staff else None
        if self.person is not None:
            del self.fields["username"], self.fields["password"]
            self.fields["otp_token"].widget.attrs["autofocus"] = ""

    def clean(self) -> dict[str, Any]:
        assert self.request is not None
        account = self.person.email_key if self.person else _key(self.cleaned_data.get("username", ""))
        caller = caller_of(self.request)
        if not try_is_allowed(account=account, caller=caller):
            raise forms.ValidationError("Too many tries. Wait a quarter of an hour.", code="locked")
        if self.person is None:
            super().clean()
            user = self.get_user()
        else:
            user = self.user_cache = self.person
        if not isinstance(user, User):
            return dict(self.cleaned_data)
        self._second_factor(user)
        passed(user=user, account=account, caller=caller)
        return dict(self.cleaned_data)

    def _second_factor(self, user: User) -> None:
        if not needs_second_factor(user):
            return
        token = self.cleaned_data.get("otp_token")
        device = (
            match_token(user, token) if token else None
        )  # No code is no try: the device need not slow down.
        if device is None:
            raise forms.ValidationError(
                "A valid code of your authenticator is needed. An operator with access to the server sets one up "
                "with: manage.py admin_totp",
                code="second_factor",
            )
        user.otp_device = device  # type: ignore[attr-defined]  # django_otp's sign-in signal keeps it in the session


def _key(typed: str) -> str:
    return address_key(typed) if typed else ""


class OperatorSite(UnfoldAdminSite):
    """The one admin site; `e2a.apps.OperatorAdminConfig` makes it Django's default."""

    login_form = OperatorForm

    def has_permission(self, request: HttpRequest) -> bool:
        """Active staff; verified by a second factor where one is needed."""
        user = request.user
        if not super().has_permission(request) or not isinstance(user, User):
            return False
        return bool(user.is_verified()) or not needs_second_factor(user)  # type: ignore[attr-defined]

    def admin_view(self, view: Callable[..., Any], cacheable: bool = False) -> Callable[..., Any]:
        """Every page of the site: after 15 idle minutes the code is asked for again; what is sent is audited."""
        inner: Callable[..., Any] = super().admin_view(view, cacheable)

        @functools.wraps(view)
        def watched(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
            _forget_when_idle(request)
            user = request.user
            if not self.has_permission(request) or not isinstance(user, User):
                response: HttpResponse = inner(request, *args, **kwargs)
                return response
            _seen(request)
            status = 500
            try:
                response = inner(request, *args, **kwargs)
                status = response.status_code
            finally:
                if request.method not in ("GET", "HEAD", "OPTIONS"):
                    _act_write(request, user, status)
            return response

        return watched


def _seen(request: HttpRequest) -> None:
    """Note the time, at most once a minute: it is a write."""
    moment = now().timestamp()
    if moment - request.session.get(SEEN, 0) > 60:
        request.session[SEEN] = moment


def _forget_when_idle(request: HttpRequest) -> None:
    seen = request.session.get(SEEN)
    if seen is None or now().timestamp() - seen <= IDLE_SECONDS:
        return
    del request.session[SEEN]
    request.session.pop(DEVICE_ID_SESSION_KEY, None)
    if isinstance(request.user, User):
        request.user.otp_device = None  # type: ignore[attr-defined]


def _act_write(request: HttpRequest, user: User, status: int) -> None:
    """Who sent what where. The fields' values are left to the pages that know which may be written down."""
    path = request.path.removeprefix(f"/{settings.E2A.admin_path}")
    audit_write(
        "admin.act",
        actor=user.public_id,
        target=path[:64],
        caller=caller_of(request),
        method=request.method,
        path=path[:500],
        did=request.POST.get("action", "")[:64],
        rows=[row[:40] for row in request.POST.getlist("_selected_action")[:100]],
        status=status,
    )

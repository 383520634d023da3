"""People, tenants, their sign-ins and tokens. Codes are in `accounts.login`.

What must survive a refusal (a family that ends by reuse) is committed before the refusal is raised.
"""

from __future__ import annotations

import datetime as dt
import secrets
from dataclasses import dataclass, field

from django.conf import settings
from django.db import IntegrityError, transaction
from django.db.models import F, QuerySet

from accounts.addresses import address_clean, address_key
from accounts.audit import Caller, audit_write
from accounts.limits import source_of
from accounts.models import LoginFlow, MailboxState, RefreshToken, SignIn, Tenant, User
from accounts.principal import Principal
from accounts.tokens import account_token_issue, refresh_digests
from e2a.core.clock import now, seconds
from e2a.core.enqueue import enqueue
from e2a.core.errors import Conflict, Unauthenticated
from e2a.core.ids import new_id

REFRESH_SECONDS = 30 * 24 * 3600


@dataclass(frozen=True, slots=True)
class SignedIn:
    """A fresh pair of tokens."""

    user: User
    sign_in: SignIn
    expires_at: dt.datetime
    token: str = field(repr=False)
    refresh_token: str = field(repr=False)


# ---- People and tenants


def user_get_or_create(*, address: str) -> User:
    """The user of that mailbox; a new one gets a tenant of their own. Raises `AddressError`."""
    email = address_clean(address)
    key = address_key(email)
    found = User.objects.select_related("tenant").filter(email_key=key).first()
    if found is not None:
        return found
    try:
        with transaction.atomic():
            user = User(tenant=Tenant.objects.create(name=email[:120]), email=email, email_key=key)
            user.set_unusable_password()
            user.save()
            audit_write("user.created", actor=user.public_id, tenant_id=user.tenant_id, target=user.public_id)
            return user
    except IntegrityError:  # Somebody else made it between our look and our insert.
        return User.objects.select_related("tenant").get(email_key=key)


def user_disable(*, user: User, actor: str, caller: Caller | None = None) -> None:
    """Lock a person out: no sign-in, and every token, cookie and API key of theirs is refused from now on."""
    with transaction.atomic():
        User.objects.filter(pk=user.pk).update(is_active=False, token_version=F("token_version") + 1)
        _end_sign_ins(SignIn.objects.filter(user=user), "disabled")
        audit_write(
            "user.disabled", actor=actor, tenant_id=user.tenant_id, target=user.public_id, caller=caller
        )


def user_enable(*, user: User, actor: str, caller: Caller | None = None) -> None:
    """Let a person sign in again. Old tokens stay dead; API keys that were not revoked work again."""
    with transaction.atomic():
        User.objects.filter(pk=user.pk).update(is_active=True)
        audit_write(
            "user.enabled", actor=actor, tenant_id=user.tenant_id, target=user.public_id, caller=caller
        )


def tenant_suspend(*, tenant: Tenant, actor: str, caller: Caller | None = None) -> None:
    """Shut a tenant out: its people and API keys are refused from now on. A second time changes nothing."""
    with transaction.atomic():
        if not Tenant.objects.filter(pk=tenant.pk, suspended_at=None).update(suspended_at=now()):
            return
        User.objects.filter(tenant=tenant).update(token_version=F("token_version") + 1)
        _end_sign_ins(SignIn.objects.filter(user__tenant=tenant), "suspended")
        audit_write(
            "tenant.suspended", actor=actor, tenant_id=tenant.pk, target=tenant.public_id, caller=caller
        )


def tenant_resume(*, tenant: Tenant, actor: str, caller: Caller | None = None) -> None:
    """Let a suspended tenant in again. Its people sign in anew; its API keys work at once. One that is being
    erased stays out."""
    with transaction.atomic():
        suspended = Tenant.objects.filter(pk=tenant.pk, erase_asked_at=None).exclude(suspended_at=None)
        if suspended.update(suspended_at=None):
            audit_write(
                "tenant.resumed", actor=actor, tenant_id=tenant.pk, target=tenant.public_id, caller=caller
            )


def tenant_erase(*, tenant: Tenant, actor: str, caller: Caller | None = None) -> None:
    """Have a suspended tenant and everything of it erased; there is no way back. A second time changes nothing.

    Its secrets are unreadable within moments, its rows go once its sandboxes have (`sessions_app.erasing`). The audit
    trail stays. Raises `Conflict` for one that is not suspended: two steps, so that no slip erases.
    """
    with transaction.atomic():
        rows = Tenant.objects.filter(pk=tenant.pk, erase_asked_at=None)
        if rows.filter(suspended_at=None).exists():
            raise Conflict("Suspend the tenant first.")
        if not rows.update(erase_asked_at=now()):
            return
        audit_write(
            "tenant.erase_asked", actor=actor, tenant_id=tenant.pk, target=tenant.public_id, caller=caller
        )
        enqueue("sessions_app.tasks.tenants_erase")


def tenant_forget(*, tenant: Tenant) -> None:
    """Delete its people, their sign-ins and codes, and its own row: the last step of erasing it.

    Raises `ProtectedError` while anything else of it is there.
    """
    with transaction.atomic():
        people = User.objects.filter(tenant=tenant)
        addresses = list(people.values_list("email_key", flat=True))
        LoginFlow.objects.filter(email_key__in=addresses).delete()
        MailboxState.objects.filter(email_key__in=addresses).delete()
        people.delete()
        audit_write("tenant.erased", tenant_id=tenant.pk, target=tenant.public_id)
        Tenant.objects.filter(pk=tenant.pk).delete()


def _end_sign_ins(rows: QuerySet[SignIn], reason: str) -> int:
    return rows.filter(ended_at=None).update(ended_at=now(), end_reason=reason)


# ---- Sign-ins and their tokens


def sign_in_create(*, user: User, caller: Caller) -> SignIn:
    """Note that this person has proven their mailbox; a new device is told by mail (production)."""
    with transaction.atomic():
        earlier = SignIn.objects.filter(user=user)
        is_new_device = earlier.exists() and not earlier.filter(user_agent=caller.user_agent).exists()
        sign_in = SignIn.objects.create(
            family=new_id("fam"),
            user=user,
            token_version=user.token_version,
            created_at=now(),
            source=source_of(caller.address),
            user_agent=caller.user_agent,
        )
        User.objects.filter(pk=user.pk).update(last_login=sign_in.created_at)
        audit_write(
            "login.succeeded",
            actor=user.public_id,
            tenant_id=user.tenant_id,
            target=user.public_id,
            caller=caller,
        )
        if is_new_device and settings.E2A.production:
            enqueue("accounts.tasks.sign_in_notice_send", sign_in_id=sign_in.pk)
    return sign_in


def tokens_refresh(*, refresh_token: str, caller: Caller) -> SignedIn:
    """Spend a refresh token for a new pair; spending one twice ends its sign-in. Raises `Unauthenticated`."""
    token = (
        RefreshToken.objects.select_related("sign_in__user__tenant")
        .filter(digest__in=refresh_digests(refresh_token), expires_at__gt=now())
        .first()
    )
    if token is None or not token.sign_in.is_live:
        raise _no_refresh()
    with transaction.atomic(durable=True):
        if RefreshToken.objects.filter(pk=token.pk, spent_at=None).update(spent_at=now()):
            # Ending the sign-in meanwhile must win: the row lock makes the two take turns.
            if SignIn.objects.filter(pk=token.sign_in_id, ended_at=None).update(ended_at=None):
                return tokens_issue(token.sign_in)
        else:
            user = token.sign_in.user
            _end_sign_ins(SignIn.objects.filter(pk=token.sign_in_id), "reuse")
            audit_write(
                "refresh.reused",
                actor=user.public_id,
                tenant_id=user.tenant_id,
                target=user.public_id,
                caller=caller,
            )
    raise _no_refresh()


def logout(*, principal: Principal, caller: Caller) -> None:
    """End the sign-in of an account token: it and its refresh tokens are refused from now on."""
    sign_in_end(family=principal.family or "", caller=caller)


def sign_in_end(*, family: str, caller: Caller) -> None:
    """End a sign-in by its family. One that has ended or is unknown stays so."""
    with transaction.atomic():
        sign_in = SignIn.objects.select_related("user").filter(family=family).first()
        if sign_in is not None and _end_sign_ins(SignIn.objects.filter(pk=sign_in.pk), "logout"):
            user = sign_in.user
            audit_write(
                "logout", actor=user.public_id, tenant_id=user.tenant_id, target=user.public_id, caller=caller
            )


def tokens_issue(sign_in: SignIn) -> SignedIn:
    """A fresh pair of tokens for that sign-in."""
    token, expires_at = account_token_issue(sign_in.user, sign_in=sign_in)
    refresh_token = "e2a_refresh_" + secrets.token_urlsafe(32)
    moment = now()
    RefreshToken.objects.create(
        sign_in=sign_in,
        digest=refresh_digests(refresh_token)[0],
        created_at=moment,
        expires_at=moment + seconds(REFRESH_SECONDS),
    )
    return SignedIn(sign_in.user, sign_in, expires_at, token=token, refresh_token=refresh_token)


def _no_refresh() -> Unauthenticated:
    return Unauthenticated("This refresh token is not valid (any more).")


# ---- Old rows


def old_rows_purge() -> None:
    """Delete what nothing needs any more: flows after a day, sign-ins whose tokens are all dead."""
    moment = now()
    LoginFlow.objects.filter(created_at__lt=moment - seconds(24 * 3600)).delete()
    recent = LoginFlow.objects.values("email_key")
    MailboxState.objects.filter(failures_in_a_row=0).exclude(email_key__in=recent).delete()
    RefreshToken.objects.filter(expires_at__lte=moment).delete()
    SignIn.objects.filter(created_at__lt=moment - seconds(REFRESH_SECONDS), refresh_tokens=None).delete()

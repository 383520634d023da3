"""People, tenants, and signing in by a code that was mailed.

What must survive a refusal (failed tries, a revoked family) is committed in a transaction of its own before the
refusal is raised. The row of `MailboxState` is the lock: one code of an address is sent or tried at a time.
"""

from __future__ import annotations

import datetime as dt
import hmac
import secrets
from dataclasses import dataclass, field

import structlog
from django.conf import settings
from django.db import IntegrityError, transaction
from django.db.models import F, QuerySet

from accounts import codes
from accounts.addresses import address_clean, address_key
from accounts.audit import Caller, audit_write
from accounts.limits import source_hit, source_of
from accounts.models import LoginFlow, MailboxState, RefreshToken, SignIn, Tenant, User
from accounts.principal import Principal
from accounts.tokens import account_token_issue, refresh_digests
from e2a.core import rate_limits
from e2a.core.clock import now, seconds
from e2a.core.enqueue import enqueue
from e2a.core.errors import RateLimited, Unauthenticated
from e2a.core.ids import new_id

log = structlog.get_logger(__name__)

CODE_SECONDS = 300
MAX_TRIES = 5
MAX_LIVE_FLOWS = 3
LONG_CODES_AFTER = 20
SENDS = 5
SENDS_PER_SOURCE = 2
SENDS_KNOWN_BROWSER = 2
SEND_WINDOW_SECONDS = 15 * 60
RESEND_SECONDS = 60
REFRESH_SECONDS = 30 * 24 * 3600
MAIL_LEASE_SECONDS = 60
ALARM_FAILURES_PER_MINUTE = 300


class InvalidCode(Unauthenticated):
    """The code is wrong, used, expired or locked, or its owner may not sign in: not said which."""

    code = "invalid_code"
    title = "Invalid code"


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
        audit_write("user.disabled", actor=actor, tenant_id=user.tenant_id, target=user.public_id, caller=caller)


def user_enable(*, user: User, actor: str, caller: Caller | None = None) -> None:
    """Let a person sign in again. Old tokens stay dead; API keys that were not revoked work again."""
    with transaction.atomic():
        User.objects.filter(pk=user.pk).update(is_active=True)
        audit_write("user.enabled", actor=actor, tenant_id=user.tenant_id, target=user.public_id, caller=caller)


def tenant_suspend(*, tenant: Tenant, actor: str, caller: Caller | None = None) -> None:
    """Shut a tenant out: its people and API keys are refused from now on. A second time changes nothing."""
    with transaction.atomic():
        if not Tenant.objects.filter(pk=tenant.pk, suspended_at=None).update(suspended_at=now()):
            return
        User.objects.filter(tenant=tenant).update(token_version=F("token_version") + 1)
        _end_sign_ins(SignIn.objects.filter(user__tenant=tenant), "suspended")
        audit_write("tenant.suspended", actor=actor, tenant_id=tenant.pk, target=tenant.public_id, caller=caller)


def tenant_resume(*, tenant: Tenant, actor: str, caller: Caller | None = None) -> None:
    """Let a suspended tenant in again. Its people sign in anew; its API keys work at once."""
    with transaction.atomic():
        if Tenant.objects.filter(pk=tenant.pk).exclude(suspended_at=None).update(suspended_at=None):
            audit_write("tenant.resumed", actor=actor, tenant_id=tenant.pk, target=tenant.public_id, caller=caller)


def _end_sign_ins(rows: QuerySet[SignIn], reason: str) -> int:
    return rows.filter(ended_at=None).update(ended_at=now(), end_reason=reason)


# ---- Asking for a code


def login_start(
    *, email: str, caller: Caller, known_browser: bool = False, replaces: str | None = None
) -> str:
    """Open a flow and have its code mailed; returns the login id. The same for every address, known or not.

    `replaces` is the login id of an earlier flow of the same page, whose code dies. Raises `AddressError`, and
    `RateLimited`: 5 in 15 minutes an address (2 more for a browser that signed in as it before), of which one source
    may use 2; 20 an hour a source; one a minute for the same page.
    """
    address = address_clean(email)
    key = address_key(address)
    source = source_of(caller.address)
    source_hit("code-send", caller.address, limit=20, window_seconds=3600)
    with transaction.atomic():
        mailbox = _mailbox_lock(key)
        _replace(key, replaces)
        reserved = _send_permit(key, source, known_browser)
        flow = _flow_open(address, key, source, mailbox.failures_in_a_row >= LONG_CODES_AFTER, reserved)
        audit_write("login.started", target=flow.login_id, caller=caller)
        enqueue("accounts.tasks.login_code_send", flow_id=flow.pk)
    return flow.login_id


def _mailbox_lock(key: str) -> MailboxState:
    MailboxState.objects.get_or_create(email_key=key)
    # PostgreSQL: the row lock. SQLite: BEGIN IMMEDIATE has locked everything already.
    return MailboxState.objects.select_for_update().get(email_key=key)


def _replace(key: str, login_id: str | None) -> None:
    if login_id is None:
        return
    flow = _live_flows(key).filter(login_id=login_id).first()
    if flow is None:
        return
    wait = RESEND_SECONDS - (now() - flow.created_at).total_seconds()
    if wait > 0:
        raise RateLimited("A code was sent less than a minute ago.", retry_after=int(wait) + 1, limit=1)
    _flows_close(LoginFlow.objects.filter(pk=flow.pk), "replaced")


def _send_permit(key: str, source: str, known_browser: bool) -> bool:
    """Whether this send comes out of a known browser's reserve. Raises `RateLimited`. Needs the mailbox lock."""
    since = now() - seconds(SEND_WINDOW_SECONDS)
    sends = LoginFlow.objects.filter(email_key=key, created_at__gt=since).order_by("created_at")
    if known_browser and sends.filter(is_known_browser=True).count() < SENDS_KNOWN_BROWSER:
        return True
    open_to_all = sends.filter(is_known_browser=False)
    _refuse_over(open_to_all, SENDS)
    if settings.E2A.production:
        _refuse_over(open_to_all.filter(source=source), SENDS_PER_SOURCE)
    return False


def _refuse_over(sends: QuerySet[LoginFlow], limit: int) -> None:
    times = list(sends.values_list("created_at", flat=True))
    if len(times) >= limit:
        frees_at = times[-limit] + seconds(SEND_WINDOW_SECONDS)
        wait = (frees_at - now()).total_seconds()
        raise RateLimited("Too many codes were asked for.", retry_after=int(wait) + 1, limit=limit)


def _flow_open(address: str, key: str, source: str, is_long: bool, reserved: bool) -> LoginFlow:
    moment = now()
    signing = settings.E2A.signing_keys.newest
    login_id, nonce = new_id("lgn"), codes.nonce_make()
    code = codes.code_of(signing, login_id=login_id, nonce=nonce, is_long=is_long)
    older = _live_flows(key).order_by("-pk").values_list("pk", flat=True)
    _flows_close(LoginFlow.objects.filter(pk__in=list(older)[MAX_LIVE_FLOWS - 1 :]), "evicted")
    return LoginFlow.objects.create(
        login_id=login_id,
        email=address,
        email_key=key,
        nonce=nonce,
        code_key_id=signing.id,
        code_digest=codes.digest(signing, login_id=login_id, email_key=key, code=code),
        is_long=is_long,
        source=source,
        is_known_browser=reserved,
        created_at=moment,
        expires_at=moment + seconds(CODE_SECONDS),
    )


def _live_flows(key: str) -> QuerySet[LoginFlow]:
    return LoginFlow.objects.filter(email_key=key, closed_at=None, expires_at__gt=now())


def _flows_close(rows: QuerySet[LoginFlow], reason: str) -> int:
    return rows.filter(closed_at=None).update(closed_at=now(), close_reason=reason)


# ---- The mail


def flow_claim_for_mail(flow_id: int) -> LoginFlow | None:
    """The flow, if its code is still to be mailed and nobody else is at it; the claim lapses after 60 s."""
    moment = now()
    waiting = LoginFlow.objects.filter(pk=flow_id, mailed_at=None, closed_at=None, expires_at__gt=moment)
    unclaimed = waiting.filter(mail_claimed_at=None) | waiting.filter(
        mail_claimed_at__lte=moment - seconds(MAIL_LEASE_SECONDS)
    )
    if not unclaimed.update(mail_claimed_at=moment):
        return None
    return LoginFlow.objects.get(pk=flow_id)


def flow_recipient(flow: LoginFlow) -> str | None:
    """Where the code goes: the stored address of a known user, else the one that was given. None: it is not sent."""
    user = User.objects.select_related("tenant").filter(email_key=flow.email_key).first()
    if user is None:
        return flow.email
    return user.email if user.is_active and user.tenant.is_active else None


def flow_code(flow: LoginFlow) -> str | None:
    """The code of a flow, derived anew; None when its signing key has left the ring."""
    signing = settings.E2A.signing_keys.find(flow.code_key_id)
    if signing is None:
        return None
    return codes.code_of(signing, login_id=flow.login_id, nonce=flow.nonce, is_long=flow.is_long)


def flow_mail_done(flow: LoginFlow, *, sent: bool) -> None:
    """Close the claim: mailed, or to be tried again by the sweep."""
    LoginFlow.objects.filter(pk=flow.pk).update(
        mailed_at=now() if sent else None, mail_claimed_at=flow.mail_claimed_at if sent else None
    )


def flows_to_mail() -> list[int]:
    """Live flows whose mail is overdue: the broker or the mail server was down when they were asked for."""
    moment = now()
    overdue = LoginFlow.objects.filter(
        mailed_at=None, closed_at=None, expires_at__gt=moment, created_at__lte=moment - seconds(5)
    ).exclude(mail_claimed_at__gt=moment - seconds(MAIL_LEASE_SECONDS))
    return list(overdue.values_list("pk", flat=True)[:200])


# ---- Trying a code


def login_verify(*, email: str, code: str, login_id: str | None = None, caller: Caller) -> SignedIn:
    """Trade a code for tokens; the account is made at the first time. Raises `InvalidCode`, `RateLimited`."""
    sign_in = login_redeem(email=email, code=code, login_id=login_id, caller=caller)
    with transaction.atomic():
        return _tokens_issue(sign_in)


def login_redeem(*, email: str, code: str, login_id: str | None = None, caller: Caller) -> SignIn:
    """Trade a code for a sign-in, as the dashboard does. Raises `InvalidCode`, `RateLimited`.

    Without `login_id` the try counts against every live flow of the address.
    """
    source_hit("code-verify", caller.address, limit=30, window_seconds=300)
    key = address_key(email)
    flow = _try_code(key, codes.normalised(code), login_id)
    if flow is None:
        audit_write("login.refused", target=login_id or "", caller=caller)
        _failure_alarm()
        raise InvalidCode("This code is not valid (any more). Ask for a new one.")
    user = user_get_or_create(address=flow.email)
    if not user.is_active or not user.tenant.is_active:
        audit_write(
            "login.refused", actor=user.public_id, tenant_id=user.tenant_id, target=flow.login_id, caller=caller
        )
        raise InvalidCode("This code is not valid (any more). Ask for a new one.")
    return _sign_in_create(user, caller)


def _try_code(key: str, code: str, login_id: str | None) -> LoginFlow | None:
    """The flow whose code this is, which is spent with it; None for a failure, which is counted and committed."""
    with transaction.atomic(durable=True):
        mailbox = MailboxState.objects.filter(email_key=key)
        # Counts a failure ahead and takes the row's lock in one statement: tries of an address go one by one.
        if not mailbox.update(failures_in_a_row=F("failures_in_a_row") + 1):
            return None
        flows = _live_flows(key).filter(failures__lt=MAX_TRIES)
        if login_id is not None:
            flows = flows.filter(login_id=login_id)
        tried = list(flows)
        right = [flow for flow in tried if _is_right(flow, code)]
        if right and _flows_close(LoginFlow.objects.filter(pk=right[0].pk), "used"):
            mailbox.update(failures_in_a_row=0)
            return right[0]
        rows = LoginFlow.objects.filter(pk__in=[flow.pk for flow in tried])
        rows.update(failures=F("failures") + 1)
        _flows_close(rows.filter(failures__gte=MAX_TRIES), "tries")
        if mailbox.filter(failures_in_a_row__gte=LONG_CODES_AFTER).exists():
            _flows_close(_live_flows(key).filter(is_long=False), "failures")
        return None


def _is_right(flow: LoginFlow, code: str) -> bool:
    signing = settings.E2A.signing_keys.find(flow.code_key_id)
    if signing is None:
        return False
    tried = codes.digest(signing, login_id=flow.login_id, email_key=flow.email_key, code=code)
    return hmac.compare_digest(tried, flow.code_digest)


def _failure_alarm() -> None:
    try:
        rate_limits.hit("code-failures", "all", limit=ALARM_FAILURES_PER_MINUTE, window_seconds=60)
    except RateLimited:
        log.error("accounts.many_refused_codes", per_minute=ALARM_FAILURES_PER_MINUTE)


def _sign_in_create(user: User, caller: Caller) -> SignIn:
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
            "login.succeeded", actor=user.public_id, tenant_id=user.tenant_id, target=user.public_id, caller=caller
        )
        if is_new_device and settings.E2A.production:
            enqueue("accounts.tasks.sign_in_notice_send", sign_in_id=sign_in.pk)
    return sign_in


# ---- Tokens


def tokens_refresh(*, refresh_token: str, caller: Caller) -> SignedIn:
    """Spend a refresh token for a new pair. Spending one twice ends its whole sign-in. Raises `Unauthenticated`."""
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
                return _tokens_issue(token.sign_in)
        else:
            user = token.sign_in.user
            _end_sign_ins(SignIn.objects.filter(pk=token.sign_in_id), "reuse")
            audit_write(
                "refresh.reused", actor=user.public_id, tenant_id=user.tenant_id, target=user.public_id, caller=caller
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
            audit_write("logout", actor=user.public_id, tenant_id=user.tenant_id, target=user.public_id, caller=caller)


def _tokens_issue(sign_in: SignIn) -> SignedIn:
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
    """Delete what no limit, check or token needs any more: flows after a day, sign-ins whose tokens are all dead."""
    moment = now()
    LoginFlow.objects.filter(created_at__lt=moment - seconds(24 * 3600)).delete()
    recent = LoginFlow.objects.values("email_key")
    MailboxState.objects.filter(failures_in_a_row=0).exclude(email_key__in=recent).delete()
    RefreshToken.objects.filter(expires_at__lte=moment).delete()
    SignIn.objects.filter(created_at__lt=moment - seconds(REFRESH_SECONDS), refresh_tokens=None).delete()

"""Signing in by a code that was mailed: asking for one, mailing it, trying it (SECURITY 1).

Failed tries are committed in a transaction of their own before the refusal is raised. The row of
`MailboxState` is the lock: one code of an address is sent or tried at a time.
"""

from __future__ import annotations

import hmac

import structlog
from django.conf import settings
from django.db import transaction
from django.db.models import F, QuerySet

from accounts import codes
from accounts.addresses import address_clean, address_key
from accounts.audit import Caller, audit_write
from accounts.limits import source_hit, source_of
from accounts.models import LoginFlow, MailboxState, SignIn, User
from accounts.services import SignedIn, sign_in_create, tokens_issue, user_get_or_create
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
MAIL_LEASE_SECONDS = 60
ALARM_FAILURES_PER_MINUTE = 300


class InvalidCode(Unauthenticated):
    """The code is wrong, used, expired or locked, or its owner may not sign in: not said which."""

    code = "invalid_code"
    title = "Invalid code"


# ---- Asking for a code


def login_start(
    *, email: str, caller: Caller, known_browser: bool = False, replaces: str | None = None
) -> str:
    """Open a flow and have its code mailed; returns the login id. The same for every address, known or not.

    `replaces` is the login id of an earlier flow of the same page, whose code dies. Raises `AddressError`,
    and `RateLimited`: 5 in 15 minutes an address (2 more for a browser that signed in as it before), of
    which one source may use 2; 20 an hour a source; one a minute for the same page.
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
    """Whether this send uses a known browser's reserve. Needs the mailbox lock. Raises `RateLimited`."""
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
    """Where the code goes: a known user's stored address, else the one that was given. None: nowhere."""
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
        return tokens_issue(sign_in)


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
            "login.refused",
            actor=user.public_id,
            tenant_id=user.tenant_id,
            target=flow.login_id,
            caller=caller,
        )
        raise InvalidCode("This code is not valid (any more). Ask for a new one.")
    return sign_in_create(user=user, caller=caller)


def _try_code(key: str, code: str, login_id: str | None) -> LoginFlow | None:
    """The flow whose code this is, now spent; None for a failure, which is counted and committed."""
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

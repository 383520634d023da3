"""Mail and housekeeping, on the default queue, `control`. Arguments are ids only."""

from __future__ import annotations

import smtplib

import structlog
from celery import shared_task
from django.conf import settings
from django.contrib.sessions.backends.db import SessionStore
from django.template.loader import render_to_string

from accounts import login, services
from accounts.codes import spaced
from accounts.mail import mail_send
from accounts.models import SignIn
from e2a.core.enqueue import enqueue

log = structlog.get_logger(__name__)


@shared_task(name="accounts.tasks.login_code_send")
def login_code_send(flow_id: int) -> None:
    """Mail the code of a flow, once. The code is derived here; a failure is tried again by the sweep."""
    flow = login.flow_claim_for_mail(flow_id)
    if flow is None:
        return
    to, code = login.flow_recipient(flow), login.flow_code(flow)
    if to is None or code is None:
        login.flow_mail_done(flow, sent=True)
        return
    text = render_to_string(
        "accounts/mail/code.txt",
        {"code": spaced(code), "minutes": login.CODE_SECONDS // 60, "site": settings.E2A.public_url},
    )
    try:
        mail_send(to=to, subject="Your e2a sign-in code", text=text)
    except (OSError, smtplib.SMTPException) as error:
        log.warning("mail.failed", login_id=flow.login_id, error=type(error).__name__)
        login.flow_mail_done(flow, sent=False)
        return
    login.flow_mail_done(flow, sent=True)


@shared_task(name="accounts.tasks.login_codes_sweep")
def login_codes_sweep() -> None:
    """Every few seconds: ask again for mails that did not leave, while their codes still live."""
    for flow_id in login.flows_to_mail():
        enqueue("accounts.tasks.login_code_send", flow_id=flow_id)


@shared_task(name="accounts.tasks.sign_in_notice_send")
def sign_in_notice_send(sign_in_id: int) -> None:
    """Tell a person that somebody signed in from a browser or program not seen before (SECURITY 1.13)."""
    sign_in = SignIn.objects.select_related("user").filter(pk=sign_in_id).first()
    if sign_in is None:
        return
    text = render_to_string("accounts/mail/notice.txt", {"sign_in": sign_in, "site": settings.E2A.public_url})
    mail_send(to=sign_in.user.email, subject="New sign-in to e2a", text=text)


@shared_task(name="accounts.tasks.purge")
def purge() -> None:
    """Every hour: delete old flows, dead tokens and expired dashboard sessions."""
    services.old_rows_purge()
    SessionStore.clear_expired()

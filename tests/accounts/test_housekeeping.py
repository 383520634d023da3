"""Old rows go, what still counts stays; mails that did not leave are tried again."""

from __future__ import annotations

import datetime as dt
import smtplib
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import time_machine
from django.core import mail

from accounts.models import LoginFlow, MailboxState, RefreshToken, SignIn, User
from accounts.services import user_get_or_create
from accounts.tasks import login_code_send, login_codes_sweep, purge, sign_in_notice_send
from tests.accounts.mailbox import mailed_code
from tests.fixtures import Api

pytestmark = pytest.mark.django_db
NOON = dt.datetime(2026, 11, 24, 12, 0, tzinfo=dt.UTC)


def test_old_rows_are_deleted_and_failure_counts_are_not(
    ask: Callable[[str], str], attempt: Callable[..., Any], signed_in: Callable[[str], dict[str, Any]]
) -> None:
    with time_machine.travel(NOON, tick=False) as clock:
        signed_in("a@example.com")
        ask("b@example.com")
        attempt("b@example.com", "nothing")
        clock.shift(25 * 3600)
        purge()
        assert not LoginFlow.objects.exists()
        assert [state.email_key for state in MailboxState.objects.all()] == ["b@example.com"]
        assert (SignIn.objects.count(), RefreshToken.objects.count()) == (1, 1)
        clock.shift(30 * 24 * 3600)
        purge()
        assert (SignIn.objects.count(), RefreshToken.objects.count()) == (0, 0)
        assert User.objects.count() == 1


def test_a_mail_is_sent_once_however_often_its_task_runs(ask: Callable[[str], str]) -> None:
    flow = LoginFlow.objects.get(login_id=ask("a@example.com"))
    for _ in range(3):
        login_code_send(flow.pk)
    assert len(mail.outbox) == 1


def test_a_mail_that_could_not_leave_is_sent_by_the_sweep(
    ask: Callable[[str], str], django_capture_on_commit_callbacks: Any
) -> None:
    with time_machine.travel(NOON, tick=False) as clock:
        flow = LoginFlow.objects.get(login_id=ask("a@example.com"))
        with mock.patch("accounts.tasks.mail_send", side_effect=smtplib.SMTPServerDisconnected("gone")):
            login_code_send(flow.pk)
        assert not mail.outbox
        clock.shift(10)
        with (
            mock.patch("celery.app.task.Task.apply_async") as sent,
            django_capture_on_commit_callbacks(execute=True),
        ):
            login_codes_sweep()
        assert sent.call_args.kwargs["kwargs"] == {"flow_id": flow.pk}
        login_code_send(flow.pk)
        assert len(mail.outbox) == 1


def test_1_13_a_sign_in_from_a_new_device_is_told_by_mail(
    in_production: None, alice: User, ask: Callable[[str], str], django_capture_on_commit_callbacks: Any
) -> None:
    def sign_in(agent: str) -> list[str]:
        start = Api().client.post(
            "/v1/auth/login",
            {"email": alice.email},
            "application/json",
            secure=True,
            REMOTE_ADDR=agent_address[agent],
        )
        login_id = start.json()["login_id"]
        body = {"email": alice.email, "code": mailed_code(login_id), "login_id": login_id}
        with (
            mock.patch("celery.app.task.Task.apply_async") as sent,
            django_capture_on_commit_callbacks(execute=True),
        ):
            answer = Api().client.post(
                "/v1/auth/verify-otp", body, "application/json", secure=True, headers={"User-Agent": agent}
            )
        assert answer.status_code == 200
        return [str(call.kwargs["kwargs"]) for call in sent.call_args_list]

    agent_address = {"firefox": "203.0.113.1", "curl": "203.0.113.2"}
    assert sign_in("firefox") == [], "the first sign-in of an account is no news"
    assert sign_in("firefox") == []
    told = sign_in("curl")
    made = SignIn.objects.latest("pk")
    assert told == [str({"sign_in_id": made.pk})]
    sign_in_notice_send(made.pk)
    assert mail.outbox[-1].to == ["alice@example.com"]
    assert "curl" in str(mail.outbox[-1].body)


def test_an_account_is_made_once(db: None) -> None:
    assert user_get_or_create(address="a@example.com") == user_get_or_create(address="A@EXAMPLE.com")

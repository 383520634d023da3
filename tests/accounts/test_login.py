"""Signing in by a mailed code, over HTTP (CONTRACT 2, SECURITY 1)."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import kombu.exceptions
import pytest
import time_machine
from django.core import mail
from django.db import connection

from accounts.models import LoginFlow, MailboxState, User
from accounts.services import tenant_suspend, user_disable
from e2a.core.models import AuditEvent
from tests.accounts.at_once import at_once
from tests.accounts.mailbox import mailed_code, wrong
from tests.fixtures import Api

pytestmark = pytest.mark.django_db

Ask = Callable[[str], str]
Attempt = Callable[..., Any]
NOON = dt.datetime(2026, 11, 24, 12, 0, tzinfo=dt.UTC)


def refused(answer: Any) -> bool:
    """The one answer to wrong, used, expired and locked codes alike."""
    return bool(answer.status_code == 401 and answer.json()["code"] == "invalid_code")


def test_a_code_signs_a_new_person_in_and_makes_the_account(anyone: Api, ask: Ask, attempt: Attempt) -> None:
    login_id = ask("new@example.com")
    assert not User.objects.filter(email="new@example.com").exists(), "the account is made at first verify"
    answer = attempt("new@example.com", mailed_code(login_id))
    body = answer.json()
    user = User.objects.get(email="new@example.com")
    assert answer.status_code == 200
    assert set(body) == {"token", "user_id", "email", "expires_at", "refresh_token"}
    assert (body["user_id"], body["email"]) == (user.public_id, "new@example.com")
    assert answer.headers["Cache-Control"] == "no-store"
    me = Api(body["token"]).get("/v1/me").json()
    assert me == {
        "user_id": user.public_id,
        "email": "new@example.com",
        "tenant": {
            "tenant_id": user.tenant.public_id,
            "name": "new@example.com",
            "plan_tier": "free",
            "limits": {"max_live_sandboxes": 20, "max_tasks_queued": 20},
        },
    }


def test_signing_in_again_finds_the_same_account_however_the_address_is_written(
    alice: User, ask: Ask, attempt: Attempt
) -> None:
    login_id = ask("  ALICE@Example.COM ")
    answer = attempt("Alice@EXAMPLE.com", mailed_code(login_id), login_id)
    assert answer.json()["user_id"] == alice.public_id
    assert mail.outbox[-1].to == ["alice@example.com"], "1.11: mail goes only to the stored address"


def test_1_1_a_code_has_six_digits_and_works_for_300_seconds(ask: Ask, attempt: Attempt) -> None:
    with time_machine.travel(NOON, tick=False) as clock:
        first, second = ask("a@example.com"), ask("a@example.com")
        codes = mailed_code(first), mailed_code(second)
        assert all(len(code) == 6 and code.isascii() and code.isdigit() for code in codes)
        clock.shift(299)
        assert attempt("a@example.com", codes[0], first).status_code == 200
        clock.shift(2)
        assert refused(attempt("a@example.com", codes[1], second))


def test_1_2_a_fourth_flow_of_an_address_evicts_the_oldest(ask: Ask, attempt: Attempt) -> None:
    flows = [ask("a@example.com") for _ in range(4)]
    codes = [mailed_code(flow) for flow in flows[1:]]
    assert LoginFlow.objects.get(login_id=flows[0]).close_reason == "evicted"
    for flow, code in zip(flows[1:], codes, strict=True):
        assert attempt("a@example.com", code, flow).status_code == 200


def test_1_3_the_sixth_try_is_refused_even_with_the_right_code(ask: Ask, attempt: Attempt) -> None:
    login_id = ask("a@example.com")
    code = mailed_code(login_id)
    spellings = ["a@example.com", "A@Example.com", "a@example.com ", " A@EXAMPLE.COM", "a@EXAMPLE.com\t"]
    for number, spelling in enumerate(spellings):
        headers = {"X-Forwarded-For": f"203.0.113.{number}"}
        assert refused(attempt(spelling, wrong(code), headers=headers))
    assert refused(attempt("a@example.com", code, login_id))
    assert refused(attempt("a@example.com", code))


def test_1_3_the_fifth_try_may_still_be_the_right_one(ask: Ask, attempt: Attempt) -> None:
    login_id = ask("a@example.com")
    code = mailed_code(login_id)
    for _ in range(4):
        assert refused(attempt("a@example.com", wrong(code), login_id))
    assert attempt("a@example.com", code, login_id).status_code == 200


def test_a_bare_try_counts_against_every_live_flow_of_the_address_and_of_no_other(
    ask: Ask, attempt: Attempt
) -> None:
    mine = [ask("a@example.com") for _ in range(3)]
    codes = [mailed_code(flow) for flow in mine]
    other = ask("b@example.com")
    for _ in range(5):
        assert refused(attempt("a@example.com", "000000x"))
    for flow, code in zip(mine, codes, strict=True):
        assert refused(attempt("a@example.com", code, flow))
    assert attempt("b@example.com", mailed_code(other), other).status_code == 200


@pytest.mark.django_db(transaction=True)
def test_1_3_a_hundred_wrong_tries_at_once_are_five(ask: Ask) -> None:
    login_id = ask("a@example.com")
    code = mailed_code(login_id)
    body = {"email": "a@example.com", "code": wrong(code), "login_id": login_id}
    answers = at_once(100, lambda number: Api().post("/v1/auth/verify-otp", body))
    assert [answer.status_code for answer in answers] == [401] * 100
    assert LoginFlow.objects.get(login_id=login_id).failures == 5
    assert MailboxState.objects.get(email_key="a@example.com").failures_in_a_row == 100
    assert refused(Api().post("/v1/auth/verify-otp", body | {"code": code}))


def test_1_4_failures_survive_the_refusal_and_a_new_code(ask: Ask, attempt: Attempt) -> None:
    for expected in (1, 2, 3):
        login_id = ask("a@example.com")
        refused(attempt("a@example.com", wrong(mailed_code(login_id)), login_id))
        assert MailboxState.objects.get(email_key="a@example.com").failures_in_a_row == expected
    assert attempt("a@example.com", mailed_code(ask("a@example.com"))).status_code == 200
    assert MailboxState.objects.get(email_key="a@example.com").failures_in_a_row == 0


def test_1_4_the_count_is_kept_when_the_request_fails_later(ask: Ask, anyone: Api) -> None:
    login_id = ask("a@example.com")
    with mock.patch("accounts.login.audit_write", side_effect=RuntimeError("disk full")):
        answer = anyone.post("/v1/auth/verify-otp", {"email": "a@example.com", "code": "nothing"})
    assert answer.status_code == 500
    assert "disk full" not in answer.content.decode()
    assert LoginFlow.objects.get(login_id=login_id).failures == 1


def test_1_4_after_twenty_failures_in_a_row_codes_have_eighty_bits(ask: Ask, attempt: Attempt) -> None:
    ask("a@example.com")
    for _ in range(19):
        assert refused(attempt("a@example.com", "nothing"))
    short = ask("a@example.com")
    short_code = mailed_code(short)
    assert len(short_code) == 6
    assert refused(attempt("a@example.com", "nothing", "lgn_other"))
    assert refused(attempt("a@example.com", short_code, short)), "live 6-digit codes die"
    long = ask("a@example.com")
    long_code = mailed_code(long)
    assert len(long_code) == 16
    assert set(long_code) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567")
    typed = "-".join(long_code.lower()[start : start + 4] for start in range(0, 16, 4))
    assert attempt("a@example.com", typed, long).status_code == 200
    assert len(mailed_code(ask("a@example.com"))) == 6, "until the next success"


@pytest.mark.django_db(transaction=True)
def test_1_5_ten_verifies_of_the_right_code_at_once_sign_in_once(ask: Ask) -> None:
    login_id = ask("a@example.com")
    body = {"email": "a@example.com", "code": mailed_code(login_id), "login_id": login_id}
    answers = at_once(10, lambda number: Api().post("/v1/auth/verify-otp", body))
    assert sorted(answer.status_code for answer in answers) == [200] + [401] * 9
    assert User.objects.filter(email="a@example.com").count() == 1


def test_1_5_a_code_is_used_once(ask: Ask, attempt: Attempt) -> None:
    login_id = ask("a@example.com")
    code = mailed_code(login_id)
    assert attempt("a@example.com", code).status_code == 200
    assert refused(attempt("a@example.com", code))


def test_1_6_an_address_gets_five_codes_in_fifteen_minutes(anyone: Api, ask: Ask) -> None:
    with time_machine.travel(NOON, tick=False) as clock:
        for _ in range(5):
            ask("a@example.com")
            clock.shift(60)
        answer = anyone.post("/v1/auth/login", {"email": "A@example.com"})
        assert (answer.status_code, answer.json()["code"]) == (429, "rate_limited")
        assert answer.headers["Retry-After"] == "601"
        assert answer.headers["RateLimit-Limit"] == "5"
        ask("b@example.com")
        clock.shift(601)
        ask("a@example.com")


def test_1_6_limits_are_the_same_for_known_and_unknown_addresses(alice: User, anyone: Api, ask: Ask) -> None:
    with time_machine.travel(NOON, tick=False):
        answers = []
        for email in ("alice@example.com", "unknown@example.com"):
            for _ in range(5):
                ask(email)
            answer = anyone.post("/v1/auth/login", {"email": email})
            answers.append(
                (answer.status_code, answer.headers["Retry-After"], answer.json() | {"request_id": ""})
            )
    assert answers[0] == answers[1]
    assert answers[0][0] == 429


def test_1_6_in_production_one_source_may_use_two_of_the_five(in_production: None, anyone: Api) -> None:
    def status(address: str) -> int:
        answer = anyone.client.post(
            "/v1/auth/login",
            {"email": "a@example.com"}, content_type="application/json", REMOTE_ADDR=address,
            secure=True,
        )  # fmt: skip
        return int(answer.status_code)

    assert [status("203.0.113.1") for _ in range(3)] == [200, 200, 429]
    assert [status(f"2001:db8::{number}") for number in (1, 2, 3)] == [200, 200, 429], (
        "an IPv6 /64 is one source"
    )
    assert [status("203.0.113.2"), status("203.0.113.3")] == [200, 429], "five for the address"


def test_1_6_in_production_a_source_may_try_thirty_codes_in_five_minutes(
    in_production: None, anyone: Api
) -> None:
    def status() -> int:
        body = {"email": "a@example.com", "code": "000000"}
        answer = anyone.client.post("/v1/auth/verify-otp", body, content_type="application/json", secure=True)
        return int(answer.status_code)

    assert [status() for _ in range(31)] == [401] * 30 + [429]


def test_1_7_the_answer_is_the_same_for_every_kind_of_address(
    alice: User, bob: User, mallory: User, anyone: Api
) -> None:
    user_disable(user=bob, actor="test")
    tenant_suspend(tenant=mallory.tenant, actor="test")
    answers = []
    for email in ("alice@example.com", "bob@example.com", "mallory@example.com", "nobody@example.com"):
        answer = anyone.post("/v1/auth/login", {"email": email})
        body = answer.json()
        login_id = body.pop("login_id")
        answers.append((answer.status_code, body, len(login_id), sorted(answer.headers)))
    assert answers == [answers[0]] * 4
    assert answers[0][:2] == (200, {"status": "sent"})


def test_1_7_the_answer_is_the_same_with_the_broker_down_and_the_mail_goes_out_later(
    anyone: Api, django_capture_on_commit_callbacks: Any
) -> None:
    from accounts.login import flows_to_mail

    with (
        time_machine.travel(NOON, tick=False) as clock,
        mock.patch("celery.app.task.Task.apply_async", side_effect=kombu.exceptions.OperationalError("down")),
    ):
        with django_capture_on_commit_callbacks(execute=True):
            answer = anyone.post("/v1/auth/login", {"email": "a@example.com"})
        assert (answer.status_code, answer.json()["status"]) == (200, "sent")
        assert flows_to_mail() == []
        clock.shift(6)
        flow = LoginFlow.objects.get(login_id=answer.json()["login_id"])
        assert flows_to_mail() == [flow.pk]
        assert len(mailed_code(flow.login_id)) == 6
        assert flows_to_mail() == []


def test_1_7_suspended_and_disabled_people_get_no_mail_and_no_way_in(
    bob: User, mallory: User, ask: Ask, attempt: Attempt
) -> None:
    early = ask("bob@example.com")
    code = mailed_code(early)
    sent = len(mail.outbox)
    user_disable(user=bob, actor="test")
    tenant_suspend(tenant=mallory.tenant, actor="test")
    assert refused(attempt("bob@example.com", code, early)), "a right code, but the owner may not sign in"
    from accounts.tasks import login_code_send

    for email in ("bob@example.com", "mallory@example.com"):
        login_code_send(LoginFlow.objects.get(login_id=ask(email)).pk)
    assert len(mail.outbox) == sent


def test_1_9_the_code_is_in_no_column_task_argument_or_log(
    ask: Ask, attempt: Attempt, caplog: pytest.LogCaptureFixture, django_capture_on_commit_callbacks: Any
) -> None:
    sent: list[Any] = []
    with (
        mock.patch("celery.app.task.Task.apply_async", side_effect=lambda **kwargs: sent.append(kwargs)),
        django_capture_on_commit_callbacks(execute=True),
    ):
        login_id = ask("a@example.com")
    code = mailed_code(login_id)
    attempt("a@example.com", wrong(code), login_id)
    attempt("a@example.com", code, login_id)
    flow = LoginFlow.objects.get(login_id=login_id)
    assert sent == [{"kwargs": {"flow_id": flow.pk}, "retry": False}]
    with connection.cursor() as cursor:
        for table in connection.introspection.table_names(cursor):
            cursor.execute(f'SELECT * FROM "{table}"')
            values = [value for row in cursor.fetchall() for value in row if isinstance(value, str)]
            assert not [value for value in values if value == code or f" {code}" in value], table
    assert code not in caplog.text
    assert len(flow.code_digest) == 64


def test_1_10_a_login_id_binds_the_code_to_its_flow(ask: Ask, attempt: Attempt) -> None:
    first, second = ask("a@example.com"), ask("a@example.com")
    code = mailed_code(first)
    assert refused(attempt("a@example.com", code, second))
    assert refused(attempt("a@example.com", code, "lgn_unknown"))
    assert refused(attempt("b@example.com", code, first))
    assert attempt("a@example.com", code).status_code == 200, "the bare form keeps working"


@pytest.mark.parametrize(
    "email",
    [
        "", " ", "alice", "alice@", "@example.com", "a@b", "a b@example.com", "a@example.com\n",
        "a@exa\rmple.com",
        "a@example.com,b@example.com", "a@example.com;b@example.com",
        "Alice <a@example.com>", '"a b"@example.com',
        "a@[127.0.0.1]", "a@127.0.0.1", "a@example..com", ".a@example.com", "a..b@example.com",
        "a@-example.com",
        "a" * 65 + "@example.com", "a@" + "b" * 250 + ".com", "al\u0131ce@example.com",
        "\u212aate@example.com",
        "ａ@example.com", "a＠example.com", "ﬁ@example.com", "a@example.com\u2028",
        5, None, True, ["a@example.com"], {"email": "a@example.com"},
    ],
)  # fmt: skip
def test_1_11_a_bad_address_is_a_400_that_names_the_field(anyone: Api, email: Any) -> None:
    answer = anyone.post("/v1/auth/login", {"email": email})
    assert answer.status_code == 400
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["errors"][0]["field"] == "email"
    assert not mail.outbox


@pytest.mark.parametrize("path", ["/v1/auth/login", "/v1/auth/verify-otp", "/v1/auth/refresh"])
@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"a"', b"5", b'{"email": NaN}', b"\xff",
        b'{"email": "\\ud800@example.com"}',
        b'{"email": "a@example.com", "email": "b@example.com"}', b"[" * 10000, b'{"a":' * 10000,
    ],
)  # fmt: skip
def test_a_body_that_is_no_good_is_a_400_problem(anyone: Api, path: str, body: bytes) -> None:
    answer = anyone.post(path, body)
    assert answer.status_code == 400
    assert answer.headers["Content-Type"] == "application/problem+json"


def test_an_unknown_field_is_refused_by_name(anyone: Api) -> None:
    answer = anyone.post("/v1/auth/login", {"email": "a@example.com", "is_staff": True})
    assert (answer.status_code, answer.json()["code"]) == (400, "unknown_field")
    assert not LoginFlow.objects.exists()


def test_1_12_spoofed_forwarded_addresses_raise_no_limit(in_production: None, anyone: Api) -> None:
    body = json.dumps({"email": "a@example.com"})
    statuses = [
        anyone.client.generic(
            "POST", "/v1/auth/login", body, content_type="application/json", secure=True,
            headers={"X-Forwarded-For": f"203.0.113.{number}"},
        ).status_code
        for number in range(3)
    ]  # fmt: skip
    assert statuses == [200, 200, 429]


def test_1_13_each_try_leaves_an_audit_row_without_the_code(ask: Ask, attempt: Attempt) -> None:
    login_id = ask("a@example.com")
    code = mailed_code(login_id)
    headers = {"User-Agent": "curl/8\x00 " + "x" * 300}
    attempt("a@example.com", wrong(code), login_id, headers=headers)
    attempt("a@example.com", code, login_id, headers=headers)
    rows = list(AuditEvent.objects.filter(action__startswith="login").order_by("pk"))
    assert [row.action for row in rows] == ["login.started", "login.refused", "login.succeeded"]
    assert rows[1].target == login_id
    assert rows[2].actor == User.objects.get().public_id
    assert rows[2].address == "127.0.0.1"
    assert rows[2].user_agent.startswith("curl/8 x")
    assert len(rows[2].user_agent) == 200
    assert not any(code in json.dumps(row.detail) for row in rows)


def test_an_authorization_header_is_not_looked_at_where_none_is_needed() -> None:
    assert Api("nonsense").post("/v1/auth/login", {"email": "a@example.com"}).status_code == 200


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE"])
def test_another_method_is_a_405_problem(anyone: Api, method: str) -> None:
    answer = anyone.request(method, "/v1/auth/login")
    assert (answer.status_code, answer.json()["code"]) == (405, "method_not_allowed")


@pytest.mark.django_db(transaction=True)
def test_first_sign_ins_of_one_address_at_once_make_one_account(ask: Ask) -> None:
    flows = [ask("a@example.com") for _ in range(3)]
    bodies = [{"email": "a@example.com", "code": mailed_code(flow), "login_id": flow} for flow in flows]
    answers = at_once(3, lambda number: Api().post("/v1/auth/verify-otp", bodies[number]))
    assert [answer.status_code for answer in answers] == [200] * 3
    assert len({answer.json()["user_id"] for answer in answers}) == 1


@pytest.mark.django_db(transaction=True)
def test_1_6_asking_at_once_does_not_pass_the_limit() -> None:
    answers = at_once(12, lambda number: Api().post("/v1/auth/login", {"email": "a@example.com"}))
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [429] * 7
    assert LoginFlow.objects.filter(closed_at=None).count() == 3

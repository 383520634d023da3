"""`/v1/api-keys` (CONTRACT 3, SECURITY 3)."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import time_machine

from accounts.models import User
from e2a.core.clock import now
from e2a.core.models import AuditEvent
from keys.models import ApiKey
from keys.services import SCOPES, ended_keys_tell
from tests.accounts.at_once import at_once
from tests.fixtures import Api

pytestmark = pytest.mark.django_db
NOON = dt.datetime(2026, 11, 24, 12, 0, tzinfo=dt.UTC)


@pytest.fixture
def me(alice: User, account_token: Callable[[User], str]) -> Api:
    """Alice, with an account token."""
    return Api(account_token(alice))


@pytest.fixture
def stranger(mallory: User, account_token: Callable[[User], str]) -> Api:
    return Api(account_token(mallory))


@pytest.fixture
def told(django_capture_on_commit_callbacks: Any) -> Callable[[Callable[[], Any]], list[int]]:
    """Run something, and say of which keys the sessions were told that they ended."""

    def _told(call: Callable[[], Any]) -> list[int]:
        with (
            mock.patch("celery.app.task.Task.apply_async") as sent,
            django_capture_on_commit_callbacks(execute=True),
        ):
            call()
        return [entry.kwargs["kwargs"]["key_id"] for entry in sent.call_args_list]

    return _told


def works(key: str) -> bool:
    return bool(Api(key).get("/v1/me").status_code == 200)


@pytest.mark.parametrize("body", [None, {}, {"name": None, "expires_at": None, "scopes": None}])
def test_an_empty_body_makes_a_key_that_may_do_everything(me: Api, body: Any) -> None:
    answer = me.post("/v1/api-keys", body)
    made = answer.json()
    row = ApiKey.objects.get()
    assert answer.status_code == 201
    assert set(made) == {"key_id", "key", "prefix", "name", "scopes", "created_at", "expires_at"}
    assert made["key_id"] == row.public_id
    assert made["prefix"] == made["key"][:12]
    assert (made["name"], made["scopes"], made["expires_at"]) == ("", list(SCOPES), None)
    assert answer.headers["Cache-Control"] == "no-store"
    assert works(made["key"])


def test_name_scopes_and_end_are_kept(me: Api) -> None:
    body = {
        "name": "ci",
        "scopes": ["usage:read", "sessions:write", "usage:read"],
        "expires_at": "2099-01-01T01:00:00+01:00",
    }
    made = me.post("/v1/api-keys", body).json()
    assert (made["name"], made["scopes"]) == ("ci", ["sessions:write", "usage:read"])
    assert made["expires_at"] == "2099-01-01T00:00:00Z"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"name": 5}, "name"), ({"name": "x" * 101}, "name"),
        ({"name": ["x"]}, "name"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at"), ({"expires_at": "tomorrow"}, "expires_at"),
        ({"expires_at": "2099-01-01"}, "expires_at"), ({"expires_at": "2099-01-01T00:00:00"}, "expires_at"),
        ({"expires_at": 4070908800}, "expires_at"), ({"expires_at": "9999-12-31T23:59:59-12:00"},
        "expires_at"),
        ({"expires_at": "2099-02-31T00:00:00Z"}, "expires_at"), ({"expires_at": True}, "expires_at"),
        ({"scopes": []}, "scopes"), ({"scopes": "sessions:read"}, "scopes"), ({"scopes": ["admin"]},
        "scopes.0"),
        ({"scopes": [["sessions:read"]]}, "scopes.0"), ({"scopes": {"a": 1}}, "scopes"),
        ({"scopes": [None]}, "scopes.0"),
        ({"tenant_id": "ten_x"}, "tenant_id"), ({"plan_tier": "pro"}, "plan_tier"), ({"user": 1}, "user"),
    ],
)  # fmt: skip
def test_a_bad_field_is_a_400_that_names_it(me: Api, body: Any, field: str) -> None:
    answer = me.post("/v1/api-keys", body)
    assert answer.status_code == 400, answer.content
    assert [error["field"] for error in answer.json()["errors"]] == [field]
    assert not ApiKey.objects.exists()


def test_the_list_shows_everything_but_the_key_3_4(me: Api, alice: User) -> None:
    key = me.post("/v1/api-keys", {"name": "one"}).json()["key"]
    gone = me.post("/v1/api-keys", {"name": "two"}).json()["key_id"]
    me.delete(f"/v1/api-keys/{gone}")
    assert works(key)
    answer = me.get("/v1/api-keys")
    listed = answer.json()
    assert list(listed) == ["api_keys"]
    assert [(row["name"], row["revoked"]) for row in listed["api_keys"]] == [("two", True), ("one", False)]
    row = listed["api_keys"][1]
    assert set(row) == {
        "key_id", "prefix", "last_four", "name", "scopes", "revoked", "created_at", "last_used_at",
        "expires_at",
        "plan_tier",
    }  # fmt: skip
    assert row["plan_tier"] == "free"
    assert row["last_used_at"].endswith("Z")
    assert key not in answer.content.decode()
    assert key[12:40] not in answer.content.decode()


def test_members_of_a_tenant_see_its_keys_and_strangers_see_none(
    me: Api, stranger: Api, bob: User, account_token: Callable[[User], str]
) -> None:
    key_id = me.post("/v1/api-keys").json()["key_id"]
    seen = Api(account_token(bob)).get("/v1/api-keys").json()["api_keys"]
    assert [row["key_id"] for row in seen] == [key_id]
    assert stranger.get("/v1/api-keys").json() == {"api_keys": []}


def test_3_5_a_revoked_key_is_refused_by_the_next_call_and_twice_is_fine(
    me: Api, told: Callable[[Callable[[], Any]], list[int]]
) -> None:
    made = me.post("/v1/api-keys").json()
    path = f"/v1/api-keys/{made['key_id']}"
    assert works(made["key"])
    assert told(lambda: me.delete(path)) == [ApiKey.objects.get().pk], "open sockets of its sessions close"
    assert not works(made["key"])
    answer = me.delete(path)
    assert (answer.status_code, answer.json()) == (200, {"key_id": made["key_id"], "status": "revoked"})
    assert AuditEvent.objects.filter(action="key.revoked", target=made["key_id"]).count() == 1


def test_a_stranger_cannot_revoke_or_rotate_my_key(me: Api, stranger: Api) -> None:
    made = me.post("/v1/api-keys").json()
    unknown = "key_" + "a" * 26
    for method, suffix in (("DELETE", ""), ("POST", "/rotate")):
        mine = stranger.request(method, f"/v1/api-keys/{made['key_id']}{suffix}")
        missing = stranger.request(method, f"/v1/api-keys/{unknown}{suffix}")
        assert mine.status_code == missing.status_code == 404
        assert mine.json() | {"request_id": ""} == missing.json() | {"request_id": ""}
    assert works(made["key"])
    assert ApiKey.objects.count() == 1


@pytest.mark.parametrize("key_id", ["x", "key_", "usr_" + "a" * 26, "key_%00", "%F0%9F%98%80", "x" * 3000])
def test_an_id_that_is_none_is_a_404(me: Api, key_id: str) -> None:
    answer = me.delete(f"/v1/api-keys/{key_id}")
    assert answer.status_code == 404
    assert answer.headers["Content-Type"] == "application/problem+json"


def test_rotating_gives_a_key_like_the_old_one_which_ends_at_once(
    me: Api, told: Callable[[Callable[[], Any]], list[int]]
) -> None:
    old = me.post(
        "/v1/api-keys", {"name": "ci", "scopes": ["usage:read"], "expires_at": "2099-01-01T00:00:00Z"}
    ).json()
    pk = ApiKey.objects.get().pk
    answers: list[Any] = []
    assert told(lambda: answers.append(me.post(f"/v1/api-keys/{old['key_id']}/rotate"))) == [pk]
    new = answers[0].json()
    assert answers[0].status_code == 201
    assert set(new) == set(old)
    assert {name: new[name] for name in ("name", "scopes", "expires_at")} == {
        "name": "ci", "scopes": ["usage:read"], "expires_at": "2099-01-01T00:00:00Z",
    }  # fmt: skip
    assert (works(old["key"]), works(new["key"])) == (False, True)
    again = me.post(f"/v1/api-keys/{old['key_id']}/rotate")
    assert (again.status_code, again.json()["code"]) == (409, "key_not_live")


def test_a_rotated_key_works_through_its_grace_time_then_its_sockets_are_told(
    me: Api, told: Callable[[Callable[[], Any]], list[int]]
) -> None:
    with time_machine.travel(now(), tick=False) as clock:
        old = me.post("/v1/api-keys").json()
        pk = ApiKey.objects.get().pk
        path = f"/v1/api-keys/{old['key_id']}/rotate"
        answers: list[Any] = []
        assert told(lambda: answers.append(me.post(path, {"grace_seconds": 600}))) == []
        new = answers[0].json()
        clock.shift(599)
        assert (works(old["key"]), works(new["key"])) == (True, True)
        assert told(ended_keys_tell) == []
        clock.shift(2)
        assert (works(old["key"]), works(new["key"])) == (False, True)
        assert told(ended_keys_tell) == [pk]
        assert told(ended_keys_tell) == []


def test_an_expired_key_is_refused_and_its_sockets_are_told(
    me: Api, told: Callable[[Callable[[], Any]], list[int]]
) -> None:
    with time_machine.travel(NOON, tick=False) as clock:
        token_free = Api(me.token)
        from accounts.tokens import account_token_issue

        token_free.token = account_token_issue(User.objects.get(email="alice@example.com"))[0]
        made = token_free.post("/v1/api-keys", {"expires_at": "2026-11-24T12:10:00Z"}).json()
        clock.shift(599)
        assert works(made["key"])
        clock.shift(1)
        assert not works(made["key"])
        assert told(ended_keys_tell) == [ApiKey.objects.get().pk]


@pytest.mark.parametrize("grace", [-1, 86401, "60", 1.5, True, 10**30, None])
def test_a_grace_time_out_of_range_is_a_400(me: Api, grace: Any) -> None:
    made = me.post("/v1/api-keys").json()
    answer = me.post(f"/v1/api-keys/{made['key_id']}/rotate", {"grace_seconds": grace})
    assert answer.status_code == 400
    assert works(made["key"])


def test_3_7_a_key_can_neither_make_list_rotate_nor_end_keys(alice_key: str) -> None:
    key_id = ApiKey.objects.get().public_id
    caller = Api(alice_key)
    calls = [
        caller.post("/v1/api-keys"), caller.get("/v1/api-keys"), caller.delete(f"/v1/api-keys/{key_id}"),
        caller.post(f"/v1/api-keys/{key_id}/rotate"),
    ]  # fmt: skip
    assert [answer.status_code for answer in calls] == [401] * 4
    assert works(alice_key)
    assert ApiKey.objects.count() == 1


def test_3_9_a_user_has_at_most_twenty_live_keys(me: Api) -> None:
    made = [me.post("/v1/api-keys") for _ in range(20)]
    assert [answer.status_code for answer in made] == [201] * 20
    refused = me.post("/v1/api-keys")
    assert (refused.status_code, refused.json()["code"]) == (429, "quota_exceeded")
    assert me.post(f"/v1/api-keys/{made[0].json()['key_id']}/rotate").status_code == 201, (
        "a full set may be rotated"
    )
    me.delete(f"/v1/api-keys/{made[1].json()['key_id']}")
    assert me.post("/v1/api-keys").status_code == 201
    assert len(me.get("/v1/api-keys").json()["api_keys"]) == 22


def test_rotated_keys_in_grace_are_bounded_too(me: Api) -> None:
    made = [me.post("/v1/api-keys").json()["key_id"] for _ in range(20)]
    turned = [
        me.post(f"/v1/api-keys/{key_id}/rotate", {"grace_seconds": 60}).json()["key_id"] for key_id in made
    ]
    answer = me.post(f"/v1/api-keys/{turned[0]}/rotate", {"grace_seconds": 60})
    assert (answer.status_code, answer.json()["code"]) == (429, "quota_exceeded")
    assert me.post(f"/v1/api-keys/{turned[0]}/rotate").status_code == 201


@pytest.mark.django_db(transaction=True)
def test_3_9_the_cap_holds_for_thirty_calls_at_once(me: Api) -> None:
    answers = at_once(30, lambda number: Api(me.token).post("/v1/api-keys"))
    assert sorted(answer.status_code for answer in answers) == [201] * 20 + [429] * 10
    assert ApiKey.objects.count() == 20


@pytest.mark.django_db(transaction=True)
def test_rotating_a_key_ten_times_at_once_makes_one(me: Api) -> None:
    key_id = me.post("/v1/api-keys").json()["key_id"]
    answers = at_once(10, lambda number: Api(me.token).post(f"/v1/api-keys/{key_id}/rotate"))
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 9
    assert ApiKey.objects.count() == 2


def test_in_production_a_user_makes_ten_keys_an_hour(in_production: None, me: Api) -> None:
    from e2a.core.errors import RateLimited
    from keys.services import key_issue

    user = User.objects.get(email="alice@example.com")
    for _ in range(10):
        key_issue(user=user)
    with pytest.raises(RateLimited):
        key_issue(user=user)


def test_8_1_an_idempotency_key_makes_one_key_and_shows_it_again(me: Api) -> None:
    headers = {"Idempotency-Key": "once"}
    first = me.post("/v1/api-keys", {"name": "ci"}, headers=headers)
    again = me.post("/v1/api-keys", {"name": "ci"}, headers=headers)
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json() == again.json()
    assert again.headers["Idempotent-Replayed"] == "true"
    other = me.post("/v1/api-keys", {"name": "other"}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_mismatch")
    assert ApiKey.objects.count() == 1


def test_every_change_is_audited_with_who_and_which(me: Api, alice: User) -> None:
    made = me.post("/v1/api-keys", {"scopes": ["usage:read"]}).json()
    new = me.post(f"/v1/api-keys/{made['key_id']}/rotate").json()
    me.delete(f"/v1/api-keys/{new['key_id']}")
    rows = AuditEvent.objects.filter(action__startswith="key.").order_by("pk")
    assert [(row.action, row.target) for row in rows] == [
        ("key.created", made["key_id"]), ("key.rotated", made["key_id"]), ("key.revoked", new["key_id"]),
    ]  # fmt: skip
    assert {row.actor for row in rows} == {alice.public_id}
    assert {row.tenant_id for row in rows} == {alice.tenant_id}
    assert not any(made["key"] in str(row.detail) for row in rows)

"""Calling with a key: what is accepted, what is refused, and what it costs (SECURITY 3)."""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
from typing import Any

import pytest
import time_machine
from django.conf import settings
from django.db import connection
from django.test.utils import CaptureQueriesContext

from accounts.models import User
from accounts.services import tenant_suspend, user_disable
from accounts.tokens import account_token_issue
from e2a.core.errors import RateLimited, Unauthenticated
from e2a.core.keyring import Key, KeyRing
from keys import formats
from keys.authentication import principal_for_bearer
from keys.models import ApiKey
from keys.services import key_issue, key_revoke
from tests.fixtures import Api

pytestmark = pytest.mark.django_db
NOON = dt.datetime(2026, 11, 24, 12, 0, tzinfo=dt.UTC)


def status(key: str) -> int:
    return int(Api(key).get("/v1/me").status_code)


def queries(key: str) -> int:
    with CaptureQueriesContext(connection) as seen:
        status(key)
    return len(seen)


def mutated(key: str, position: int) -> str:
    other = "A" if key[position] != "A" else "B"
    return key[:position] + other + key[position + 1 :]


def test_a_key_says_whose_it_is_and_what_it_may(alice: User) -> None:
    issued = key_issue(user=alice, scopes=["sessions:read"])
    principal = principal_for_bearer(f"Bearer {issued.key}")
    assert (principal.kind, principal.user, principal.tenant) == ("key", alice, alice.tenant)
    assert (principal.key_id, principal.key_pk) == (issued.row.public_id, issued.row.pk)
    assert principal.has_scope("sessions:read")
    assert not principal.has_scope("sessions:write")
    person = principal_for_bearer(f"Bearer {account_token_issue(alice)[0]}")
    assert (person.kind, person.key_id, person.has_scope("sessions:write")) == ("account", None, True)


def test_3_2_a_wrong_checksum_costs_no_query(alice_key: str) -> None:
    assert queries(mutated(alice_key, 20)) == 0
    assert queries("e2a_live_" + "0" * 36) == 0
    assert queries("nonsense") == 0


def test_3_2_a_mutation_at_any_position_is_refused_even_with_its_checksum_mended(alice_key: str) -> None:
    for position in range(len(alice_key)):
        assert status(mutated(alice_key, position)) == 401
    for position in range(len(formats.MARKER), len(alice_key) - formats.CHECKSUM_CHARS):
        body = mutated(alice_key, position)[: -formats.CHECKSUM_CHARS]
        assert status(body + formats.checksum(body)) == 401


def test_3_3_a_call_costs_one_query_once_its_use_is_noted(alice_key: str) -> None:
    assert status(alice_key) == 200
    assert queries(alice_key) == 1


def test_3_3_the_database_holds_a_keyed_digest_and_no_key(alice_key: str) -> None:
    row = ApiKey.objects.get()
    assert row.lookup == alice_key[:21]
    assert row.prefix == alice_key[:12]
    assert row.pepper_id == settings.E2A.signing_keys.newest.id
    assert row.digest not in (hashlib.sha256(alice_key.encode()).hexdigest(), "")
    with connection.cursor() as cursor:
        for table in connection.introspection.table_names(cursor):
            cursor.execute(f'SELECT * FROM "{table}"')
            assert alice_key[21:39] not in repr(cursor.fetchall())


def test_3_3_peppers_rotate_and_a_key_is_rehashed_on_use(
    alice: User, alice_key: str, mallory_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = settings.E2A.signing_keys.newest
    new = Key("next", hashlib.sha256(b"next").digest())

    def ring(*keys: Key) -> None:
        monkeypatch.setattr(settings, "E2A", dataclasses.replace(settings.E2A, signing_keys=KeyRing(keys)))

    before = ApiKey.objects.get(user=alice)
    ring(new, old)
    assert status(alice_key) == 200
    after = ApiKey.objects.get(user=alice)
    assert (after.pepper_id, after.digest) == ("next", formats.digest_of(alice_key, new))
    assert after.digest != before.digest
    ring(new)
    assert (status(alice_key), status(mallory_key)) == (200, 401), (
        "one not used in time is dead with its pepper"
    )


def test_3_6_one_body_for_every_cause(alice: User, bob: User, mallory: User) -> None:
    revoked = key_issue(user=alice)
    key_revoke(key=revoked.row, actor=alice)
    expired = key_issue(user=alice)
    ApiKey.objects.filter(pk=expired.row.pk).update(expires_at=dt.datetime(2020, 1, 1, tzinfo=dt.UTC))
    disabled, suspended = key_issue(user=bob), key_issue(user=mallory)
    user_disable(user=bob, actor="test")
    tenant_suspend(tenant=mallory.tenant, actor="test")
    body = revoked.key[:21] + "0" * 18
    causes = {
        "unknown": formats.key_make(),
        "wrong secret": body + formats.checksum(body),
        "revoked": revoked.key,
        "expired": expired.key,
        "disabled": disabled.key,
        "suspended": suspended.key,
    }
    answers = {cause: Api(key).get("/v1/me") for cause, key in causes.items()}
    assert {cause: answer.status_code for cause, answer in answers.items()} == dict.fromkeys(causes, 401)
    bodies = [answer.json() | {"request_id": ""} for answer in answers.values()]
    assert bodies == [bodies[0]] * len(bodies)


def test_a_key_of_somebody_who_changed_tenants_does_not_reach_into_the_old_one(
    alice: User, mallory: User
) -> None:
    key = key_issue(user=alice).key
    User.objects.filter(pk=alice.pk).update(tenant=mallory.tenant)
    assert status(key) == 401


def test_3_8_use_is_noted_at_most_once_a_minute(alice_key: str) -> None:
    with time_machine.travel(NOON, tick=False) as clock:
        writes = 0
        for _ in range(12):
            with CaptureQueriesContext(connection) as seen:
                assert status(alice_key) == 200
            writes += sum("UPDATE" in query["sql"] for query in seen)
            clock.shift(10)
        assert writes == 2
    row = ApiKey.objects.get()
    assert row.last_used_at == NOON + dt.timedelta(seconds=60)
    assert row.last_used_address == "127.0.0.1"


def test_a_key_makes_six_hundred_calls_a_minute_and_others_are_not_affected(
    alice_key: str, mallory_key: str
) -> None:
    for _ in range(600):
        principal_for_bearer(f"Bearer {alice_key}")
    answer = Api(alice_key).get("/v1/me")
    assert (answer.status_code, answer.json()["code"]) == (429, "rate_limited")
    assert int(answer.headers["Retry-After"]) in range(1, 61)
    assert answer.headers["RateLimit-Limit"] == "600"
    assert status(mallory_key) == 200


def test_3_9_in_production_a_storm_of_refusals_is_cut_off(in_production: None, alice_key: str) -> None:
    for _ in range(60):
        with pytest.raises(Unauthenticated):
            principal_for_bearer("Bearer nonsense", address="203.0.113.1")
    with pytest.raises(RateLimited):
        principal_for_bearer("Bearer nonsense", address="203.0.113.1")
    with pytest.raises(Unauthenticated):
        principal_for_bearer("Bearer nonsense", address="203.0.113.2")
    assert principal_for_bearer(f"Bearer {alice_key}", address="203.0.113.1").kind == "key"


@pytest.mark.parametrize(
    "shape",
    [
        "{key}", "bearer {key}", "BEARER {key}", "Basic {key}", "Token {key}", "Bearer", "Bearer ",
        "Bearer  {key}",
        " Bearer {key}", "Bearer\t{key}", "Bearer {key} ", "Bearer {key},", "Bearer {key}, Bearer {key}",
        "Bearer {key},Bearer {key}", "Bearer {key} {key}", 'Bearer "{key}"', "Bearer {key}\x00",
        "Bearer \x00",
        "Bearer {key}\n", "Bearer ünïcode", "Bearer " + "x" * 8192, "Bearer " + "e2a_live_" * 1000, "",
        "Bearer " + "." * 100, "Bearer ..", "Bearer e2a_live_", "Bearer e2a_test_{key}",
    ],
)  # fmt: skip
def test_3_11_a_header_of_another_shape_is_a_401(alice_key: str, shape: str) -> None:
    answer = Api().get("/v1/me", headers={"Authorization": shape.replace("{key}", alice_key)})
    assert answer.status_code == 401
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert alice_key not in answer.content.decode()


def test_3_11_no_header_is_a_401(db: None) -> None:
    answer: Any = Api().get("/v1/me")
    assert (answer.status_code, answer.json()["code"]) == (401, "invalid_token")

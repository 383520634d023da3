"""`Idempotency-Key` (CONTRACT 1, SECURITY 8.1), on a call that makes something."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import time_machine
from django.db import connection

from e2a.core.models import IdempotencyRecord
from secrets_vault.models import Bundle

PATH = "/v1/tenants/me/secrets"
BODY = {"name": "one", "values": {"TOKEN": "a-value-of-some-length"}}


@pytest.mark.django_db
def test_the_same_key_and_body_give_the_stored_answer(as_alice: Any) -> None:
    first = as_alice.post(PATH, BODY, headers={"Idempotency-Key": "k1"})
    second = as_alice.post(PATH, BODY, headers={"Idempotency-Key": "k1"})
    assert (first.status_code, second.status_code) == (201, 201)
    assert second.json() == first.json()
    assert "Idempotent-Replayed" not in first.headers
    assert second.headers["Idempotent-Replayed"] == "true"
    assert Bundle.objects.count() == 1


@pytest.mark.django_db
def test_the_same_key_with_another_body_is_a_conflict(as_alice: Any) -> None:
    as_alice.post(PATH, BODY, headers={"Idempotency-Key": "k1"})
    answer = as_alice.post(PATH, BODY | {"name": "two"}, headers={"Idempotency-Key": "k1"})
    assert answer.status_code == 409
    assert answer.json()["code"] == "idempotency_mismatch"


@pytest.mark.django_db
def test_a_refused_request_may_be_mended_under_the_same_key(as_alice: Any) -> None:
    assert (
        as_alice.post(PATH, {"name": "UP", "values": {}}, headers={"Idempotency-Key": "k1"}).status_code
        == 400
    )
    assert as_alice.post(PATH, BODY, headers={"Idempotency-Key": "k1"}).status_code == 201


@pytest.mark.django_db
def test_tenants_do_not_see_each_others_keys(as_alice: Any, as_mallory: Any) -> None:
    as_alice.post(PATH, BODY, headers={"Idempotency-Key": "k1"})
    other = as_mallory.post(PATH, BODY, headers={"Idempotency-Key": "k1"})
    assert other.status_code == 201
    assert "Idempotent-Replayed" not in other.headers


@pytest.mark.django_db
def test_a_key_is_forgotten_after_24_hours(as_alice: Any) -> None:
    as_alice.post(PATH, BODY, headers={"Idempotency-Key": "k1"})
    with time_machine.travel(time.time() + 86401, tick=True):
        answer = as_alice.post(PATH, BODY, headers={"Idempotency-Key": "k1"})
    assert answer.status_code == 409
    assert answer.json()["code"] == "already_exists"


@pytest.mark.django_db
@pytest.mark.parametrize("key", ["", "x" * 256])
def test_a_malformed_key_is_refused(as_alice: Any, key: str) -> None:
    answer = as_alice.post(PATH, BODY, headers={"Idempotency-Key": key})
    assert answer.status_code == 400
    assert answer.json()["code"] == "invalid_idempotency_key"


@pytest.mark.django_db(transaction=True)
def test_fired_50_times_at_once_it_makes_one_thing(alice_key: str, api: Any) -> None:
    """ARCHITECTURE 9.5"""
    start = threading.Barrier(50)
    answers: list[Any] = []

    def fire() -> None:
        start.wait(20)
        answers.append(api(alice_key).post(PATH, BODY, headers={"Idempotency-Key": "k1"}))
        connection.close()

    threads = [threading.Thread(target=fire) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 50
    assert Bundle.objects.count() == 1
    fresh = [a for a in answers if a.status_code == 201 and "Idempotent-Replayed" not in a.headers]
    assert len(fresh) == 1
    assert {a.status_code for a in answers} <= {201, 409}
    assert {a.json()["code"] for a in answers if a.status_code == 409} <= {"idempotency_in_progress"}


@pytest.mark.django_db
def test_an_answer_that_shows_a_key_is_not_readable_in_the_database(
    alice: Any, account_token: Any, api: Any
) -> None:
    client = api(account_token(alice))
    first = client.post("/v1/api-keys", {}, headers={"Idempotency-Key": "show-once"})
    assert first.status_code == 201
    record = IdempotencyRecord.objects.get()
    assert record.is_sealed
    assert first.json()["key"].encode() not in bytes(record.answer)
    assert b"show-once" not in bytes(record.answer)
    assert "show-once" not in record.key_digest
    again = client.post("/v1/api-keys", {}, headers={"Idempotency-Key": "show-once"})
    assert again.json() == first.json()

"""CONTRACT 4 over HTTP: what each call answers, for its owner and for others."""

from __future__ import annotations

from typing import Any

import pytest

from secrets_vault.models import Bundle, SecretValue
from tests.secrets_vault.conftest import PLANTED, SECRETS

pytestmark = pytest.mark.django_db

KEY = "sk-test-0123456789"


def make(client: Any, name: str = "default", **values: Any) -> Any:
    answer = client.post(SECRETS, {"name": name, "values": values or {"LLM_API_KEY": KEY}})
    assert answer.status_code == 201, answer.content
    return answer.json()


def test_a_new_bundle_answers_its_metadata_and_nothing_else(as_alice: Any) -> None:
    answer = as_alice.post(
        SECRETS, {"name": "default", "values": {"LLM_API_KEY": KEY, "B_TOKEN": "12345678"}}
    )
    assert answer.status_code == 201
    body = answer.json()
    assert set(body) == {"name", "version", "keys", "created_at", "updated_at"}
    assert (body["name"], body["version"], body["keys"]) == ("default", 1, ["B_TOKEN", "LLM_API_KEY"])
    assert body["created_at"].endswith("Z")
    assert body["updated_at"].endswith("Z")
    assert answer["Cache-Control"] == "no-store"


def test_a_taken_name_is_409_already_exists_and_changes_nothing(as_alice: Any) -> None:
    make(as_alice)
    answer = as_alice.post(SECRETS, {"name": "default", "values": {"OTHER": "12345678"}})
    assert (answer.status_code, answer.json()["code"]) == (409, "already_exists")
    assert as_alice.get(f"{SECRETS}/default").json()["keys"] == ["LLM_API_KEY"]


def test_the_list_goes_by_cursor_newest_first_and_never_skips(as_alice: Any) -> None:
    for index in range(5):
        make(as_alice, f"b{index}")
    names, cursor = [], None
    while True:
        body = as_alice.get(f"{SECRETS}?limit=2" + (f"&cursor={cursor}" if cursor else "")).json()
        assert set(body) == {"secrets", "next_cursor"}
        names += [row["name"] for row in body["secrets"]]
        cursor = body["next_cursor"]
        if cursor is None:
            break
    assert names == ["b4", "b3", "b2", "b1", "b0"]
    row = as_alice.get(SECRETS).json()["secrets"][0]
    assert set(row) == {"name", "version", "keys", "created_at", "updated_at", "sessions"}


def test_put_replaces_all_values_as_the_next_version(as_alice: Any) -> None:
    make(as_alice, LLM_API_KEY=KEY, OLD="12345678")
    answer = as_alice.put(f"{SECRETS}/default", {"values": {"NEW": "87654321"}})
    assert answer.status_code == 200
    body = answer.json()
    assert set(body) == {"name", "version", "keys", "created_at", "updated_at", "sessions_updated"}
    assert (body["version"], body["keys"], body["sessions_updated"]) == (2, ["NEW"], 0)


def test_patch_sets_the_given_names_and_null_removes_one(as_alice: Any) -> None:
    make(as_alice, LLM_API_KEY=KEY, KEPT="12345678", GONE="12345678")
    answer = as_alice.patch(
        f"{SECRETS}/default", {"values": {"GONE": None, "ADDED": "12345678", "NEVER": None}}
    )
    assert answer.status_code == 200
    assert (answer.json()["version"], answer.json()["keys"]) == (2, ["ADDED", "KEPT", "LLM_API_KEY"])


def test_the_values_that_a_patch_leaves_alone_still_open(as_alice: Any, hold: Any) -> None:
    from secrets_vault.services import values_read

    make(as_alice, KEPT="kept-value", CHANGED="first-value")
    as_alice.patch(f"{SECRETS}/default", {"values": {"CHANGED": "second-value"}})
    hold("ses_a", "default")
    values = values_read(holder="ses_a", purpose="test")
    assert {name: value.text.reveal() for name, value in values.items()} == {
        "KEPT": "kept-value",
        "CHANGED": "second-value",
    }


def test_the_last_ten_versions_are_kept_and_a_rollback_is_a_new_one(as_alice: Any, hold: Any) -> None:
    from secrets_vault.services import values_read

    make(as_alice, N="value-no-1")
    for number in range(2, 13):
        as_alice.put(
            f"{SECRETS}/default", {"values": {"N": f"value-no-{number}", f"ONLY_{number}": "12345678"}}
        )
    body = as_alice.get(f"{SECRETS}/default/versions").json()
    assert [row["version"] for row in body["versions"]] == list(range(12, 2, -1))
    assert body["versions"][0]["keys"] == ["N", "ONLY_12"]
    assert set(body["versions"][0]) == {"version", "keys", "created_at", "created_by"}
    assert body["versions"][0]["created_by"].startswith("key_")

    answer = as_alice.post(f"{SECRETS}/default/rollback", {"version": 5})
    assert answer.status_code == 200
    assert (answer.json()["version"], answer.json()["keys"]) == (13, ["N", "ONLY_5"])
    hold("ses_a", "default")
    assert values_read(holder="ses_a", purpose="test")["N"].text.reveal() == "value-no-5"

    gone = as_alice.post(f"{SECRETS}/default/rollback", {"version": 2})
    assert (gone.status_code, gone.json()["code"]) == (404, "version_not_found")
    assert as_alice.get(f"{SECRETS}/default").json()["version"] == 13
    assert SecretValue.objects.filter(bundle_version__version__lte=3).count() == 0


def test_delete_is_204_and_the_name_is_free_again(as_alice: Any) -> None:
    make(as_alice)
    assert as_alice.delete(f"{SECRETS}/default").status_code == 204
    again = as_alice.delete(f"{SECRETS}/default")
    assert (again.status_code, again.json()["code"]) == (404, "secret_not_found")
    make(as_alice)


def test_a_bundle_in_use_is_deleted_only_by_force(as_alice: Any, hold: Any) -> None:
    make(as_alice)
    hold("ses_live", "default")
    answer = as_alice.delete(f"{SECRETS}/default")
    assert (answer.status_code, answer.json()["code"]) == (409, "in_use")
    assert "ses_live" in answer.json()["detail"]
    assert as_alice.delete(f"{SECRETS}/default?force=perhaps").status_code == 400
    assert as_alice.delete(f"{SECRETS}/default?force=false").status_code == 409
    assert as_alice.delete(f"{SECRETS}/default?force=true").status_code == 204
    from secrets_vault.services import holder_fingerprint, holder_llm

    assert holder_fingerprint("ses_live") == ""
    assert holder_llm("ses_live") is None


def test_metadata_counts_the_sessions_that_use_it_but_not_sandboxes(as_alice: Any, hold: Any) -> None:
    make(as_alice)
    make(as_alice, "other", OTHER="12345678")
    for holder in ("ses_a", "ses_b", "sbx_c"):
        hold(holder, "default")
    assert as_alice.get(f"{SECRETS}/default").json()["sessions"] == 2
    assert as_alice.get(f"{SECRETS}/other").json()["sessions"] == 0
    assert (
        as_alice.put(f"{SECRETS}/default", {"values": {"LLM_API_KEY": KEY}}).json()["sessions_updated"] == 2
    )


def test_a_change_nudges_the_sessions_by_id_only(as_alice: Any, hold: Any, asked_for: Any) -> None:
    make(as_alice)
    as_alice.put(f"{SECRETS}/default", {"values": {"LLM_API_KEY": KEY}})
    assert asked_for == []
    hold("ses_a", "default")
    as_alice.put(f"{SECRETS}/default", {"values": {"LLM_API_KEY": KEY}})
    as_alice.patch(f"{SECRETS}/default", {"values": {"ANOTHER": "12345678"}})
    as_alice.post(f"{SECRETS}/default/rollback", {"version": 1})
    pk = Bundle.objects.get().pk
    assert asked_for == [("sessions_app.tasks.bundle_changed", {"bundle_id": pk})] * 3


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "", None),
        ("PUT", "", {"values": {"A": "12345678"}}),
        ("PATCH", "", {"values": {"A": "12345678"}}),
        ("DELETE", "", None),
        ("DELETE", "?force=true", None),
        ("GET", "/versions", None),
        ("POST", "/rollback", {"version": 1}),
    ],
)
def test_4_4_a_stranger_gets_the_same_404_as_for_a_missing_bundle(
    as_alice: Any, as_mallory: Any, method: str, path: str, body: Any
) -> None:
    make(as_alice, "private", A=PLANTED)
    theirs = as_mallory.request(method, f"{SECRETS}/private{path}", body)
    missing = as_mallory.request(method, f"{SECRETS}/nothere{path}", body)
    assert theirs.status_code == missing.status_code == 404

    def shown(answer: Any) -> dict[str, Any]:
        return {k: v.replace("nothere", "private") for k, v in answer.json().items() if isinstance(v, str)}

    assert {**shown(theirs), "request_id": ""} == {**shown(missing), "request_id": ""}
    assert as_alice.get(f"{SECRETS}/private").json()["version"] == 1
    assert as_mallory.get(SECRETS).json()["secrets"] == []


def test_two_tenants_may_use_the_same_name(as_alice: Any, as_mallory: Any) -> None:
    make(as_alice)
    make(as_mallory)


def test_a_member_of_the_tenant_sees_its_bundles(
    as_alice: Any, bob: Any, api: Any, account_token: Any
) -> None:
    make(as_alice)
    assert api(account_token(bob)).get(f"{SECRETS}/default").status_code == 200


def test_scopes_read_and_write_are_apart(alice: Any, api_key: Any, api: Any, as_alice: Any) -> None:
    reader = api(api_key(alice, scopes=["secrets:read"]))
    writer = api(api_key(alice, scopes=["secrets:write"]))
    neither = api(api_key(alice, scopes=["sessions:read"]))
    assert writer.post(SECRETS, {"name": "default", "values": {"A": "12345678"}}).status_code == 201
    assert writer.get(SECRETS).status_code == 403
    assert writer.get(f"{SECRETS}/default/versions").status_code == 403
    assert reader.get(SECRETS).status_code == 200
    assert reader.get(f"{SECRETS}/default").status_code == 200
    assert neither.get(SECRETS).status_code == 403
    for method, path, body in (
        ("POST", "", {"name": "x", "values": {"A": "12345678"}}),
        ("PUT", "/default", {"values": {"A": "12345678"}}),
        ("PATCH", "/default", {"values": {"A": "12345678"}}),
        ("POST", "/default/rollback", {"version": 1}),
        ("DELETE", "/default", None),
    ):
        assert reader.request(method, SECRETS + path, body).status_code == 403, (method, path)
    assert api(None).get(SECRETS).status_code == 401


def test_a_login_cookie_is_not_enough(alice: Any, api: Any) -> None:
    anonymous = api(None)
    anonymous.client.force_login(alice)
    assert anonymous.get(SECRETS).status_code == 401


def test_a_create_fired_again_with_its_idempotency_key_makes_one_bundle(as_alice: Any) -> None:
    body = {"name": "default", "values": {"A": PLANTED}}
    first = as_alice.post(SECRETS, body, headers={"Idempotency-Key": "k1"})
    again = as_alice.post(SECRETS, body, headers={"Idempotency-Key": "k1"})
    assert first.status_code == again.status_code == 201
    assert first.json() == again.json()
    assert again["Idempotent-Replayed"] == "true"
    other = as_alice.post(SECRETS, {"name": "b", "values": {"A": PLANTED}}, headers={"Idempotency-Key": "k1"})
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_mismatch")


@pytest.mark.parametrize(
    "name",
    ["UPPER", "default\n", "default%0A", "a%00b", "-a", "a" * 64, "~ses_x", "%F0%9F%99%82", "a.b", "a_b"],
)
def test_a_malformed_name_in_the_path_is_a_404_problem(as_alice: Any, name: str) -> None:
    for method in ("GET", "PUT", "PATCH", "DELETE"):
        body = {"values": {"A": "12345678"}} if method in ("PUT", "PATCH") else None
        answer = as_alice.request(method, f"{SECRETS}/{name}", body)
        assert answer.status_code == 404, (method, name, answer.content)
        assert answer["Content-Type"].startswith("application/problem+json")


def test_a_bundle_made_for_one_holder_is_neither_listed_nor_reachable(as_alice: Any, alice: Any) -> None:
    from secrets_vault.services import bundles_release, inline_bundle_create

    inline_bundle_create(tenant=alice.tenant, holder="ses_x", values={"LLM_API_KEY": KEY})
    assert as_alice.get(SECRETS).json()["secrets"] == []
    bundles_release(holder="ses_x")
    assert Bundle.objects.count() == 0

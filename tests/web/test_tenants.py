"""One tenant never sees, counts or changes what is another's (SECURITY 9.8): every route of the schema."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.test import Client

from accounts.models import User
from tests.fixtures import Api
from tests.web.conftest import SECRET
from tests.web.test_requests import dump, page_routes

pytestmark = pytest.mark.django_db

BODIES: dict[str, Any] = {
    "POST /v1/api-keys/{key_id}/rotate": {},
    "POST /v1/sandboxes/{sandbox_id}/exec": {"command": "true"},
    "POST /v1/sandboxes/{sandbox_id}/extend": {"seconds": 60},
    "POST /v1/sandboxes/{sandbox_id}/jobs": {"command": "true"},
    "POST /v1/sandboxes/{sandbox_id}/jobs/{job_id}/signal": {"signal": "TERM"},
    "POST /v1/sandboxes/{sandbox_id}/previews": {"port": 8000},
    "POST /v1/sandboxes/{sandbox_id}/files/mkdir": {"path": "a"},
    "POST /v1/sandboxes/{sandbox_id}/files/move": {"from": "a", "to": "b"},
    "PATCH /v1/sessions/{session_id}": {"metadata": {}},
    "POST /v1/sessions/{session_id}/tasks": {"prompt": "true"},
    "PUT /v1/tenants/me/secrets/{name}": {"values": {"A": "aaaaaaaa"}},
    "PATCH /v1/tenants/me/secrets/{name}": {"values": {"A": "aaaaaaaa"}},
    "POST /v1/tenants/me/secrets/{name}/rollback": {"version": 1},
}
QUERIES = {
    "files": "?path=a",
    "files/list": "?path=.",
    "files/stat": "?path=a",
    "files/watch": "?path=.",
    "archive": "?path=.",
}
RANDOM = {
    "session_id": "ses_" + "a" * 26,
    "task_id": "tsk_" + "a" * 26,
    "sandbox_id": "sbx_" + "a" * 26,
    "preview_id": "prv_" + "a" * 26,
    "snapshot_id": "snp_" + "a" * 26,
    "job_id": "job_" + "a" * 26,
    "key_id": "key_" + "a" * 26,
    "name": "nobodys",
}


def routes_with_ids(openapi: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (method.upper(), path)
        for path, operations in openapi["paths"].items()
        for method in operations
        if "{" in path
    ]


def said(answer: Any, ids: dict[str, str]) -> tuple[int, str]:
    """Status and body without what differs from request to request: its id, and the caller's own words."""
    text = re.sub(r"req_[a-z2-7]{26}", "…", answer.content.decode())
    for word in ids.values():
        text = text.replace(word, "…")
    return answer.status_code, text


def ask(caller: Api, method: str, path: str, ids: dict[str, str]) -> Any:
    query = next((text for end, text in QUERIES.items() if path.endswith("/" + end)), "")
    return caller.request(method, path.format(**ids) + query, BODIES.get(f"{method} {path}"))


@pytest.fixture(params=["key", "account"])
def stranger(request: Any, mallory: User, api_key: Any, account_token: Any) -> Api:
    """Mallory with an API key, then with her account token."""
    return Api(api_key(mallory) if request.param == "key" else account_token(mallory))


@pytest.fixture
def owner(alice: User, account_token: Any) -> Api:
    return Api(account_token(alice))


def test_anothers_object_answers_exactly_like_a_missing_one_and_nothing_changes(
    openapi: dict[str, Any], things: dict[str, str], stranger: Api
) -> None:
    stranger.get("/v1/me")  # Notes the key's first use.
    before = dump()
    routes = routes_with_ids(openapi)
    assert len(routes) > 20
    for method, path in routes:
        theirs, missing = ask(stranger, method, path, things), ask(stranger, method, path, RANDOM)
        assert said(theirs, things) == said(missing, RANDOM), f"{method} {path}"
        is_account_only = path.startswith("/v1/api-keys") and str(stranger.token).startswith("e2a_")
        assert theirs.status_code == (401 if is_account_only else 404), f"{method} {path}: {theirs.content!r}"
    assert dump() == before


def test_the_same_requests_reach_their_owner(
    openapi: dict[str, Any], things: dict[str, str], owner: Api
) -> None:
    """The sweep above would prove nothing if these were 404 for everybody."""
    asks_the_guest = ("/files", "/archive", "/output")
    harmless = [
        (method, path)
        for method, path in routes_with_ids(openapi)
        if method == "GET" and not any(part in path for part in asks_the_guest)
    ]
    assert len(harmless) >= 8
    for method, path in harmless:
        assert ask(owner, method, path, things).status_code == 200, path


def test_a_task_is_reached_through_its_own_session_only(
    things: dict[str, str], stranger: Api, mallory: User, node_row: Any
) -> None:
    made = stranger.post("/v1/sessions", {"agent": {"kind": "shell"}, "user_id": "m"})
    assert made.status_code == 201, made.content
    mine = made.json()["chat_session_id"]
    for method, end in (("GET", ""), ("POST", "/cancel")):
        answer = stranger.request(method, f"/v1/sessions/{mine}/tasks/{things['task_id']}{end}")
        assert answer.status_code == 404


@pytest.mark.parametrize(
    "query", ["", "?limit=100", "?state=running", "?status=idle", "?user_id=u1", "?include=all&ordering=id"]
)
def test_lists_hold_and_count_ones_own_only(things: dict[str, str], stranger: Api, query: str) -> None:
    for path in (
        *("/v1/sessions", "/v1/sandboxes", "/v1/tenants/me/secrets", "/v1/api-keys"),
        *("/v1/snapshots", "/v1/workspaces"),
    ):
        answer = stranger.get(path + query)
        text = answer.content.decode()
        assert not [value for value in things.values() if value in text], path
        assert SECRET not in text
        if answer.status_code == 200 and path in ("/v1/sessions", "/v1/tenants/me/secrets"):
            assert [rows for name, rows in answer.json().items() if isinstance(rows, list)] == [[]], path


def test_a_cursor_of_anothers_list_opens_nothing(things: dict[str, str], owner: Api, stranger: Api) -> None:
    for number in range(2):
        owner.post("/v1/tenants/me/secrets", {"name": f"more-{number}", "values": {"A": "aaaaaaaa"}})
    cursor = owner.get("/v1/tenants/me/secrets?limit=1").json()["next_cursor"]
    assert cursor
    answer = stranger.get(f"/v1/tenants/me/secrets?cursor={cursor}")
    assert answer.status_code in (200, 400)
    assert not re.search(r"more-\d|alices", answer.content.decode())


def test_anothers_bundle_cannot_be_attached(things: dict[str, str], stranger: Api) -> None:
    for name in (things["name"], "nobodys"):
        answer = stranger.post(
            "/v1/sessions", {"agent": {"kind": "shell"}, "user_id": "m", "secrets": [name]}
        )
        assert (answer.status_code, answer.json()["code"]) == (404, "secret_not_found")
        assert answer.json()["detail"].replace(name, "…").count("…") <= 1


def test_anothers_idempotency_key_replays_nothing(things: dict[str, str], owner: Api, stranger: Api) -> None:
    body, headers = {"name": "once", "values": {"A": "aaaaaaaa"}}, {"Idempotency-Key": "same-key"}
    first = owner.post("/v1/tenants/me/secrets", body, headers=headers)
    second = stranger.post("/v1/tenants/me/secrets", body, headers=headers)
    assert (first.status_code, second.status_code) == (201, 201)
    assert "Idempotent-Replayed" not in second.headers
    assert owner.post("/v1/tenants/me/secrets", body, headers=headers)["Idempotent-Replayed"] == "true"


def test_a_member_of_the_tenant_reaches_what_is_the_tenants(
    things: dict[str, str], bob: User, account_token: Any
) -> None:
    member = Api(account_token(bob))
    for path in (
        f"/v1/sessions/{things['session_id']}",
        f"/v1/sandboxes/{things['sandbox_id']}",
        f"/v1/tenants/me/secrets/{things['name']}",
    ):
        assert member.get(path).status_code == 200


def test_the_pages_of_another_tenant_are_missing_pages(things: dict[str, str], mallory: User) -> None:
    client = Client()
    client.force_login(mallory)
    before = dump()
    for path in page_routes():
        if "{" not in path:
            continue
        answers = [send(path.format(**ids)) for ids in (things, RANDOM) for send in (client.get, client.post)]
        # A form of the secrets pages without its fields goes back to the page, which is missing.
        assert {answer.status_code for answer in answers} <= {
            404,
            405,
            302 if "/secrets/" in path else 404,
        }, path
        assert [answer.status_code for answer in answers[:2]] == [
            answer.status_code for answer in answers[2:]
        ], path
    assert dump() == before

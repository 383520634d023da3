"""What `POST /v1/sessions` takes, and everything that it refuses (CONTRACT 5)."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any

import pytest
import time_machine

from accounts.models import Tenant
from e2a.core.clock import now
from sandboxes.models import Node, Sandbox, SandboxState
from secrets_vault.models import BundleUse
from sessions_app.models import Session
from tests.fixtures import Api

KEY = "sk-ant-api03-of-alice"
ELSEWHERE = "https://models.example.com/v1"

pytestmark = pytest.mark.django_db


def asked(**changes: Any) -> dict[str, Any]:
    """The smallest body that is accepted, with `changes`; `...` takes a field out."""
    body: dict[str, Any] = {"agent": {"kind": "shell"}, "user_id": "u1", **changes}
    return {name: value for name, value in body.items() if value is not ...}


def with_model(**changes: Any) -> dict[str, Any]:
    """The smallest body of a session whose agent calls a model, with the bundle `mine`."""
    llm = {"vendor": "anthropic", "model": "claude-sonnet-4-5"}
    if changes.get("llm") is not ...:
        changes["llm"] = llm | changes.get("llm", {})
    return asked(**{"agent": {"kind": "deictic"}, "secrets": ["mine"]} | changes)


def refused(answer: Any, status: int, code: str, field: str | None = None) -> None:
    """The problem's status and code, and that nothing was made."""
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (status, code), answer.content
    assert answer["Content-Type"] == "application/problem+json"
    assert problem["status"] == status
    assert problem["request_id"].startswith("req_")
    assert {"type", "title", "detail"} <= problem.keys()
    if field is not None:
        assert field in [error["field"] for error in problem["errors"]], problem
    assert not Session.objects.exists()
    assert not Sandbox.objects.exists()
    assert not BundleUse.objects.exists()


# -- the body itself


@pytest.mark.parametrize(
    "body",
    [
        b"{", b"nope", b"[]", b'"x"', b"5", b"null", b'{"user_id": NaN}', b'{"user_id": "a", "user_id": "b"}',
        b'{"user_id": "\\ud800"}', b'{"user_id": "\\u0000"}', b'{"user_id": "\xff"}', b"\xff\xfe{\x00}\x00",
        b'{"metadata": ' + b"[" * 40 + b"]" * 40 + b"}", b"[" * 100_000,
    ],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_malformed(as_alice: Api, node_row: Node, body: bytes) -> None:
    refused(as_alice.post("/v1/sessions", body), 400, "malformed_json")


def test_a_body_of_another_type_is_415(as_alice: Api, node_row: Node) -> None:
    answer = as_alice.client.post(
        "/v1/sessions", "a=b", content_type="application/x-www-form-urlencoded",
        headers={"Authorization": f"Bearer {as_alice.token}"},
    )  # fmt: skip
    refused(answer, 415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"agent": ...}, "agent"),
        ({"user_id": ...}, "user_id"),
        ({"agent": {}}, "agent.kind"),
        ({"agent": "shell"}, "agent"),
        ({"agent": None}, "agent"),
        ({"agent": {"kind": 5}}, "agent.kind"),
        ({"agent": {"kind": ["shell"]}}, "agent.kind"),
        ({"agent": {"kind": "deictic", "system": 5}}, "agent.system"),
        ({"agent": {"kind": "deictic", "system": "x" * (32 * 1024 + 1)}}, "agent.system"),
        ({"agent": {"kind": "deictic", "max_turns": 0}}, "agent.max_turns"),
        ({"agent": {"kind": "deictic", "max_turns": "5"}}, "agent.max_turns"),
        ({"agent": {"kind": "shell", "system": "x"}}, "agent.system"),
        ({"agent": {"kind": "shell", "max_turns": 5}}, "agent.max_turns"),
        ({"user_id": ""}, "user_id"),
        ({"user_id": None}, "user_id"),
        ({"user_id": 5}, "user_id"),
        ({"user_id": True}, "user_id"),
        ({"user_id": "x" * 129}, "user_id"),
        ({"template": 5}, "template"),
        ({"ttl_seconds": 59}, "ttl_seconds"),
        ({"ttl_seconds": 7201}, "ttl_seconds"),
        ({"ttl_seconds": "3600"}, "ttl_seconds"),
        ({"ttl_seconds": 3600.5}, "ttl_seconds"),
        ({"ttl_seconds": True}, "ttl_seconds"),
        ({"ttl_seconds": None}, "ttl_seconds"),
        ({"ttl_seconds": 10**30}, "ttl_seconds"),
        ({"idle_timeout_seconds": 9}, "idle_timeout_seconds"),
        ({"idle_timeout_seconds": 7201}, "idle_timeout_seconds"),
        ({"metadata": []}, "metadata"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {"a": None}}, "metadata.a"),
        ({"metadata": {f"k{n}": "v" for n in range(17)}}, "metadata"),
        ({"metadata": {"": "v"}}, "metadata"),
        ({"secrets": "mine"}, "secrets"),
        ({"secrets": [5]}, "secrets.0"),
        ({"secrets": ["mine", "mine"]}, "secrets"),
        ({"secrets": [f"b{n}" for n in range(11)]}, "secrets"),
        ({"budget": 5}, "budget"),
        ({"budget": {"max_tokens": "5"}}, "budget.max_tokens"),
        ({"budget": {"max_tokens": -1}}, "budget.max_tokens"),
        ({"budget": {"max_usd": -0.5}}, "budget.max_usd"),
        ({"budget": {"max_usd": "a lot"}}, "budget.max_usd"),
        ({"budget": {"max_usd": True}}, "budget.max_usd"),
        ({"budget": {"max_usd": "5"}}, "budget.max_usd"),
        ({"llm": "anthropic"}, "llm"),
        ({"llm": {}}, "llm.vendor"),
        ({"llm": {"vendor": "mistral"}}, "llm.vendor"),
        ({"llm": {"vendor": 5}}, "llm.vendor"),
        ({"llm": {"vendor": ["anthropic"]}}, "llm.vendor"),
        ({"llm": {"vendor": "anthropic", "model": 5}}, "llm.model"),
        ({"llm": {"vendor": "anthropic", "base_url": 5}}, "llm.base_url"),
        ({"app": "x"}, "app"),
        ({"app": {}}, "app.id"),
        ({"app": {"id": "a", "capability_sets": "x"}}, "app.capability_sets"),
    ],
)
def test_a_wrong_field_is_named(as_alice: Api, node_row: Node, changes: dict[str, Any], field: str) -> None:
    refused(as_alice.post("/v1/sessions", asked(**changes)), 400, "validation_failed", field)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"colour": "blue"}, "colour"),
        ({"tenant_id": "ten_x"}, "tenant_id"),
        ({"agent": {"kind": "shell", "colour": 1}}, "agent.colour"),
        ({"llm": {"vendor": "anthropic", "api_key": "x"}}, "llm.api_key"),
        ({"budget": {"max_euro": 5}}, "budget.max_euro"),
        ({"app": {"id": "a", "x": 1}}, "app.x"),
    ],
)
def test_an_unknown_field_is_refused(
    as_alice: Api, node_row: Node, changes: dict[str, Any], field: str
) -> None:
    refused(as_alice.post("/v1/sessions", asked(**changes)), 400, "unknown_field", field)


# -- agent, template, model, key


def test_unknown_agents_and_templates(as_alice: Api, node_row: Node) -> None:
    for kind in ("hal", "Shell", "x" * 40):
        refused(
            as_alice.post("/v1/sessions", asked(agent={"kind": kind})), 400, "unknown_agent", "agent.kind"
        )
    for name in ("no-such", "../standard", "x" * 64):
        refused(as_alice.post("/v1/sessions", asked(template=name)), 400, "unknown_template", "template")


def test_options_that_are_not_built_say_so(as_alice: Api, node_row: Node) -> None:
    tools = [{"name": "a", "description": "b", "input_schema": {"type": "object"}}]
    refused(as_alice.post("/v1/sessions", asked(agent={"kind": "deictic", "tools": tools})), 501, "not_built")
    refused(
        as_alice.post("/v1/sessions", asked(agent={"kind": "deictic", "approvals": "always"})),
        501,
        "not_built",
    )


@pytest.mark.parametrize(
    ("kind", "vendor", "model"), [("claude-code", "anthropic", "claude-x"), ("codex", "openai", "gpt-5")]
)
def test_a_program_uses_its_own_vendor(
    as_alice: Api, alice: Any, bundle: Callable[..., Any], node_row: Node, kind: str, vendor: str, model: str
) -> None:
    bundle(alice, "mine", LLM_API_KEY=KEY, LLM_MODEL=model)
    other = "openai" if vendor == "anthropic" else "anthropic"
    body = asked(agent={"kind": kind}, secrets=["mine"])
    refused(
        as_alice.post("/v1/sessions", {**body, "llm": {"vendor": other}}),
        400,
        "vendor_mismatch",
        "llm.vendor",
    )
    refused(as_alice.post("/v1/sessions", {**body, "llm": {"vendor": "google"}}), 501, "vendor_unavailable")
    wrong = {"vendor": vendor, "model": "llama-7"}
    refused(as_alice.post("/v1/sessions", {**body, "llm": wrong}), 400, "invalid_model", "llm.model")
    refused(as_alice.post("/v1/sessions", {**body, "template": "browser"}), 400, "unknown_agent")
    answer = as_alice.post("/v1/sessions", body)
    assert answer.status_code == 201, answer.content
    assert answer.json()["llm"]["vendor"] == vendor
    answer = as_alice.post("/v1/sessions", {**body, "llm": {"vendor": vendor, "model": model}})
    assert answer.json()["llm"] == {"vendor": vendor, "model": model, "base_url": None}


@pytest.mark.parametrize(
    ("cwd", "folder"),
    [
        ("site", "/workspace/site"), ("/workspace", "/workspace"), ("/workspace/a/./b/", "/workspace/a/b"),
        ("..", None), ("a/../../etc", None), ("/etc", None), ("/workspace2", None), ("a\0b", None), ("", None),
    ],
)  # fmt: skip
def test_a_folder_to_work_in_is_below_the_workspace(
    as_alice: Api, node_row: Node, cwd: str, folder: str | None
) -> None:
    answer = as_alice.post("/v1/sessions", asked(agent={"kind": "shell", "cwd": cwd}))
    assert answer.status_code == (201 if folder else 400), answer.content
    if folder:
        assert answer.json()["agent"]["cwd"] == folder


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("codex", "max_turns", 3),
        ("shell", "max_turns", 3),
        ("deictic", "cwd", "a"),
        ("codex", "system", "Be."),
    ],
)
def test_a_field_of_another_agent_is_refused(
    as_alice: Api, node_row: Node, kind: str, field: str, value: Any
) -> None:
    answer = as_alice.post("/v1/sessions", asked(agent={"kind": kind, field: value}))
    assert answer.status_code == 400
    errors = [(error["field"], error["code"]) for error in answer.json()["errors"]]
    assert errors == [(f"agent.{field}", "not_allowed")]


def test_a_shell_takes_no_model(as_alice: Api, node_row: Node) -> None:
    answer = as_alice.post("/v1/sessions", asked(llm={"vendor": "anthropic", "model": "claude-x"}))
    refused(answer, 400, "llm_not_allowed", "llm")


@pytest.mark.parametrize("vendor", ["openai", "google", "deepseek"])
def test_a_vendor_that_is_not_built_is_501(
    as_alice: Api, alice: Any, bundle: Callable[..., Any], node_row: Node, vendor: str
) -> None:
    bundle(alice, "mine", LLM_API_KEY=KEY)
    refused(as_alice.post("/v1/sessions", with_model(llm={"vendor": vendor})), 501, "vendor_unavailable")


@pytest.mark.parametrize("model", ["", "claude sonnet", "claude\n", "x" * 129, "модель", "claude;ls"])
def test_a_model_name_of_the_wrong_form(
    as_alice: Api, alice: Any, bundle: Callable[..., Any], node_row: Node, model: str
) -> None:
    bundle(alice, "mine", LLM_API_KEY=KEY)
    refused(
        as_alice.post("/v1/sessions", with_model(llm={"model": model})), 400, "invalid_model", "llm.model"
    )


def test_no_model_at_all_is_an_invalid_model(
    as_alice: Api, alice: Any, bundle: Callable[..., Any], node_row: Node
) -> None:
    bundle(alice, "mine", LLM_API_KEY=KEY)
    body = with_model()
    del body["llm"]["model"]
    refused(as_alice.post("/v1/sessions", body), 400, "invalid_model", "llm.model")
    refused(as_alice.post("/v1/sessions", with_model(llm=...)), 400, "invalid_model", "llm.model")


def test_a_model_of_the_bundle_is_enough(
    as_alice: Api, alice: Any, bundle: Callable[..., Any], node_row: Node
) -> None:
    bundle(alice, "mine", LLM_API_KEY=KEY, LLM_MODEL="claude-haiku-4-5")
    answer = as_alice.post("/v1/sessions", with_model(llm=...))
    assert answer.status_code == 201, answer.content
    assert answer.json()["llm"] == {"vendor": "anthropic", "model": None, "base_url": None}


@pytest.mark.parametrize(
    "url",
    [
        "http://models.example.com", "https://10.0.0.1", "https://127.0.0.1", "https://localhost", "https://[::1]",
        "https://169.254.169.254", "https://192.168.1.1/v1", "https://[fd00::1]", "https://0.0.0.0", "https://2130706433",
        "https://user:secret@models.example.com", "https://models.example.com:8443", "https://models.example.com?x=1",
        "https://models.example.com#x", "ftp://models.example.com", "models.example.com", "https://", "https://a/../b",
        "https://[::ffff:10.0.0.1]", "https://0x7f.1", "javascript:alert(1)", "https://models.example.com\n", " https://a.example.com",
    ],
)  # fmt: skip
def test_a_base_url_that_is_not_public_https_is_forbidden(
    as_alice: Api, alice: Any, bundle: Callable[..., Any], node_row: Node, url: str
) -> None:
    bundle(alice, "mine", LLM_API_KEY=KEY)
    answer = as_alice.post("/v1/sessions", with_model(llm={"base_url": url}))
    refused(answer, 400, "forbidden_url", "llm.base_url")
    assert "secret" not in answer.content.decode()


def test_a_key_goes_to_another_origin_only_with_the_right_to_write_secrets(
    as_alice: Api, alice: Any, api_key: Callable[..., str], bundle: Callable[..., Any], node_row: Node
) -> None:
    bundle(alice, "mine", LLM_API_KEY=KEY)
    narrow = Api(api_key(alice, scopes=["sessions:write", "secrets:read"]))
    body = with_model(llm={"base_url": ELSEWHERE})
    refused(narrow.post("/v1/sessions", body), 400, "origin_mismatch", "llm.base_url")
    assert as_alice.post("/v1/sessions", body).status_code == 201
    assert narrow.post("/v1/sessions", with_model()).status_code == 201


def test_a_key_that_belongs_to_another_origin_stays_there(
    alice: Any, api_key: Callable[..., str], bundle: Callable[..., Any], node_row: Node
) -> None:
    """SECURITY 4.9: the vendor's own address is just another origin for a key that was saved for a gateway's."""
    bundle(alice, "mine", LLM_API_KEY=KEY, LLM_BASE_URL=ELSEWHERE)
    narrow = Api(api_key(alice, scopes=["sessions:write"]))
    answer = narrow.post("/v1/sessions", with_model(llm={"base_url": "https://api.anthropic.com"}))
    refused(answer, 400, "origin_mismatch")
    assert (
        narrow.post(
            "/v1/sessions", with_model(llm={"base_url": "https://models.example.com/other"})
        ).status_code
        == 201
    )
    assert narrow.post("/v1/sessions", with_model()).status_code == 201


def test_the_address_of_another_bundle_does_not_get_the_key(
    alice: Any, api_key: Callable[..., str], bundle: Callable[..., Any], node_row: Node
) -> None:
    bundle(alice, "mine", LLM_API_KEY=KEY)
    bundle(alice, "address", LLM_BASE_URL=ELSEWHERE)
    narrow = Api(api_key(alice, scopes=["sessions:write"]))
    refused(narrow.post("/v1/sessions", with_model(secrets=["mine", "address"])), 400, "origin_mismatch")


def test_bundles_that_are_missing_foreign_or_collide(
    as_alice: Api, alice: Any, mallory: Any, bundle: Callable[..., Any], node_row: Node
) -> None:
    bundle(alice, "one", GITHUB_TOKEN="ghp_of_alice_1")
    bundle(alice, "two", GITHUB_TOKEN="ghp_of_alice_2")
    bundle(mallory, "theirs", GITHUB_TOKEN="ghp_of_mallory")
    missing = as_alice.post("/v1/sessions", asked(secrets=["nothing"]))
    refused(missing, 404, "secret_not_found")
    foreign = as_alice.post("/v1/sessions", asked(secrets=["one", "theirs"]))
    refused(foreign, 404, "secret_not_found")
    assert missing.json()["detail"].replace("nothing", "theirs") == foreign.json()["detail"]
    for name in ("UPPER", "a b", "../x", "one\n"):
        refused(as_alice.post("/v1/sessions", asked(secrets=[name])), 404, "secret_not_found")
    refused(as_alice.post("/v1/sessions", asked(secrets=["one", "two"])), 400, "secret_collision", "secrets")


def test_an_agent_that_calls_a_model_needs_a_key(
    as_alice: Api, alice: Any, bundle: Callable[..., Any], node_row: Node
) -> None:
    refused(as_alice.post("/v1/sessions", with_model(secrets=[])), 400, "missing_llm_key", "secrets")
    bundle(alice, "mine", GITHUB_TOKEN="ghp_of_alice_1")
    refused(as_alice.post("/v1/sessions", with_model()), 400, "missing_llm_key", "secrets")


# -- room


def test_no_node_is_503_at_once_and_leaves_nothing(
    as_alice: Api, alice: Any, bundle: Callable[..., Any]
) -> None:
    bundle(alice, "mine", LLM_API_KEY=KEY)
    answer = as_alice.post("/v1/sessions", with_model())
    refused(answer, 503, "no_node")
    assert answer["Retry-After"].isdigit()


@pytest.mark.parametrize(
    "changes", [{"is_engine_up": False}, {"heartbeat_at": dt.datetime(2020, 1, 1, tzinfo=dt.UTC)}]
)
def test_a_node_that_is_silent_or_without_its_engine_is_none(
    as_alice: Api, node_row: Node, changes: dict[str, Any]
) -> None:
    Node.objects.update(**changes)
    refused(as_alice.post("/v1/sessions", asked()), 503, "no_node")
    Node.objects.update(is_engine_up=True, heartbeat_at=now())
    assert as_alice.post("/v1/sessions", asked()).status_code == 201


def test_a_full_node_is_409_and_a_full_plan_429(as_alice: Api, alice: Any, node_row: Node) -> None:
    Node.objects.update(capacity=0)
    refused(as_alice.post("/v1/sessions", asked()), 409, "no_capacity")
    Node.objects.update(capacity=10)
    Tenant.objects.filter(pk=alice.tenant_id).update(max_live_sandboxes=0)
    refused(as_alice.post("/v1/sessions", asked()), 429, "quota_exceeded")


def test_the_quota_is_freed_by_an_end(as_alice: Api, alice: Any, node_row: Node) -> None:
    Tenant.objects.filter(pk=alice.tenant_id).update(max_live_sandboxes=1)
    first = as_alice.post("/v1/sessions", asked()).json()
    assert as_alice.post("/v1/sessions", asked()).status_code == 429
    assert as_alice.delete(f"/v1/sessions/{first['chat_session_id']}").status_code == 200
    assert as_alice.post("/v1/sessions", asked()).status_code == 201


# -- who


def test_a_scope_that_is_missing_is_403(alice: Any, api_key: Callable[..., str], node_row: Node) -> None:
    reader = Api(api_key(alice, scopes=["sessions:read", "sandboxes:write", "secrets:write"]))
    refused(reader.post("/v1/sessions", asked()), 403, "missing_scope")
    writer = Api(api_key(alice, scopes=["sessions:write"]))
    refused(writer.get("/v1/sessions"), 403, "missing_scope")
    assert reader.get("/v1/sessions").status_code == 200


def test_credentials_that_do_not_count_are_401_with_one_body(
    alice: Any, alice_key: str, api_key: Callable[..., str], account_token: Callable[[Any], str],
    make_session: Callable[..., Session], node_row: Node,
) -> None:  # fmt: skip
    from accounts.tokens import session_token_issue
    from keys.models import ApiKey
    from keys.services import key_issue, key_revoke

    session = make_session()
    stream_token = session_token_issue(
        session_public_id=session.public_id, tenant_public_id=alice.tenant.public_id, version=1,
        expires_at=session.expires_at,
    )  # fmt: skip
    session.delete()
    revoked = key_issue(user=alice)
    key_revoke(key=revoked.row, actor=alice)
    expired = key_issue(user=alice, expires_at=now() + dt.timedelta(minutes=5))
    ApiKey.objects.filter(pk=expired.row.pk).update(expires_at=now() - dt.timedelta(seconds=1))
    with time_machine.travel(now() - dt.timedelta(minutes=16), tick=True):
        old = account_token(alice)
    bodies = set()
    wrong = alice_key[:-1] + ("a" if alice_key[-1] != "a" else "b")
    for token in (None, "", "x", stream_token, revoked.key, expired.key, old, wrong, "a b", "é", "x" * 9000):
        answer = Api(token).post("/v1/sessions", asked())
        refused(answer, 401, "invalid_token")
        assert answer["WWW-Authenticate"] == "Bearer"
        bodies.add(answer.json()["detail"])
    assert len(bodies) == 1
    assert Api(account_token(alice)).post("/v1/sessions", asked()).status_code == 201


def test_neither_a_cookie_nor_a_query_authenticates(alice: Any, alice_key: str, node_row: Node) -> None:
    guest = Api()
    guest.client.force_login(alice)
    refused(guest.post("/v1/sessions", asked()), 401, "invalid_token")
    refused(Api().post(f"/v1/sessions?token={alice_key}", asked()), 401, "invalid_token")


# -- what a good one gives


def test_bounds_are_inside(as_alice: Api, alice: Any, node_row: Node) -> None:
    for changes in (
        {"ttl_seconds": 60, "idle_timeout_seconds": 10, "user_id": "x"},
        {"ttl_seconds": 7200, "idle_timeout_seconds": 7200, "user_id": "x" * 128},
        {"metadata": {f"k{n}": "v" for n in range(16)}, "budget": {"max_usd": 0.5, "max_tokens": 10}},
        {
            "metadata": {},
            "secrets": [],
            "app": {"id": "a", "set_id": "s", "capability_sets": ["x"]},
            "budget": {},
        },
    ):
        assert as_alice.post("/v1/sessions", asked(**changes)).status_code == 201, changes


def test_a_new_session_shows_what_it_is_and_no_secret(
    as_alice: Api, alice: Any, bundle: Callable[..., Any], node_row: Node
) -> None:
    bundle(alice, "mine", LLM_API_KEY=KEY, GITHUB_TOKEN="ghp_of_alice_1")
    answer = as_alice.post(
        "/v1/sessions",
        with_model(
            agent={"kind": "deictic", "system": "Be brief.", "max_turns": 3}, user_id="jo", metadata={"a": "b"},
            budget={"max_tokens": 5}, app={"id": "app1"},
        ),
    )  # fmt: skip
    assert answer.status_code == 201
    assert answer["Cache-Control"] == "no-store"
    body = answer.json()
    assert KEY not in answer.content.decode()
    assert "ghp_of_alice_1" not in answer.content.decode()
    assert body["status"] == "starting"
    assert body["agent"] == {"kind": "deictic", "system": "Be brief.", "max_turns": 3}
    assert body["llm"] == {"vendor": "anthropic", "model": "claude-sonnet-4-5", "base_url": None}
    assert (body["user_id"], body["metadata"], body["app"]) == ("jo", {"a": "b"}, {"id": "app1"})
    assert body["usage"] == {"input_tokens": 0, "output_tokens": 0, "cache_read_tokens": 0, "cost_usd": 0.0}
    assert body["connect_url"] == f"ws://testserver/v1/sessions/{body['chat_session_id']}/ws"
    assert body["sandbox_id"].startswith("sbx_")
    assert Sandbox.objects.get(public_id=body["sandbox_id"]).state == SandboxState.CREATING
    shown = as_alice.get(f"/v1/sessions/{body['chat_session_id']}").json()
    # Why it is alive is asked of its guest, so it is shown when one asks, and not when one creates.
    alive = {name: shown.pop(name) for name in ("alive_because", "alive_detail", "alive_since", "ends_at")}
    assert (alive["alive_because"], alive["alive_detail"]) == ("starting", "It is being made.")
    assert shown == {name: value for name, value in body.items() if name in shown}
    assert not {"jwt", "token"} & shown.keys()


# -- once


def test_the_same_idempotency_key_makes_one_session(as_alice: Api, node_row: Node) -> None:
    headers = {"Idempotency-Key": "first"}
    one = as_alice.post("/v1/sessions", asked(), headers=headers)
    two = as_alice.post("/v1/sessions", asked(), headers=headers)
    assert (one.status_code, two.status_code) == (201, 201)
    assert one.json() == two.json()
    assert "Idempotent-Replayed" not in one
    assert two["Idempotent-Replayed"] == "true"
    assert Session.objects.count() == 1
    other = as_alice.post("/v1/sessions", asked(user_id="u2"), headers=headers)
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_mismatch")


def test_an_idempotency_key_is_the_tenants_own_and_a_failure_is_not_kept(
    as_alice: Api, as_mallory: Api, node_row: Node
) -> None:
    headers = {"Idempotency-Key": "shared"}
    assert as_alice.post("/v1/sessions", asked(template="none"), headers=headers).status_code == 400
    mine = as_alice.post("/v1/sessions", asked(), headers=headers)
    theirs = as_mallory.post("/v1/sessions", asked(), headers=headers)
    assert (mine.status_code, theirs.status_code) == (201, 201)
    assert mine.json()["chat_session_id"] != theirs.json()["chat_session_id"]
    answer = as_alice.post("/v1/sessions", asked(), headers={"Idempotency-Key": "x" * 256})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_idempotency_key")


def test_a_kept_answer_holds_no_token_in_clear(as_alice: Api, node_row: Node) -> None:
    from e2a.core.models import IdempotencyRecord

    token = as_alice.post("/v1/sessions", asked(), headers={"Idempotency-Key": "k1"}).json()["jwt"]
    record = IdempotencyRecord.objects.get()
    assert record.is_sealed
    assert token.encode() not in bytes(record.answer)
    assert "k1" not in record.key_digest

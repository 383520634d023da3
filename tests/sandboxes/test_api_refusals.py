"""What `/v1/sandboxes` refuses, and to whom."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any

import pytest

from accounts.models import Tenant
from e2a.core.clock import now, seconds
from sandboxes.models import Node, Sandbox, SandboxState, Template
from tests.fixtures import Api
from tests.sandboxes.test_warm_and_cold import made

UNKNOWN = "sbx_aaaaaaaaaaaaaaaaaaaaaaaaaa"
ROUTES = [
    ("GET", "", None),
    ("DELETE", "", None),
    ("POST", "/exec", {"command": "true"}),
    ("POST", "/extend", {"seconds": 60}),
    ("POST", "/pause", {}),
    ("POST", "/token", {}),
    ("GET", "/previews", None),
    ("POST", "/previews", {"port": 8000}),
    ("DELETE", "/previews/prv_x", None),
    ("POST", "/resume", {}),
    ("GET", "/logs", None),
    ("GET", "/files?path=a", None),
    ("PUT", "/files?path=a", b"x"),
    ("DELETE", "/files?path=a", None),
    ("GET", "/files/list?path=a", None),
    ("GET", "/files/stat?path=a", None),
    ("GET", "/archive?path=a", None),
    ("PUT", "/archive?path=a", b"x"),
    ("POST", "/files/move", {"from": "a", "to": "b"}),
    ("POST", "/files/mkdir", {"path": "a"}),
    ("POST", "/snapshot", {"name": "x"}),
    ("GET", "/jobs", None),
    ("POST", "/jobs", {"command": "true"}),
    ("GET", "/jobs/job_aaaaaaaaaaaaaaaaaaaaaaaaaa", None),
    ("DELETE", "/jobs/job_aaaaaaaaaaaaaaaaaaaaaaaaaa", None),
    ("GET", "/jobs/job_aaaaaaaaaaaaaaaaaaaaaaaaaa/output", None),
    ("POST", "/jobs/job_aaaaaaaaaaaaaaaaaaaaaaaaaa/signal", {"signal": "TERM"}),
    ("POST", "/jobs/job_aaaaaaaaaaaaaaaaaaaaaaaaaa/stdin", {"data": "x"}),
]


def refused(answer: Any, status: int, code: str) -> None:
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.content
    assert answer["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize(("method", "rest", "body"), ROUTES)
def test_a_strangers_sandbox_is_like_one_that_never_was(
    node_row: Node, as_alice: Api, as_mallory: Api, method: str, rest: str, body: Any
) -> None:
    mine = made(as_alice)["vm_id"]
    foreign = as_mallory.request(method, f"/v1/sandboxes/{mine}{rest}", body)
    missing = as_mallory.request(method, f"/v1/sandboxes/{UNKNOWN}{rest}", body)
    refused(foreign, 404, "not_found")
    assert foreign.json() | {"request_id": ""} == missing.json() | {"request_id": ""}
    assert Sandbox.objects.get(public_id=mine).state == SandboxState.CREATING


def test_a_list_holds_my_own_only(node_row: Node, as_alice: Api, as_mallory: Api) -> None:
    mine = [made(as_alice)["vm_id"] for _ in range(3)]
    assert as_mallory.get("/v1/sandboxes").json() == []
    first = as_alice.get("/v1/sandboxes?limit=2&state=creating")
    assert [row["vm_id"] for row in first.json()] == mine[:0:-1]
    assert first["Link"].endswith('>; rel="next"')
    rest = as_alice.get(first["Link"][1:].partition(">")[0].removeprefix("http://testserver"))
    assert [row["vm_id"] for row in rest.json()] == mine[:1]
    assert "Link" not in rest


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"template": "windows"}, "unknown_template"),
        ({"template": 5}, "invalid"),
        ({"idle_timeout_seconds": 9}, "min_value"),
        ({"idle_timeout_seconds": 7201}, "max_value"),
        ({"max_lifetime_seconds": 7201}, "max_value"),
        ({"max_lifetime_seconds": True}, "invalid"),
        ({"env_vars": {"PATH": "/x"}}, "reserved_name"),
        ({"env_vars": {"E2A_X": "1"}}, "reserved_name"),
        ({"env_vars": {"https_proxy": "x"}}, "reserved_name"),
        ({"env_vars": {"LLM_API_KEY": "sk-12345678"}}, "reserved_name"),
        ({"env_vars": {"1A": "x"}}, "bad_name"),
        ({"env_vars": ["A"]}, "not_an_object"),
        ({"env_vars": {"A": "x" * 200_000}}, "too_long"),
        ({"metadata": {str(n): "" for n in range(17)}}, "too_many"),
        ({"metadata": {"a": 1}}, "not_text"),
        ({"secrets": ["Bad Name"]}, "invalid"),
        ({"secrets": ["a", "a"]}, "duplicate"),
        ({"secrets": [f"b{n}" for n in range(11)]}, "max_length"),
        ({"tenant_id": "x"}, "unknown_field"),
    ],
)
def test_a_bad_body_is_refused_by_field(
    node_row: Node, as_alice: Api, body: dict[str, Any], code: str
) -> None:
    answer = as_alice.post("/v1/sandboxes", body)
    assert answer.status_code == 400, answer.content
    problem = answer.json()
    assert code == problem["code"] or code in [error["code"] for error in problem["errors"]]
    assert Sandbox.objects.count() == 0


def test_a_bundle_that_is_missing_leaves_no_sandbox(node_row: Node, as_alice: Api) -> None:
    refused(as_alice.post("/v1/sandboxes", {"secrets": ["nope"]}), 404, "secret_not_found")
    assert Sandbox.objects.count() == 0


def test_a_strangers_bundle_is_missing(node_row: Node, as_alice: Api, as_mallory: Api) -> None:
    as_alice.post("/v1/tenants/me/secrets", {"name": "mine", "values": {"TOKEN": "12345678"}})
    refused(as_mallory.post("/v1/sandboxes", {"secrets": ["mine"]}), 404, "secret_not_found")


def test_malformed_json_and_no_key(node_row: Node, as_alice: Api, api: Callable[..., Api]) -> None:
    refused(as_alice.post("/v1/sandboxes", b"{"), 400, "malformed_json")
    refused(api(None).get("/v1/sandboxes"), 401, "invalid_token")
    refused(api(None).post("/v1/sandboxes", {}), 401, "invalid_token")


def test_a_key_may_do_what_its_scopes_say(
    node_row: Node, alice: Any, api: Callable[..., Api], api_key: Callable[..., str]
) -> None:
    reader = api(api_key(alice, scopes=["sandboxes:read"]))
    assert reader.get("/v1/sandboxes").status_code == 200
    refused(reader.post("/v1/sandboxes", {}), 403, "missing_scope")
    refused(reader.delete(f"/v1/sandboxes/{UNKNOWN}"), 403, "missing_scope")
    refused(api(api_key(alice, scopes=["usage:read"])).get("/v1/templates"), 403, "missing_scope")


def test_a_quota_is_said_by_its_name(node_row: Node, alice: Any, as_alice: Api) -> None:
    Tenant.objects.filter(pk=alice.tenant.pk).update(max_live_sandboxes=1)
    made(as_alice)
    refused(as_alice.post("/v1/sandboxes", {}), 429, "quota_exceeded")


def test_full_nodes_are_409_and_dead_ones_503(node_row: Node, as_alice: Api) -> None:
    Node.objects.update(capacity=1)
    made(as_alice)
    refused(as_alice.post("/v1/sandboxes", {}), 409, "no_capacity")
    Node.objects.update(is_engine_up=False)
    down = as_alice.post("/v1/sandboxes", {})
    refused(down, 503, "no_node")
    assert "engine" in down.json()["detail"]
    assert int(down["Retry-After"]) > 0
    Node.objects.update(is_engine_up=True, heartbeat_at=now() - seconds(31))
    refused(as_alice.post("/v1/sandboxes", {}), 503, "no_node")
    Node.objects.update(heartbeat_at=now(), capacity=2)
    Node.objects.update(images={})
    assert not as_alice.get("/v1/templates").json()["templates"][-1]["available"]
    refused(as_alice.post("/v1/sandboxes", {}), 503, "template_not_ready")
    assert Template.objects.get(name="standard").wanted_at is not None


def test_a_parked_sandbox_of_a_dead_node_is_not_claimed(
    node_row: Node, parked_row: Callable[[], Sandbox], as_alice: Api
) -> None:
    parked_row()
    Node.objects.update(heartbeat_at=now() - dt.timedelta(minutes=1))
    refused(as_alice.post("/v1/sandboxes", {}), 503, "no_node")


def test_the_same_idempotency_key_makes_one(node_row: Node, as_alice: Api) -> None:
    headers = {"Idempotency-Key": "once"}
    first = as_alice.post("/v1/sandboxes", {}, headers=headers)
    second = as_alice.post("/v1/sandboxes", {}, headers=headers)
    assert first.json() == second.json()
    assert second["Idempotent-Replayed"] == "true"
    assert Sandbox.objects.count() == 1


@pytest.mark.parametrize("query", ["state=parked", "state=gone", "limit=0", "limit=101", "cursor=!"])
def test_a_list_refuses_a_bad_query(as_alice: Api, query: str) -> None:
    assert as_alice.get(f"/v1/sandboxes?{query}").status_code == 400


def test_templates_are_listed(node_row: Node, as_alice: Api) -> None:
    Node.objects.update(soft_limits=["disk_mib is not enforced"])
    answer = as_alice.get("/v1/templates").json()
    assert answer["next_cursor"] is None
    assert {one["name"]: one["available"] for one in answer["templates"]} == {
        "standard": True,
        "browser": False,
        "cua": False,
        "canvas": False,
    }
    assert [one for one in answer["templates"] if one["available"]] == [
        {
            "name": "standard",
            "description": Template.objects.get(name="standard").description,
            "vcpu": 0.5,
            "memory_mib": 512,
            "disk_mib": 2048,
            "agents": ["deictic", "claude-code", "codex", "shell"],
            "available": True,
            "soft_limits": ["disk_mib is not enforced"],
        }
    ]

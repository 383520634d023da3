"""Egress rules in the API and on a sandbox's page. What they do to bytes is in tests/egress and test_egress_live.py."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.test import Client

from sandboxes.gateway.address import socket_path
from sandboxes.models import Node, Sandbox, SandboxState, Template
from tests.fixtures import Api
from tests.sandboxes.running import RunningNode, at_once, wait_until
from tests.sandboxes.test_warm_and_cold import exec_in, made

NOTHING: dict[str, list[str]] = {"allow": [], "deny": []}


@pytest.fixture
def node(make_node: Callable[..., RunningNode]) -> RunningNode:
    node = make_node(pool=1)
    node.wait_parked(1)
    return node


@pytest.fixture
def browser(alice: Any) -> Client:
    client = Client()
    client.force_login(alice)
    return client


def through_the_proxy(node: RunningNode, sandbox: str, request: str) -> str:
    """What the sandbox's way out answers: from inside it looks the same."""
    path: Path = node.host.sandboxes_folder / sandbox / "host" / "egress.sock"
    wait_until(path.exists, what="its way out")
    with socket.socket(socket.AF_UNIX) as client, socket_path(path) as name:
        client.settimeout(20)
        client.connect(name)
        client.sendall(request.encode())
        answer = b""
        while piece := client.recv(65536):
            answer += piece
    return answer.decode()


def asks(host: str) -> str:
    return f"GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\n\r\n"


def shown(api: Api, sandbox: str) -> dict[str, Any]:
    answer = api.get(f"/v1/sandboxes/{sandbox}/egress")
    assert answer.status_code == 200, answer.content
    found: dict[str, Any] = answer.json()
    return found


def test_by_default_nothing_is_allowed(node_row: Node, as_alice: Api) -> None:
    sandbox = made(as_alice)["vm_id"]
    assert shown(as_alice, sandbox) == {
        **NOTHING, "template_allow": [], "template_deny": [], "entries": [], "is_complete": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("egress", "fields"),
    [
        ("x", ["egress"]),
        (["a.example.com"], ["egress"]),
        ({"allow": "a.example.com"}, ["egress.allow"]),
        ({"allow": ["a.example.com"], "log": True}, ["egress"]),
        ({"allow": ["a.example.com", "a b"], "deny": ["*.*"]}, ["egress.allow.1", "egress.deny.0"]),
        ({"allow": ["https://a.example.com"]}, ["egress.allow.0"]),
        ({"allow": ["db.internal"]}, ["egress.allow.0"]),
        ({"allow": [7]}, ["egress.allow.0"]),
        ({"allow": ["a.example.com:0"]}, ["egress.allow.0"]),
    ],
)
def test_bad_rules_are_refused_by_entry(
    node_row: Node, as_alice: Api, egress: Any, fields: list[str]
) -> None:
    for path, body in (
        ("/v1/sandboxes", {"egress": egress}),
        ("/v1/sessions", {"agent": {"kind": "shell"}, "user_id": "u", "egress": egress}),
    ):
        answer = as_alice.post(path, body)
        assert (answer.status_code, answer.json()["code"]) == (400, "bad_egress"), answer.content
        assert [error["field"] for error in answer.json()["errors"]] == fields
    assert Sandbox.objects.count() == 0


def test_rules_are_kept_in_their_normal_form(node_row: Node, as_alice: Api) -> None:
    asked = {"allow": ["API.Example.com.", "*.bücher.example:8443", "[2606:4700::1111]:443"], "deny": []}
    sandbox = made(as_alice, egress=asked)["vm_id"]
    assert shown(as_alice, sandbox)["allow"] == [
        "api.example.com", "*.xn--bcher-kva.example:8443", "[2606:4700::1111]:443",
    ]  # fmt: skip
    path = f"/v1/sandboxes/{sandbox}/egress"
    answer = as_alice.put(path, {"deny": ["a.example.com"]})
    assert (answer.status_code, answer.json()["allow"], answer.json()["deny"]) == (200, [], ["a.example.com"])
    bad = as_alice.put(path, {"allow": ["a.example.com", "db.internal"]})
    assert (bad.status_code, bad.json()["code"]) == (400, "bad_egress")
    assert as_alice.put(path, {"allowed": []}).json()["code"] == "unknown_field"
    assert shown(as_alice, sandbox)["deny"] == ["a.example.com"]


def test_a_templates_rules_are_shown_apart_and_hold_besides(node: RunningNode, as_alice: Api) -> None:
    Template.objects.filter(name="standard").update(egress={"allow": ["none.invalid"], "deny": ["x.example"]})
    sandbox = made(as_alice, egress={"allow": ["x.example"]})["vm_id"]
    exec_in(as_alice, sandbox, "true")
    found = shown(as_alice, sandbox)
    assert (found["allow"], found["template_allow"], found["template_deny"]) == (
        ["x.example"], ["none.invalid"], ["x.example"],
    )  # fmt: skip
    assert "no_address" in through_the_proxy(node, sandbox, asks("none.invalid"))
    assert "egress_denied" in through_the_proxy(node, sandbox, asks("x.example"))


def test_a_change_holds_at_once_and_verdicts_are_shown(node: RunningNode, as_alice: Api) -> None:
    sandbox = made(as_alice)["vm_id"]
    answer = through_the_proxy(node, sandbox, asks("none.invalid"))
    assert answer.startswith("HTTP/1.1 403 ")
    assert json.loads(answer.partition("\r\n\r\n")[2])["code"] == "egress_denied"
    path = f"/v1/sandboxes/{sandbox}/egress"
    assert as_alice.put(path, {"allow": ["none.invalid"]}).status_code == 200
    assert through_the_proxy(node, sandbox, asks("none.invalid")).startswith("HTTP/1.1 502 ")
    assert as_alice.put(path, {}).json()["allow"] == []
    assert through_the_proxy(node, sandbox, asks("none.invalid")).startswith("HTTP/1.1 403 ")
    entries = shown(as_alice, sandbox)["entries"]
    assert [(one["host"], one["port"], one["reason"], one["count"]) for one in entries] == [
        ("none.invalid", 80, "not_allowed", 2), ("none.invalid", 80, "no_address", 1),
    ]  # fmt: skip
    assert [one["rule"] for one in entries] == ["", "none.invalid"]


def test_what_was_seen_outlives_the_sandbox(node: RunningNode, worker: Any, as_alice: Api) -> None:
    sandbox = made(as_alice)["vm_id"]
    through_the_proxy(node, sandbox, asks("a.example.com"))
    seen = node.host.sandboxes_folder / sandbox / "egress-seen.json"
    wait_until(seen.exists, what="written down")
    as_alice.delete(f"/v1/sandboxes/{sandbox}")
    wait_until(lambda: as_alice.get(f"/v1/sandboxes/{sandbox}").json()["state"] == "destroyed", what="gone")
    assert [one["host"] for one in shown(as_alice, sandbox)["entries"]] == ["a.example.com"]
    late = as_alice.put(f"/v1/sandboxes/{sandbox}/egress", {"allow": []})
    assert (late.status_code, late.json()["code"]) == (409, "not_running")


def test_rules_that_its_gateway_did_not_hear_are_kept_and_told_at_the_next_use(
    node: RunningNode, as_alice: Api
) -> None:
    sandbox = made(as_alice)["vm_id"]
    row = Node.objects.get()
    Node.objects.update(address="unix:/nowhere/gateway.sock")
    path = f"/v1/sandboxes/{sandbox}/egress"
    answer = as_alice.put(path, {"allow": ["none.invalid"]})
    assert (answer.status_code, answer.json()["code"]) == (503, "sandbox_unreachable"), answer.content
    found = shown(as_alice, sandbox)
    assert (found["allow"], found["is_complete"]) == (["none.invalid"], False)
    assert through_the_proxy(node, sandbox, asks("none.invalid")).startswith("HTTP/1.1 403 ")
    Node.objects.update(address=row.address)
    exec_in(as_alice, sandbox, "true")
    assert through_the_proxy(node, sandbox, asks("none.invalid")).startswith("HTTP/1.1 502 ")


def test_a_stranger_sees_and_changes_nothing(node_row: Node, as_alice: Api, as_mallory: Api) -> None:
    sandbox = made(as_alice, egress={"allow": ["a.example.com"]})["vm_id"]
    path = f"/v1/sandboxes/{sandbox}/egress"
    assert as_mallory.get(path).status_code == 404
    assert as_mallory.put(path, {"allow": ["evil.example"]}).status_code == 404
    assert shown(as_alice, sandbox)["allow"] == ["a.example.com"]


def test_a_key_that_may_only_read_changes_nothing(
    node_row: Node, alice: Any, as_alice: Api, api_key: Callable[..., str]
) -> None:
    path = f"/v1/sandboxes/{made(as_alice)['vm_id']}/egress"
    reader = Api(api_key(alice, scopes=["sandboxes:read"]))
    assert reader.get(path).status_code == 200
    refused = reader.put(path, {"allow": ["a.example.com"]})
    assert (refused.status_code, refused.json()["code"]) == (403, "missing_scope")


def test_a_sessions_rules_are_its_sandboxes(node: RunningNode, as_alice: Api) -> None:
    body = {"agent": {"kind": "shell"}, "user_id": "u", "egress": {"allow": ["A.example.com"]}}
    answer = as_alice.post("/v1/sessions", body)
    assert answer.status_code == 201, answer.content
    session, sandbox = answer.json()["chat_session_id"], answer.json()["sandbox_id"]
    wait_until(lambda: Sandbox.objects.get(public_id=sandbox).state == SandboxState.RUNNING, what="running")
    assert shown(as_alice, sandbox)["allow"] == ["a.example.com"]
    patched = as_alice.patch(f"/v1/sessions/{session}", {"egress": {"allow": ["none.invalid"]}})
    assert patched.status_code == 200, patched.content
    assert shown(as_alice, sandbox)["allow"] == ["none.invalid"]
    assert through_the_proxy(node, sandbox, asks("none.invalid")).startswith("HTTP/1.1 502 ")
    bad = as_alice.patch(f"/v1/sessions/{session}", {"egress": {"allow": ["localhost"]}})
    assert (bad.status_code, bad.json()["code"]) == (400, "bad_egress")


def test_its_page_says_what_was_blocked_and_allows_it(
    node: RunningNode, as_alice: Api, browser: Client, mallory: Any
) -> None:
    sandbox = made(as_alice)["vm_id"]
    assert "It may reach nothing." in browser.get(f"/sandboxes/{sandbox}").content.decode()
    through_the_proxy(node, sandbox, asks("none.invalid"))
    page = browser.get(f"/sandboxes/{sandbox}").content.decode()
    assert "Blocked" in page
    assert "none.invalid:80" in page
    assert "no rule allows it" in page
    button = f"/sandboxes/{sandbox}/egress/allow"
    assert f'action="{button}"' in page
    stranger = Client()
    stranger.force_login(mallory)
    form = {"host": "none.invalid", "port": "80"}
    assert stranger.post(button, form).status_code == 404
    assert browser.get(button).status_code == 405
    after = browser.post(button, form, follow=True).content.decode()
    assert "It may reach" in after
    assert "It may reach nothing" not in after
    assert f'action="{button}"' not in after
    assert through_the_proxy(node, sandbox, asks("none.invalid")).startswith("HTTP/1.1 502 ")
    assert shown(as_alice, sandbox)["allow"] == ["none.invalid"]


@pytest.mark.django_db(transaction=True)
def test_what_is_allowed_at_the_same_moment_is_all_allowed(node_row: Node, as_alice: Api, alice: Any) -> None:
    sandbox = made(as_alice, egress={"allow": ["first.example"]})["vm_id"]

    def allow(number: int) -> int:
        client = Client()
        client.force_login(alice)
        form = {"host": f"h{number}.example.com", "port": "443"}
        return client.post(f"/sandboxes/{sandbox}/egress/allow", form).status_code

    assert at_once(8, allow) == [302] * 8
    assert set(shown(as_alice, sandbox)["allow"]) == {
        "first.example", *(f"h{number}.example.com" for number in range(8)),
    }  # fmt: skip


def test_no_button_offers_what_no_rule_can_allow(node: RunningNode, as_alice: Api, browser: Client) -> None:
    sandbox = made(as_alice)["vm_id"]
    for host in ("10.1.2.3", "printer.local", "none.invalid"):
        through_the_proxy(node, sandbox, asks(host))
    page = browser.get(f"/sandboxes/{sandbox}").content.decode()
    assert all(f"{host}:80" in page for host in ("10.1.2.3", "printer.local", "none.invalid"))
    assert page.count(f'action="/sandboxes/{sandbox}/egress/allow"') == 1
    assert '<input type="hidden" name="host" value="none.invalid">' in page


def test_its_page_refuses_what_the_api_would(node_row: Node, as_alice: Api, browser: Client) -> None:
    sandbox = made(as_alice)["vm_id"]
    button = f"/sandboxes/{sandbox}/egress/allow"
    for form in ({"host": "db.internal", "port": "80"}, {"host": "<b>", "port": "x"}, {}):
        answer = browser.post(button, form, follow=True)
        assert answer.status_code == 200
        assert "<b>:" not in answer.content.decode()
    assert shown(as_alice, sandbox)["allow"] == []

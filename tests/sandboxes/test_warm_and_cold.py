"""Making a sandbox: from the pool, or from nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sandboxes.models import Sandbox, SandboxMove, SandboxState
from tests.fixtures import Api
from tests.sandboxes.running import RunningNode, wait_until

MakeNode = Callable[..., RunningNode]


def made(api: Api, **body: Any) -> dict[str, Any]:
    answer = api.post("/v1/sandboxes", body)
    assert answer.status_code == 201, answer.content
    found: dict[str, Any] = answer.json()
    return found


def exec_in(api: Api, sandbox_id: str, command: str, **body: Any) -> dict[str, Any]:
    answer = api.post(f"/v1/sandboxes/{sandbox_id}/exec", {"command": command, **body})
    assert answer.status_code == 200, answer.content
    found: dict[str, Any] = answer.json()
    return found


def test_a_parked_sandbox_is_claimed_and_running_at_once(make_node: MakeNode, as_alice: Api) -> None:
    make_node(pool=1).wait_parked(1)
    started = time.perf_counter()
    sandbox = made(as_alice, metadata={"purpose": "test"})
    took = time.perf_counter() - started
    assert sandbox["state"] == "running"
    assert sandbox["vm_id"] == sandbox["sandbox_id"]
    assert (sandbox["template"], sandbox["vcpu"], sandbox["cpu_fraction"], sandbox["memory_mib"]) == (
        "standard",
        0.5,
        0.5,
        512,
    )
    assert sandbox["metadata"] == {"purpose": "test"}
    assert exec_in(as_alice, sandbox["vm_id"], "echo hello; echo oops >&2; exit 3") | {"duration_ms": 0} == {
        "exit_code": 3,
        "stdout": "hello\n",
        "stderr": "oops\n",
        "duration_ms": 0,
        "truncated": False,
        "oom": False,
    }
    assert took < 2, f"a warm claim took {took:.2f} s"
    row = Sandbox.objects.get(public_id=sandbox["vm_id"])
    moves = SandboxMove.objects.filter(sandbox=row).order_by("pk").values_list("from_state", "to_state")
    assert list(moves) == [
        ("", "creating"),
        ("creating", "configuring"),
        ("configuring", "booting"),
        ("booting", "parked"),
        ("parked", "booting"),
        ("booting", "running"),
    ]


def test_without_a_pool_it_is_made_and_what_is_done_with_it_waits(
    node: RunningNode, worker: Any, as_alice: Api
) -> None:
    sandbox = made(as_alice, env_vars={"GREETING": "good morning"})
    assert sandbox["state"] == "creating"
    assert exec_in(as_alice, sandbox["vm_id"], "echo $GREETING")["stdout"] == "good morning\n"
    shown = as_alice.get(f"/v1/sandboxes/{sandbox['vm_id']}").json()
    assert shown["state"] == "running"
    assert shown["death"] is None


def test_the_pool_is_filled_again_after_a_claim(make_node: MakeNode, as_alice: Api) -> None:
    node = make_node(pool=1)
    first = node.wait_parked(1)[0]
    made(as_alice)
    assert node.wait_parked(1)[0].pk != first.pk


def test_destroying_removes_the_container_and_frees_the_slot(
    make_node: MakeNode, worker: Any, as_alice: Api
) -> None:
    node = make_node(pool=1)
    node.wait_parked(1)
    sandbox = made(as_alice)
    for _ in range(2):
        answer = as_alice.delete(f"/v1/sandboxes/{sandbox['vm_id']}")
        assert (answer.status_code, answer.json()) == (
            200,
            {"vm_id": sandbox["vm_id"], "status": "destroyed"},
        )
    rows = Sandbox.objects.filter(public_id=sandbox["vm_id"])
    wait_until(lambda: rows.get().state == SandboxState.DESTROYED, what="destroyed")
    assert node.host.engine.inspect(sandbox["vm_id"], 1) is None
    shown = as_alice.get(f"/v1/sandboxes/{sandbox['vm_id']}").json()
    assert shown["state"] == "destroyed"
    assert shown["death"]["reason"] == "user"
    assert as_alice.get("/v1/sandboxes").json() == []
    assert [row["vm_id"] for row in as_alice.get("/v1/sandboxes?state=destroyed").json()] == [
        sandbox["vm_id"]
    ]
    refused = as_alice.post(f"/v1/sandboxes/{sandbox['vm_id']}/exec", {"command": "true"})
    assert (refused.status_code, refused.json()["code"]) == (409, "not_running")


def test_a_parked_sandbox_whose_guest_is_dead_is_skipped(
    make_node: MakeNode, worker: Any, as_alice: Api
) -> None:
    node = make_node(pool=1)
    dead = node.wait_parked(1)[0]
    node.agent.stop(wait_seconds=10)  # type: ignore[union-attr]  # it has started
    socket = node.host.sandboxes_folder / dead.public_id / "guest" / "guest.sock"
    socket.unlink()
    sandbox = made(as_alice)
    assert sandbox["vm_id"] != dead.public_id
    assert sandbox["state"] == "creating"
    dead.refresh_from_db()
    assert (dead.tenant, dead.death_reason) == (None, "lost")
    assert [row["vm_id"] for row in as_alice.get("/v1/sandboxes").json()] == [sandbox["vm_id"]]

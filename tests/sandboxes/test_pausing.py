"""Pause and resume: frozen where it was, resumed by use, ended by its time."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from e2a.core.clock import now, seconds
from e2a.core.errors import EngineError
from sandboxes.configuration import is_configuration_current
from sandboxes.models import Sandbox, SandboxMove, SandboxState
from sandboxes.pausing import freezing_sweep, sandbox_freeze
from sandboxes.reaping import sandboxes_reap
from sandboxes.services import sandbox_end_move, sandbox_end_tell
from tests.fixtures import Api
from tests.sandboxes.running import RunningNode, at_once, streamed, wait_until
from tests.sandboxes.test_warm_and_cold import exec_in, made

pytestmark = pytest.mark.alone  # It stops and continues processes, and looks how soon.

MakeNode = Callable[..., RunningNode]


@pytest.fixture
def node(make_node: MakeNode) -> RunningNode:
    node = make_node(pool=1)
    node.wait_parked(1)
    return node


def status_of(node: RunningNode, sandbox: str) -> str:
    state = node.host.engine.inspect(sandbox, 1)
    assert state is not None
    return state.status


def is_soon(node: RunningNode, sandbox: str, status: str) -> None:
    """A stopped process takes a moment to stand still; Docker's answer is the fact."""
    wait_until(lambda: status_of(node, sandbox) == status, what=status, seconds=5)


def test_paused_it_stands_still_and_resumed_it_goes_on(node: RunningNode, worker: Any, as_alice: Api) -> None:
    sandbox = made(as_alice)["vm_id"]
    url = f"/v1/sandboxes/{sandbox}"
    job = as_alice.post(f"{url}/jobs", {"command": "while sleep 0.05; do echo x; done"}).json()["job_id"]
    paused = as_alice.post(f"{url}/pause", {})
    assert (paused.status_code, paused.json()["state"], paused.json()["alive_because"]) == (
        200,
        "paused",
        "paused",
    )
    is_soon(node, sandbox, "paused")
    assert as_alice.post(f"{url}/pause", {}).json()["state"] == "paused"
    assert as_alice.get(f"{url}/jobs/{job}").json()["state"] == "running"
    is_soon(node, sandbox, "paused")
    resumed = as_alice.post(f"{url}/resume", {})
    assert (resumed.status_code, resumed.json()["state"]) == (200, "running")
    is_soon(node, sandbox, "running")
    assert as_alice.post(f"{url}/resume", {}).json()["state"] == "running"
    read = as_alice.get(f"{url}/jobs/{job}/output").json()["next_after"]
    wait_until(
        lambda: as_alice.get(f"{url}/jobs/{job}/output").json()["next_after"] > read, what="it goes on"
    )


def test_exec_and_files_resume_it(node: RunningNode, worker: Any, as_alice: Api) -> None:
    sandbox = made(as_alice)["vm_id"]
    url = f"/v1/sandboxes/{sandbox}"
    as_alice.put(f"{url}/files?path=a", b"kept")
    for use in (
        lambda: exec_in(as_alice, sandbox, "cat a")["stdout"] == "kept",
        lambda: streamed(as_alice.get(f"{url}/files?path=a")) == b"kept",
    ):
        as_alice.post(f"{url}/pause", {})
        assert use()
        assert as_alice.get(url).json()["state"] == "running"
    moves = SandboxMove.objects.filter(sandbox__public_id=sandbox, to_state="running")
    assert [move.why for move in moves.order_by("pk")][1:] == ["used while paused"] * 2


def test_many_uses_at_once_resume_it_once(node: RunningNode, worker: Any, as_alice: Api) -> None:
    sandbox = made(as_alice)["vm_id"]
    as_alice.post(f"/v1/sandboxes/{sandbox}/pause", {})
    answers = at_once(20, lambda number: exec_in(as_alice, sandbox, f"echo {number}")["stdout"])
    assert answers == [f"{number}\n" for number in range(20)]
    assert SandboxMove.objects.filter(from_state="paused").count() == 1


def test_a_command_that_was_paused_goes_on_and_its_caller_gets_its_answer(
    node: RunningNode, worker: Any, as_alice: Api
) -> None:
    sandbox = made(as_alice)["vm_id"]
    url = f"/v1/sandboxes/{sandbox}"

    def act(number: int) -> Any:
        if number == 0:
            return exec_in(as_alice, sandbox, "touch begun; until [ -e go ]; do sleep 0.05; done; echo done")
        wait_until(lambda: as_alice.get(f"{url}/files/stat?path=begun").status_code == 200, what="it began")
        assert as_alice.post(f"{url}/pause", {}).json()["state"] == "paused"
        is_soon(node, sandbox, "paused")
        return as_alice.put(f"{url}/files?path=go", b"").status_code

    done, put = at_once(2, act)
    assert put == 200
    assert isinstance(done, dict)
    assert (done["exit_code"], done["stdout"]) == (0, "done\n")


def test_a_new_end_reaches_the_guest_when_it_is_thawed(node: RunningNode, as_alice: Api, worker: Any) -> None:
    sandbox = made(as_alice)["vm_id"]
    as_alice.post(f"/v1/sandboxes/{sandbox}/pause", {})
    rows = Sandbox.objects.filter(public_id=sandbox)
    before = rows.get().configured_with
    sandbox_end_move(sandbox_pk=rows.get().pk, expires_at=now() + seconds(9000), lifetime_seconds=9000)
    sandbox_end_tell(rows.get().pk)
    assert rows.get().configured_with == before
    as_alice.post(f"/v1/sandboxes/{sandbox}/resume", {})
    row = rows.get()
    assert row.configured_with != before
    assert is_configuration_current(row)


def test_a_paused_one_ends_at_its_time_and_not_for_idleness(
    node: RunningNode, worker: Any, as_alice: Api
) -> None:
    sandbox = made(as_alice)["vm_id"]
    as_alice.post(f"/v1/sandboxes/{sandbox}/pause", {})
    rows = Sandbox.objects.filter(public_id=sandbox)
    rows.update(last_active_at=now() - seconds(4000))
    assert sandboxes_reap() == 0
    rows.update(expires_at=now() - seconds(1))
    assert sandboxes_reap() == 1
    wait_until(lambda: rows.get().state == SandboxState.DESTROYED, what="destroyed")
    assert rows.get().death_reason == "ttl"
    assert node.host.engine.inspect(sandbox, 1) is None
    refused = as_alice.post(f"/v1/sandboxes/{sandbox}/resume", {})
    assert (refused.status_code, refused.json()["code"]) == (409, "not_running")


def test_what_was_wished_and_lost_is_done_by_the_sweep(node: RunningNode, as_alice: Api) -> None:
    sandbox = made(as_alice)["vm_id"]
    rows = Sandbox.objects.filter(public_id=sandbox)
    rows.update(state=SandboxState.PAUSED)
    freezing_sweep(node.host)
    assert rows.get().frozen_at is not None
    is_soon(node, sandbox, "paused")
    rows.update(state=SandboxState.RUNNING)
    sandbox_freeze(node.host, rows.get().pk)
    assert rows.get().frozen_at is None
    is_soon(node, sandbox, "running")


def test_a_node_that_does_not_do_it_is_said(
    node: RunningNode, as_alice: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(sandbox_id: str, generation: int) -> None:
        raise EngineError("no")

    sandbox = made(as_alice)["vm_id"]
    monkeypatch.setattr(node.host.engine, "pause", refuse)
    monkeypatch.setattr("sandboxes.pausing.FREEZE_SECONDS", 0.2)
    answer = as_alice.post(f"/v1/sandboxes/{sandbox}/pause", {})
    assert (answer.status_code, answer.json()["code"]) == (503, "sandbox_not_ready")


def test_one_that_is_not_ready_is_not_paused(node_row: Any, as_alice: Api) -> None:
    answer = as_alice.post(f"/v1/sandboxes/{made(as_alice)['vm_id']}/pause", {})
    assert (answer.status_code, answer.json()["code"]) == (409, "not_running")


@pytest.mark.docker
def test_on_docker_a_paused_one_uses_no_cpu_and_can_be_destroyed(
    make_node: MakeNode, worker: Any, as_alice: Api
) -> None:
    node = make_node(pool=1, engine="docker")
    node.wait_parked(1)
    sandbox = made(as_alice)["vm_id"]
    url = f"/v1/sandboxes/{sandbox}"
    as_alice.post(f"{url}/jobs", {"command": "while :; do :; done"})
    assert as_alice.post(f"{url}/pause", {}).json()["state"] == "paused"
    state = node.host.engine.inspect(sandbox, 1)
    assert state is not None
    assert state.status == "paused"

    def used() -> str:
        shown = subprocess.run(
            ["docker", "stats", "--no-stream", "--format", "{{.CPUPerc}}", state.container_id],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        return shown.stdout.strip()

    assert used() == "0.00%"
    assert exec_in(as_alice, sandbox, "echo thawed")["stdout"] == "thawed\n"
    as_alice.post(f"{url}/pause", {})
    assert as_alice.delete(url).status_code == 200
    rows = Sandbox.objects.filter(public_id=sandbox)
    wait_until(lambda: rows.get().state == SandboxState.DESTROYED, what="destroyed")
    assert node.host.engine.inspect(sandbox, 1) is None

"""Rows and containers that do not agree, made to."""

from __future__ import annotations

import datetime as dt
import html
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from e2a.core.clock import now, seconds
from e2a.core.ids import new_id
from sandboxes.death import death_of
from sandboxes.diagnosis.nodes import node_findings
from sandboxes.engines.base import ContainerState, SandboxSpec
from sandboxes.models import DeathReason, Node, Sandbox, SandboxState
from sandboxes.node import NodeAgent
from sandboxes.reconcile import ReconcileMemory, reconcile
from tests.fixtures import Api
from tests.sandboxes.running import RunningNode, standard, wait_until
from tests.sandboxes.test_warm_and_cold import made

MakeNode = Callable[..., RunningNode]


def stray(node: RunningNode, *, starts: bool = True) -> str:
    """A container of this node that no row knows."""
    sandbox_id = new_id("sbx")
    host = node.host
    ref = host.engine.create(
        SandboxSpec(
            sandbox_id=sandbox_id,
            instance=host.instance,
            generation=1,
            image="process",
            memory_mib=64,
            cpu=0.5,
            disk_mib=64,
            pids=32,
            uid=10900,
            gid=10900,
            folder=host.sandboxes_folder / sandbox_id,
        )
    )
    if starts:
        host.engine.start(ref)
    return sandbox_id


def present(node: RunningNode) -> set[str]:
    return {state.sandbox_id for state in node.host.engine.list_labelled(node.host.instance)}


def kill_guest(sandbox_id: str) -> None:
    """As an operator's `docker kill`: signal 9 to the guest."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[0].endswith(b"python") and any(sandbox_id.encode() in word for word in words):
                os.kill(int(entry), signal.SIGKILL)


def test_one_whose_guest_was_killed_dies_with_its_reason(
    make_node: MakeNode, worker: Any, as_alice: Api
) -> None:
    node = make_node(pool=1)
    node.wait_parked(1)
    sandbox = made(as_alice)["vm_id"]
    kill_guest(sandbox)
    # The engine's event tells at once; a reconcile would within 30 s.
    rows = Sandbox.objects.filter(public_id=sandbox)
    wait_until(lambda: rows.get().state == SandboxState.DESTROYED, what="destroyed", seconds=60)
    death = as_alice.get(f"/v1/sandboxes/{sandbox}").json()["death"]
    assert (death["reason"], death["exit_code"]) == ("lost", 137)
    assert sandbox not in present(node)


def test_one_whose_container_is_gone_is_lost(make_node: MakeNode, as_alice: Api) -> None:
    node = make_node(pool=1)
    node.wait_parked(1)
    sandbox = made(as_alice)["vm_id"]
    node.stop()
    node.host.engine.destroy(sandbox, 1)
    report = reconcile(node.host, ReconcileMemory())
    assert report.dead == 1
    row = Sandbox.objects.get(public_id=sandbox)
    assert (row.state, row.death_reason) == ("stopping", "lost")


def test_a_container_without_a_row_goes_after_its_grace(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.stop()
    sandbox = stray(node)
    memory = ReconcileMemory()
    assert reconcile(node.host, memory).orphans_removed == 0
    assert present(node) == {sandbox}
    later = time.monotonic() + 26
    monkeypatch.setattr("sandboxes.reconcile.time.monotonic", lambda: later)
    assert reconcile(node.host, memory).orphans_removed == 1
    assert present(node) == set()
    assert not (node.host.sandboxes_folder / sandbox).exists()


def test_a_container_whose_row_is_over_goes_at_once(make_node: MakeNode, as_alice: Api) -> None:
    node = make_node(pool=1)
    parked = node.wait_parked(1)[0]
    node.stop()
    Sandbox.objects.filter(pk=parked.pk).update(state="destroyed")
    assert reconcile(node.host, ReconcileMemory()).orphans_removed == 1
    assert present(node) == set()


def test_an_older_generation_goes(make_node: MakeNode) -> None:
    node = make_node(pool=1)
    parked = node.wait_parked(1)[0]
    node.stop()
    Sandbox.objects.filter(pk=parked.pk).update(generation=2, state="creating", node=None, slot=None)
    assert reconcile(node.host, ReconcileMemory()).orphans_removed == 1


def test_an_empty_database_does_not_make_everything_an_orphan(node: RunningNode) -> None:
    node.stop()
    strays = {stray(node, starts=False) for _ in range(6)}
    memory = ReconcileMemory(first_seen={(sandbox, 1): time.monotonic() - 100 for sandbox in strays})
    report = reconcile(node.host, memory)
    assert (report.is_tripped, report.orphans_removed) == (True, 0)
    assert present(node) == strays
    assert reconcile(node.host, memory, is_forced=True).orphans_removed == 6
    assert present(node) == set()


def test_with_a_database_that_looks_empty_a_few_containers_are_left_alone_too(
    node: RunningNode, admin_client: Any
) -> None:
    node.stop()
    strays = {stray(node, starts=False) for _ in range(3)}
    memory = ReconcileMemory(first_seen={(sandbox, 1): time.monotonic() - 100 for sandbox in strays})
    assert not Sandbox.objects.exists()
    assert reconcile(node.host, memory).is_tripped
    assert present(node) == strays
    agent = NodeAgent(node.host, pool_sizes={})
    agent.memory = memory
    agent.heartbeat()
    notice = Node.objects.get().notice
    assert notice.startswith("3 of 3 containers have no row in this database: none was removed.")
    assert "sandboxes_reconcile --force" in notice
    assert notice in html.unescape(admin_client.get("/admin/sandboxes/node/").content.decode())
    assert [one.level for one in node_findings() if one.seen == notice] == ["fail"]
    assert reconcile(node.host, memory, is_forced=True).orphans_removed == 3
    agent.heartbeat()
    assert Node.objects.get().notice == ""


def test_containers_of_another_instance_are_left_alone(node: RunningNode) -> None:
    node.stop()
    other = ContainerState("sbx_" + "a" * 26, 1, "another", "x", "running", started_at=now() - seconds(999))
    assert other.sandbox_id not in present(node)


def test_a_folder_without_container_or_row_goes(node: RunningNode) -> None:
    node.stop()
    folder = node.host.sandboxes_folder / new_id("sbx")
    (folder / "disk").mkdir(parents=True)
    assert reconcile(node.host, ReconcileMemory()).leftovers_removed == 0
    old = time.time() - 120
    os.utime(folder, (old, old))
    assert reconcile(node.host, ReconcileMemory()).leftovers_removed == 1
    assert not folder.exists()


@pytest.mark.parametrize(
    ("exit_code", "oom", "is_over", "was_down", "reason"),
    [
        (137, True, False, False, DeathReason.OOM),
        (137, False, False, False, DeathReason.LOST),
        (None, False, False, False, DeathReason.LOST),
        (0, False, False, False, DeathReason.LOST),
        (1, False, False, False, DeathReason.AGENT_EXIT),
        (139, False, False, False, DeathReason.AGENT_EXIT),
        (124, False, False, False, DeathReason.TTL),
        (137, False, True, False, DeathReason.TTL),
        (137, False, False, True, DeathReason.HOST_RESTART),
        (137, True, False, True, DeathReason.OOM),
    ],
)
def test_the_evidence_tells_why(
    db: None, exit_code: int | None, oom: bool, is_over: bool, was_down: bool, reason: DeathReason
) -> None:
    moment = now()
    row = Sandbox(template=standard(), created_at=moment, expires_at=moment + seconds(-1 if is_over else 600))
    fact = ContainerState(
        row.public_id, 1, "test", "id", "exited", exit_code, oom, moment - seconds(5), moment - seconds(1)
    )
    assert death_of(row, fact, moment if was_down else None)[0] == reason


@pytest.mark.parametrize(
    ("ended_after_start", "reason"),
    [(-2, DeathReason.HOST_RESTART), (5, DeathReason.HOST_RESTART), (120, DeathReason.LOST)],
)
def test_an_engine_that_started_since_took_down_what_it_found(
    db: None, ended_after_start: int, reason: DeathReason
) -> None:
    engine_start = now() - seconds(200)
    row = Sandbox(template=standard(), created_at=engine_start - seconds(60))
    fact = ContainerState(
        row.public_id, 1, "test", "id", "exited", 137, False,
        engine_start - seconds(60), engine_start + seconds(ended_after_start),
    )  # fmt: skip
    assert death_of(row, fact, None, engine_started_at=engine_start)[0] == reason
    # One that is gone was removed by somebody: an engine that starts keeps what it had.
    assert death_of(row, None, None, engine_started_at=engine_start)[0] == DeathReason.LOST


def test_what_started_before_the_host_did_died_of_its_restart(db: None) -> None:
    row = Sandbox(template=standard(), created_at=now() - dt.timedelta(days=3650))
    assert death_of(row, None, None)[0] == DeathReason.HOST_RESTART

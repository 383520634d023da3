"""The node process is killed at each step of making and of removing; the next one goes on from the rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from django.conf import settings

from e2a.core.clock import now, seconds
from sandboxes import host as host_module
from sandboxes.engines.base import ContainerRef, SandboxSpec
from sandboxes.host import Host, host_of
from sandboxes.models import Node, Sandbox, SandboxState
from sandboxes.node import NodeAgent, images_ensure
from sandboxes.provision import sandbox_provision
from sandboxes.reaping import sandboxes_unstick
from sandboxes.removal import sandbox_remove
from tests.fixtures import Api
from tests.sandboxes.running import RunningNode, at_once, wait_until
from tests.sandboxes.test_warm_and_cold import made

MakeNode = Callable[..., RunningNode]


class Killed(BaseException):
    """Stands for kill -9: nothing of ours catches it, so nothing is cleaned up."""


class DyingEngine:
    """An engine whose process dies at `step`, once: before the call is made, or after it was."""

    def __init__(self, engine: Any, step: str) -> None:
        self._engine = engine
        self._step = step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def _dying(self, name: str, call: Callable[[], Any]) -> Any:
        if self._step == f"before {name}":
            raise Killed
        answer = call()
        if self._step == f"after {name}":
            raise Killed
        return answer

    def create(self, spec: SandboxSpec) -> ContainerRef:
        ref: ContainerRef = self._dying("create", lambda: self._engine.create(spec))
        return ref

    def start(self, ref: ContainerRef) -> None:
        self._dying("start", lambda: self._engine.start(ref))

    def destroy(self, sandbox_id: str, generation: int) -> None:
        self._dying("destroy", lambda: self._engine.destroy(sandbox_id, generation))


def next_process(node: RunningNode) -> None:
    """Start the node again, and let the dead one's leases run out."""
    Sandbox.objects.exclude(lease_until=None).update(lease_until=now() - seconds(1))
    node.restart(host_of(settings.E2A))


def dead_host(node: RunningNode, step: str) -> Host:
    """A process of this node that will not survive `step`."""
    node.stop()
    host = host_of(settings.E2A)
    host.engine = DyingEngine(host.engine, step)
    return host


@pytest.mark.parametrize("step", ["before create", "after create", "before start", "after start", "healthy"])
def test_killed_while_it_makes_one_the_next_goes_on(
    node: RunningNode, as_alice: Api, step: str, monkeypatch: pytest.MonkeyPatch, settings_of_node: Any
) -> None:
    sandbox = made(as_alice)["vm_id"]
    host = dead_host(node, step)
    row = Sandbox.objects.get(public_id=sandbox)
    with monkeypatch.context() as patch:
        if step == "healthy":
            patch.setattr("sandboxes.provision._wait_healthy", lambda *args: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            sandbox_provision(host, row.pk)
    row.refresh_from_db()
    assert row.state in (SandboxState.CONFIGURING, SandboxState.BOOTING)
    next_process(node)
    from tests.sandboxes.running import celery_worker

    with celery_worker():
        give_up_at = time.monotonic() + 90
        while Sandbox.objects.get(pk=row.pk).state != SandboxState.RUNNING:
            assert time.monotonic() < give_up_at, "not running after 90 s"
            # As beat does: the guest of a slow machine may not answer the first time.
            sandboxes_unstick()
            time.sleep(1)  # Between two sweeps; the wait itself has a limit.
    assert len(node.host.engine.list_labelled(node.host.instance)) == 1


@pytest.mark.parametrize("step", ["before destroy", "after destroy"])
def test_killed_while_it_removes_one_the_next_goes_on(make_node: MakeNode, as_alice: Api, step: str) -> None:
    node = make_node(pool=1)
    node.wait_parked(1)
    sandbox = made(as_alice)["vm_id"]
    node.pool_size = 0
    host = dead_host(node, step)
    as_alice.delete(f"/v1/sandboxes/{sandbox}")
    row = Sandbox.objects.get(public_id=sandbox)
    with pytest.raises(Killed):
        sandbox_remove(host, row.pk)
    next_process(node)
    wait_until(lambda: Sandbox.objects.get(pk=row.pk).state == SandboxState.DESTROYED, what="destroyed")
    assert node.host.engine.inspect(sandbox, 1) is None


def test_the_same_message_five_times_at_once_makes_one(node: RunningNode, as_alice: Api) -> None:
    sandbox = Sandbox.objects.get(public_id=made(as_alice)["vm_id"])
    hosts = [node.host, node.host, node.host, host_of(settings.E2A), host_of(settings.E2A)]
    answers = at_once(5, lambda number: sandbox_provision(hosts[number], sandbox.pk))
    assert answers == [None] * 5
    assert len(node.host.engine.list_labelled(node.host.instance)) == 1
    moves = [move.to_state for move in sandbox.moves.order_by("pk")]
    assert moves == ["creating", "configuring", "booting"]


def test_a_restarted_node_keeps_what_runs(make_node: MakeNode, as_alice: Api) -> None:
    node = make_node(pool=1)
    node.wait_parked(1)
    sandbox = made(as_alice)["vm_id"]
    parked = node.wait_parked(1)[0]
    before = {state.container_id for state in node.host.engine.list_labelled(node.host.instance)}
    node.restart(host_of(settings.E2A))
    from sandboxes.reconcile import ReconcileMemory, reconcile

    report = reconcile(node.host, ReconcileMemory())
    assert (report.dead, report.orphans_removed, report.leftovers_removed) == (0, 0, 0)
    assert {state.container_id for state in node.host.engine.list_labelled(node.host.instance)} == before
    assert Sandbox.objects.get(public_id=sandbox).state == SandboxState.RUNNING
    assert Sandbox.objects.get(pk=parked.pk).state == SandboxState.PARKED


def test_destroyed_while_it_is_made_leaves_nothing(
    node: RunningNode, as_alice: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = made(as_alice)["vm_id"]
    row = Sandbox.objects.get(public_id=sandbox)
    node.stop()
    create = node.host.engine.create

    def create_late(spec: SandboxSpec) -> ContainerRef:
        assert as_alice.delete(f"/v1/sandboxes/{sandbox}").status_code == 200
        return create(spec)

    monkeypatch.setattr(node.host.engine, "create", create_late)
    sandbox_provision(node.host, row.pk)
    assert Sandbox.objects.get(pk=row.pk).state == SandboxState.DESTROYED
    assert node.host.engine.inspect(sandbox, 1) is None
    assert node.host.engine.leftovers() == []


def test_a_cold_one_whose_message_was_lost_is_made_by_the_sweep(node: RunningNode, as_alice: Api) -> None:
    # No worker runs: nobody ever reads the message.
    sandbox = Sandbox.objects.get(public_id=made(as_alice)["vm_id"])
    wait_until(
        lambda: Sandbox.objects.get(pk=sandbox.pk).state == SandboxState.BOOTING, what="booting", seconds=30
    )


def test_a_full_node_makes_a_parked_one_give_way(make_node: MakeNode, as_alice: Api) -> None:
    node = make_node(pool=1, capacity=1)
    parked = node.wait_parked(1)[0]
    node.stop()
    # As if it were of another template, which a claim does not find.
    Sandbox.objects.filter(pk=parked.pk).update(state="parked")
    from sandboxes.node import sandbox_provision_or_give_way
    from sandboxes.services import _cold_row
    from tests.sandboxes.running import standard

    row = _cold_row(standard(), {"tenant": None, "expires_at": now() + seconds(60)})
    sandbox_provision_or_give_way(node.host, row.pk)
    assert Sandbox.objects.get(pk=parked.pk).death_reason == "pool"
    row.refresh_from_db()
    assert (row.slot, row.state) == (0, SandboxState.PARKED)


def test_a_node_says_that_its_engine_is_down_and_that_it_is_back(
    make_node: MakeNode, as_alice: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sandboxes.engines.base import EngineStatus

    node = make_node()
    node.stop()
    check = node.host.engine.check
    agent = NodeAgent(node.host, pool_sizes={})
    monkeypatch.setattr(node.host.engine, "check", lambda: EngineStatus("", False, "Docker does not answer"))
    agent.heartbeat()
    refused = as_alice.post("/v1/sandboxes", {})
    assert (refused.status_code, refused.json()["code"]) == (503, "no_node")
    assert Node.objects.get().detail == "Docker does not answer"
    monkeypatch.setattr(node.host.engine, "check", check)
    agent.heartbeat()
    assert as_alice.post("/v1/sandboxes", {}).status_code == 201


def test_settings_of_another_process_are_not_this_hosts(node: RunningNode) -> None:
    assert host_module.this_host() is node.host
    assert images_ensure(node.host)
    assert host_of(settings.E2A).holder != node.host.holder

"""The warm pool: how it is kept, what a create finds in it, and what is said about that."""

from __future__ import annotations

import datetime as dt
import io
import json
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
from django.conf import settings
from django.core.management import call_command

from e2a.core.clock import now, seconds
from e2a.settings.environment import _pool_rate, _Problems
from sandboxes.claims import POOL_FAILING, miss_reason
from sandboxes.host import host_of, making_at_once
from sandboxes.models import Node, PoolMiss, Sandbox, SandboxState, Template
from sandboxes.pool import Pool, Rate
from sandboxes.pool_figures import pool_figures_of
from sandboxes.provision import PARKED_SECONDS
from tests.fixtures import Api
from tests.sandboxes.running import RunningNode, standard, wait_until
from tests.sandboxes.test_warm_and_cold import made

MakeNode = Callable[..., RunningNode]


@pytest.fixture
def row_pool(node_row: Node, settings_of_node: Callable[..., None]) -> Callable[..., Pool]:
    """A pool on a node that is nothing but a row; what it begins stays a row."""
    settings_of_node(node_name=node_row.name)

    def make(size: int, **rates: float) -> Pool:
        return Pool({"standard": size}, rates=rates)

    return make


def begun(pool: Pool) -> int:
    """How many it begins in one pass."""
    started: list[int] = []
    pool.keep(host_of(settings.E2A), started.append)
    return len(started)


def test_a_pool_is_refilled_no_faster_than_its_rate(
    row_pool: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("sandboxes.pool.time.monotonic", lambda: clock[0])
    pool = row_pool(50, standard=0.5)
    began = 0
    for _ in range(40):  # A pass a second, each finding that what it began is parked.
        began += begun(pool)
        Sandbox.objects.filter(state=SandboxState.CREATING).update(state=SandboxState.PARKED)
        clock[0] += 1
    assert 19 <= began <= 21


def test_a_quiet_hour_saves_up_no_storm(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("sandboxes.pool.time.monotonic", lambda: clock[0])
    rate = Rate(0.5)
    clock[0] += 3600
    assert rate.available() == 2


def test_the_pool_makes_none_while_tenants_wait(row_pool: Callable[..., Pool], as_alice: Api) -> None:
    pool = row_pool(4, standard=50)
    assert made(as_alice)["state"] == "creating"
    assert begun(pool) == 0
    Sandbox.objects.filter(tenant__isnull=False).update(state=SandboxState.RUNNING)
    assert begun(pool) > 0


def test_rates_are_read_by_template_and_nonsense_is_refused() -> None:
    problems = _Problems()
    assert _pool_rate("standard=0.5, browser=4,1", problems) == {"*": 1.0, "standard": 0.5, "browser": 4.0}
    assert problems.found == []
    for wrong in ("standard=", "standard=0", "standard=-1", "nan", "standard=fast", "1e9"):
        problems = _Problems()
        _pool_rate(wrong, problems)
        assert [check for check, _ in problems.found] == ["e2a.E003"], wrong
        assert "E2A_POOL_RATE" in problems.found[0][1]


def test_cold_ones_are_made_four_at_a_time_for_each_cpu() -> None:
    assert [making_at_once(cpus) for cpus in (1, 2, 4, 64)] == [4, 8, 16, 32]


def test_a_hit_and_each_kind_of_miss_is_written_down(
    node_row: Node, parked_row: Callable[[], Sandbox], alice: Any
) -> None:
    template = standard()
    assert miss_reason(template) == PoolMiss.NO_POOL
    Node.objects.update(pool={"standard": 2})
    assert miss_reason(template) == PoolMiss.EMPTY
    Node.objects.update(pool={"standard": 2, POOL_FAILING: 3})
    assert miss_reason(template) == PoolMiss.FAILING
    Node.objects.update(pool={"standard": 2}, capacity=1)
    Sandbox.objects.create(
        template=template, node=node_row, slot=0, tenant=alice.tenant, state="running", created_at=now()
    )
    assert miss_reason(template) == PoolMiss.NODE_FULL
    parked = parked_row()
    Sandbox.objects.filter(pk=parked.pk).update(image_id="e2a/standard:yesterday")
    assert miss_reason(template) == PoolMiss.OLD_IMAGE
    Sandbox.objects.filter(pk=parked.pk).update(image_id=template.image_id)
    Node.objects.update(is_engine_up=False)
    assert miss_reason(template) == PoolMiss.NODE_DOWN


def test_a_create_says_why_it_came_cold(
    node_row: Node, parked_row: Callable[[], Sandbox], as_alice: Api
) -> None:
    Sandbox.objects.filter(pk=parked_row().pk).update(image_id="e2a/standard:yesterday")
    sandbox = made(as_alice)
    assert sandbox["state"] == "creating", "one of an older image is not handed out"
    row = Sandbox.objects.get(public_id=sandbox["vm_id"])
    assert (row.is_warm, row.pool_miss) == (False, "old_image")


def test_hits_and_misses_are_counted_and_shown_to_operators(
    make_node: MakeNode, as_alice: Api, admin_client: Any
) -> None:
    node = make_node(pool=1)
    node.wait_parked(1)
    wait_until(lambda: Node.objects.get().pool == {"standard": 1}, what="the node says its pool")
    node.stop()
    assert made(as_alice)["state"] == "running"
    assert made(as_alice)["state"] == "creating"
    figures = pool_figures_of("standard")
    assert (figures.hits, figures.misses, figures.wanted, figures.parked) == (1, {"empty": 1}, 1, 0)
    assert figures.hit_rate == 0.5
    old = now() - dt.timedelta(hours=30)
    Sandbox.objects.filter(is_warm=True).update(claimed_at=old)
    assert pool_figures_of("standard").hits == 0
    out = io.StringIO()
    call_command("sandboxes_pool", "--json", "--hours", "48", stdout=out)
    shown = {one["template"]: one for one in json.loads(out.getvalue())}
    assert (shown["standard"]["hits"], shown["standard"]["misses"]) == (1, {"empty": 1})
    out = io.StringIO()
    call_command("sandboxes_pool", stdout=out)
    assert (
        "standard: 0 of 1 parked, 0 coming; 0 warm, 1 cold (0% warm): 1 × all parked ones are taken"
        in out.getvalue()
    )
    page = admin_client.get(f"/admin/sandboxes/template/{standard().pk}/change/").content.decode()
    assert "0 of 1 parked" in page
    assert "1 × all parked ones are taken" in page


def test_one_whose_guest_is_silent_is_a_miss_with_its_reason(
    make_node: MakeNode, worker: Any, as_alice: Api
) -> None:
    node = make_node(pool=1)
    dead = node.wait_parked(1)[0]
    node.agent.stop(wait_seconds=10)  # type: ignore[union-attr]  # it has started
    (node.host.sandboxes_folder / dead.public_id / "guest" / "guest.sock").unlink()
    row = Sandbox.objects.get(public_id=made(as_alice)["vm_id"])
    assert (row.is_warm, row.pool_miss) == (False, "not_configured")


def test_parked_ones_age_out_and_are_never_parked_again(make_node: MakeNode) -> None:
    node = make_node(pool=1)
    first = node.wait_parked(1)[0]
    Sandbox.objects.filter(pk=first.pk).update(created_at=now() - seconds(PARKED_SECONDS + 1))
    wait_until(
        lambda: Sandbox.objects.filter(state=SandboxState.PARKED).exclude(pk=first.pk).exists(),
        what="another is parked",
    )
    wait_until(
        lambda: Sandbox.objects.get(pk=first.pk).state in ("stopping", "destroyed"), what="the first ended"
    )
    first.refresh_from_db()
    assert first.death_reason == "pool"
    assert [move.to_state for move in first.moves.order_by("pk")].count("parked") == 1


def test_parked_ones_of_another_image_are_replaced(make_node: MakeNode) -> None:
    node = make_node(pool=1)
    first = node.wait_parked(1)[0]
    Sandbox.objects.filter(pk=first.pk).update(image_id="process:yesterday")
    wait_until(
        lambda: Sandbox.objects.filter(state=SandboxState.PARKED, image_id="process").exists(),
        what="a new one",
    )
    first.refresh_from_db()
    assert first.death_reason == "pool"


def test_a_disabled_template_keeps_no_pool(make_node: MakeNode) -> None:
    node = make_node(pool=1)
    first = node.wait_parked(1)[0]
    Template.objects.update(is_enabled=False)
    wait_until(lambda: Sandbox.objects.get(pk=first.pk).death_reason == "pool", what="it is ended")


def test_those_that_wait_are_made_in_the_order_of_arrival(node: RunningNode, as_alice: Api) -> None:
    from sandboxes.arrivals import provision_waiting

    node.stop()
    asked = [made(as_alice)["vm_id"] for _ in range(4)]
    positions = [as_alice.get(f"/v1/sandboxes/{one}").json()["queue_position"] for one in asked]
    assert positions == [1, 2, 3, 4]
    order: list[str] = []

    def make(host: object, pk: int) -> None:
        order.append(Sandbox.objects.get(pk=pk).public_id)
        Sandbox.objects.filter(pk=pk).update(state=SandboxState.CONFIGURING)

    assert provision_waiting(node.host, make) == 4
    assert order == asked
    assert as_alice.get(f"/v1/sandboxes/{asked[0]}").json()["queue_position"] is None


def test_a_host_makes_no_more_at_once_than_it_may(node: RunningNode, as_alice: Api) -> None:
    from sandboxes.arrivals import provision_waiting

    node.stop()
    made(as_alice)
    held = 0
    while node.host.making.acquire(blocking=False):
        held += 1
    assert held == making_at_once(os.cpu_count() or 1)
    started = time.monotonic()
    assert provision_waiting(node.host, lambda host, pk: None) == 0
    assert time.monotonic() - started < 5, "a nudge never waits"
    for _ in range(held):
        node.host.making.release()


def test_nobody_learns_how_many_others_wait(node_row: Node, as_alice: Api, as_mallory: Api) -> None:
    for _ in range(3):
        made(as_mallory)
    mine = made(as_alice)["vm_id"]
    assert as_alice.get(f"/v1/sandboxes/{mine}").json()["queue_position"] == 1

"""Thirty creates at once on real Docker, and a node process that is killed in the middle of making them."""

from __future__ import annotations

import datetime as dt
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from sandboxes.host import making_at_once
from tests.live import LiveStack, wait_for
from tests.sandboxes.leftovers import left_over

pytestmark = [pytest.mark.docker, pytest.mark.timeout(600)]

MANY = 30
SECONDS = 110.0
"""The product's own limit for getting ready; past it a sandbox ends by itself."""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStack]:
    with LiveStack(tmp_path_factory.mktemp("burst"), environment={"E2A_POOL": "standard=0"}) as running:
        yield running


@pytest.fixture(scope="module")
def key(stack: LiveStack) -> str:
    made = stack.api_key()
    with sqlite3.connect(stack.data_dir / "db.sqlite3", timeout=30) as database:
        database.execute("UPDATE accounts_tenant SET max_live_sandboxes = 60")
    return made


def rows_of(stack: LiveStack) -> list[tuple[Any, ...]]:
    """(public id, state, created_at, ready_at) in the order of arrival, read from outside."""
    database = sqlite3.connect(f"file:{stack.data_dir / 'db.sqlite3'}?mode=ro", uri=True, timeout=30)
    try:
        return database.execute(
            "SELECT public_id, state, created_at, ready_at FROM sandboxes_sandbox"
            " WHERE state != 'destroyed' ORDER BY id"
        ).fetchall()
    finally:
        database.close()


def create_at_once(stack: LiveStack, key: str, count: int) -> list[dict[str, Any]]:
    """So many POSTs from a barrier; every one must be taken."""
    barrier = threading.Barrier(count)
    answers: list[Any] = []

    def post() -> None:
        barrier.wait(60)
        answers.append(stack.request("POST", "/v1/sandboxes", {}, token=key))

    threads = [threading.Thread(target=post) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [answer.status for answer in answers] == [201] * count
    return [answer.json() for answer in answers]


def destroy_all(stack: LiveStack, key: str) -> None:
    """Destroy every sandbox, and see that nothing of them stays."""
    for row in rows_of(stack):
        assert stack.request("DELETE", f"/v1/sandboxes/{row[0]}", token=key).status == 200
    instance = (stack.data_dir / "instance").read_text().strip()
    wait_for(lambda: not rows_of(stack), what="all destroyed", seconds=SECONDS, every=0.3)
    assert left_over(instance, stack.data_dir / "sandboxes") == []


def settled(rows: list[tuple[Any, ...]]) -> bool:
    return all(row[1] in ("running", "stopping", "destroyed") for row in rows)


def test_thirty_creates_at_once_are_served_in_the_order_of_arrival(stack: LiveStack, key: str) -> None:
    started = time.monotonic()
    made = create_at_once(stack, key, MANY)
    assert {one["state"] for one in made} == {"creating"}
    seen: set[str] = set()
    positions: dict[str, list[int]] = {}

    def look() -> bool:
        for one in (made[0], made[MANY // 2], made[-1]):
            shown = stack.request("GET", f"/v1/sandboxes/{one['vm_id']}", token=key).json()
            seen.add(shown["state"])
            if shown["queue_position"] is not None:
                positions.setdefault(one["vm_id"], []).append(shown["queue_position"])
        return settled(rows_of(stack))

    wait_for(look, what="all thirty ready", seconds=SECONDS, every=0.1)
    took = time.monotonic() - started
    rows = rows_of(stack)
    assert [row[1] for row in rows] == ["running"] * MANY
    assert {row[0] for row in rows} == {one["vm_id"] for one in made}, "nothing lost, nothing made twice"
    ready = [dt.datetime.fromisoformat(row[3]) for row in rows]
    order = sorted(range(MANY), key=lambda index: ready[index])
    # Those that are made at the same time, and the configuration of as many, may overtake each other.
    window = 2 * making_at_once(os.cpu_count() or 1)
    late = [(index, place) for place, index in enumerate(order) if abs(place - index) > window]
    assert not late, f"(arrival, ready) out of order by more than {window}: {late}"
    assert {"creating", "running"} <= seen
    for places in positions.values():
        assert places == sorted(places, reverse=True), "who waits only moves up"
    print(f"{MANY} cold creates at once were all running after {took:.1f} s")
    destroy_all(stack, key)


def test_a_node_killed_in_the_middle_of_a_burst_loses_nothing(stack: LiveStack, key: str) -> None:
    made = create_at_once(stack, key, 12)
    wait_for(
        lambda: sum(row[1] != "creating" for row in rows_of(stack)) >= 3,
        what="some are being made",
        every=0.01,
    )
    assert not settled(rows_of(stack)), "the burst is not over yet"
    stack.kill("node")
    wait_for(lambda: settled(rows_of(stack)), what="all settled", seconds=SECONDS + 20, every=0.3)
    rows = rows_of(stack)
    assert {row[0]: row[1] for row in rows} == {one["vm_id"]: "running" for one in made}
    for one in made[:3]:
        done = stack.request(
            "POST", f"/v1/sandboxes/{one['vm_id']}/exec", {"command": "echo fine"}, token=key
        )
        assert done.json()["stdout"] == "fine\n"
    destroy_all(stack, key)

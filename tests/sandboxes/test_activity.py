"""What keeps a sandbox alive, who decides at the last moment, and what a thousand idle ones cost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from e2a.core.clock import now, seconds
from e2a.core.errors import Conflict
from e2a.core.redis_client import redis_client
from sandboxes import activity
from sandboxes.activity import viewer_attached, viewer_left, work_goes_on, work_over
from sandboxes.guest_client import GuestClient, GuestStats
from sandboxes.models import Node, Sandbox, SandboxState, Template
from sandboxes.pausing import sandbox_pause
from sandboxes.reaping import sandboxes_reap
from sandboxes.services import sandbox_extend
from tests.fixtures import Api
from tests.sandboxes.running import RunningNode, at_once, wait_until
from tests.sandboxes.test_reaping import age, quiet_guest, rows
from tests.sandboxes.test_warm_and_cold import exec_in, made


@pytest.fixture
def sandbox(make_node: Callable[..., RunningNode], as_alice: Api) -> Sandbox:
    make_node(pool=1).wait_parked(1)
    row = Sandbox.objects.get(public_id=made(as_alice, idle_timeout_seconds=10)["vm_id"])
    redis_client().delete(f"e2a:alive:{row.pk}")  # Another test's row may have had this number.
    return row


def why(as_alice: Api, sandbox: Sandbox) -> str | None:
    word: str | None = as_alice.get(f"/v1/sandboxes/{sandbox.public_id}").json()["alive_because"]
    return word


def test_a_viewer_keeps_it_and_its_going_starts_the_clock(
    sandbox: Sandbox, as_alice: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_guest(monkeypatch, 600)
    viewer_attached(sandbox.pk, "terminal", "one")
    age(sandbox, 60)
    shown = as_alice.get(f"/v1/sandboxes/{sandbox.public_id}").json()
    assert (shown["alive_because"], shown["alive_detail"]) == (
        "viewer_attached",
        "Somebody looks at it (terminal).",
    )
    assert shown["alive_since"] is not None
    assert shown["ends_at"] == shown["expires_at"]
    assert sandboxes_reap() == 0
    age(sandbox, 60)
    viewer_left(sandbox.pk, "terminal", "one")
    assert sandboxes_reap() == 0
    assert why(as_alice, sandbox) == "recently_used"
    age(sandbox, 60)
    assert sandboxes_reap() == 1


def test_a_viewer_whose_process_was_killed_lapses(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet_guest(monkeypatch, 600)
    monkeypatch.setattr(activity, "VIEWER_SECONDS", 0.2)
    viewer_attached(sandbox.pk, "preview")
    age(sandbox, 60)
    wait_until(lambda: sandboxes_reap() == 1, what="reaped")


def test_a_task_and_a_model_call_are_told_and_keep_it_from_being_paused(
    sandbox: Sandbox, as_alice: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_guest(monkeypatch, 600)
    work_goes_on(sandbox.pk, "task_running", "t.1")
    assert why(as_alice, sandbox) == "task_running"
    work_goes_on(sandbox.pk, "model_call", "t.1")
    assert why(as_alice, sandbox) == "model_call"
    age(sandbox, 60)
    assert sandboxes_reap() == 0
    with pytest.raises(Conflict) as refused:
        sandbox_pause(sandbox=sandbox)
    assert refused.value.code == "task_running"
    work_over(sandbox.pk, "model_call", "t.1")
    work_over(sandbox.pk, "task_running", "t.1")
    age(sandbox, 60)
    assert sandboxes_reap() == 1
    assert why(as_alice, sandbox) is None


def test_a_job_keeps_it_for_as_long_as_it_runs(sandbox: Sandbox, as_alice: Api, worker: Any) -> None:
    url = f"/v1/sandboxes/{sandbox.public_id}"
    job = as_alice.post(f"{url}/jobs", {"command": "sleep 600"}).json()["job_id"]
    assert why(as_alice, sandbox) == "process_running"
    age(sandbox, 60)
    assert sandboxes_reap() == 0
    as_alice.post(f"{url}/jobs/{job}/signal", {"signal": "KILL"})
    wait_until(lambda: why(as_alice, sandbox) != "process_running", what="it ended")


def test_a_shell_at_its_prompt_does_not_keep_it_and_what_runs_in_it_does(
    sandbox: Sandbox, as_alice: Api
) -> None:
    from sandboxes.configuration import guest_client
    from sandboxes.guest_client import ProcessSpec, PtySize

    client = guest_client(sandbox)
    client.process_start(ProcessSpec(id="tty", argv=("/bin/bash", "-i"), pty=PtySize(80, 24)))
    wait_until(lambda: client.stats().resting_terminals == 1, what="the prompt")
    assert why(as_alice, sandbox) != "process_running"
    client.process_stdin("tty", b"sleep 600\n")
    wait_until(lambda: client.stats().resting_terminals == 0, what="the command")
    assert why(as_alice, sandbox) == "process_running"


def test_an_extend_at_the_last_moment_wins_or_is_refused(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_guest(monkeypatch, 600)
    for _ in range(10):
        rows(sandbox).update(state=SandboxState.RUNNING, death_reason="", death_detail="")
        age(sandbox, 60)
        row = rows(sandbox).select_related("node").get()

        def act(number: int, row: Sandbox = row) -> Any:
            return sandboxes_reap() if number == 0 else sandbox_extend(sandbox=row, seconds_more=600)

        reaped, kept = at_once(2, act)
        state = rows(sandbox).get().state
        if reaped == 1:
            # The answer of an extend may have been first by a moment only if the reaper read the clock after it.
            assert state == SandboxState.STOPPING
            assert isinstance(kept, Conflict)
            assert kept.code == "not_running"
        else:
            assert (reaped, state) == (0, SandboxState.RUNNING)
            assert isinstance(kept, Sandbox)


def test_a_thousand_idle_ones_cost_a_bounded_pass_and_a_slow_one_holds_up_none(
    node_row: Node, alice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = Template.objects.get(name="standard")
    old = now() - seconds(600)
    Sandbox.objects.bulk_create(
        Sandbox(
            template=template, tenant=alice.tenant, node=node_row, slot=number, state=SandboxState.RUNNING,
            created_at=old, claimed_at=old, last_active_at=old, idle_timeout_seconds=60,
            expires_at=now() + seconds(3600),
        )
        for number in range(1000)
    )  # fmt: skip
    lock, hanging, released = threading.Lock(), threading.Event(), threading.Event()
    now_asked, most, calls = 0, 0, 0

    def stats(self: GuestClient) -> GuestStats:
        nonlocal now_asked, most, calls
        with lock:
            now_asked, calls = now_asked + 1, calls + 1
            most = max(most, now_asked)
            is_first = not hanging.is_set()
            hanging.set()
        if is_first:
            released.wait(60)
        with lock:
            now_asked -= 1
        return GuestStats(None, None, None, None, 1, 0.0, 0, 0)

    monkeypatch.setattr(GuestClient, "stats", stats)
    monkeypatch.setattr(activity, "PASS_SECONDS", 3.0)
    with CaptureQueriesContext(connection) as queries:
        assert sandboxes_reap() == 0
    released.set()
    assert calls == 200
    assert 1 < most <= activity.ASKED_AT_ONCE
    # Two for the rows, and one for each of those that answered: all but the one that hangs.
    assert len(queries) == 2 + 199
    assert Sandbox.objects.filter(last_active_at__gt=old).count() == 199


def test_one_that_others_thawed_is_frozen_again_and_the_other_way_round(
    make_node: Callable[..., RunningNode], worker: Any, as_alice: Api
) -> None:
    node = make_node(pool=1)
    node.wait_parked(1)
    sandbox = made(as_alice)["vm_id"]
    mine = Sandbox.objects.filter(public_id=sandbox)
    agent = node.agent
    assert agent is not None

    def is_now(status: str) -> bool:
        state = node.host.engine.inspect(sandbox, 1)
        return state is not None and state.status == status

    def pass_over() -> None:
        from sandboxes.reconcile import reconcile

        reconcile(node.host, agent.memory)
        agent.sweep()

    as_alice.post(f"/v1/sandboxes/{sandbox}/pause", {})
    node.host.engine.resume(sandbox, 1)
    wait_until(lambda: is_now("running"), what="thawed by hand")
    pass_over()
    wait_until(lambda: is_now("paused"), what="frozen again")
    assert mine.get().state == "paused"
    as_alice.post(f"/v1/sandboxes/{sandbox}/resume", {})
    node.host.engine.pause(sandbox, 1)
    wait_until(lambda: is_now("paused"), what="frozen by hand")
    pass_over()
    wait_until(lambda: is_now("running"), what="thawed again")
    assert exec_in(as_alice, sandbox, "echo on")["stdout"] == "on\n"

"""What ends sandboxes in time, and what mends half-done ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from e2a.core.clock import now, seconds
from sandboxes.models import Node, Sandbox, SandboxState
from sandboxes.reaping import sandboxes_purge, sandboxes_reap, sandboxes_unstick
from tests.fixtures import Api
from tests.sandboxes.running import RunningNode, at_once
from tests.sandboxes.test_warm_and_cold import exec_in, made


@pytest.fixture
def sandbox(make_node: Callable[..., RunningNode], as_alice: Api) -> Sandbox:
    make_node(pool=1).wait_parked(1)
    return Sandbox.objects.get(public_id=made(as_alice, idle_timeout_seconds=10)["vm_id"])


def rows(sandbox: Sandbox) -> Any:
    return Sandbox.objects.filter(pk=sandbox.pk)


def age(sandbox: Sandbox, idle_seconds: float) -> None:
    rows(sandbox).update(last_active_at=now() - seconds(idle_seconds))


def quiet_guest(monkeypatch: pytest.MonkeyPatch, quiet_seconds: float, running: int = 0) -> None:
    """As if the guest had been at rest for so long."""
    from sandboxes.guest_client import GuestClient, GuestStats

    stats = GuestStats(None, None, None, None, running, quiet_seconds, 0, 0, quiet_seconds)
    monkeypatch.setattr(GuestClient, "stats", lambda self: stats)


def test_one_that_has_lived_its_time_is_ended(sandbox: Sandbox) -> None:
    assert sandboxes_reap() == 0
    rows(sandbox).update(expires_at=now() - seconds(1))
    assert sandboxes_reap() == 1
    sandbox.refresh_from_db()
    assert (sandbox.state, sandbox.death_reason) == ("stopping", "ttl")


def test_a_sessions_sandbox_outlives_its_end_by_a_grace(sandbox: Sandbox) -> None:
    rows(sandbox).update(owner="ses_x", expires_at=now() - seconds(5))
    assert sandboxes_reap() == 0


def test_an_idle_one_is_ended_and_one_in_use_is_not(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    age(sandbox, 5)
    quiet_guest(monkeypatch, 600)
    assert sandboxes_reap() == 0
    age(sandbox, 11)
    assert sandboxes_reap() == 1
    sandbox.refresh_from_db()
    assert sandbox.death_reason == "idle"


def test_a_running_process_keeps_it(sandbox: Sandbox, as_alice: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    age(sandbox, 60)
    quiet_guest(monkeypatch, 600, running=1)
    assert sandboxes_reap() == 0
    shown = as_alice.get(f"/v1/sandboxes/{sandbox.public_id}").json()
    assert shown["alive_because"] == "process_running"


def test_what_the_real_guest_did_lately_keeps_it(sandbox: Sandbox, as_alice: Api) -> None:
    exec_in(as_alice, sandbox.public_id, "true")
    age(sandbox, 60)
    assert sandboxes_reap() == 0


def test_extended_it_is_kept_but_not_beyond_its_life(
    sandbox: Sandbox, as_alice: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = as_alice.post(f"/v1/sandboxes/{sandbox.public_id}/extend", {"seconds": 600})
    assert (answer.status_code, answer.json()["alive_because"]) == (200, "extended")
    quiet_guest(monkeypatch, 600)
    assert sandboxes_reap() == 0
    rows(sandbox).update(expires_at=now() - seconds(1))
    assert sandboxes_reap() == 1
    refused = as_alice.post(f"/v1/sandboxes/{sandbox.public_id}/extend", {"seconds": 600})
    assert (refused.status_code, refused.json()["code"]) == (409, "not_running")


def test_two_reapers_end_it_once(sandbox: Sandbox) -> None:
    rows(sandbox).update(expires_at=now() - seconds(1))
    assert sum(count for count in at_once(4, lambda _: sandboxes_reap()) if isinstance(count, int)) == 1


def test_one_that_never_gets_ready_fails_in_time(node_row: Node, as_alice: Api) -> None:
    sandbox = Sandbox.objects.get(public_id=made(as_alice)["vm_id"])
    sandboxes_unstick()
    assert rows(sandbox).get().state == SandboxState.CREATING
    rows(sandbox).update(claimed_at=now() - seconds(111))
    sandboxes_unstick()
    shown = as_alice.get(f"/v1/sandboxes/{sandbox.public_id}").json()
    assert (shown["state"], shown["death"]["reason"]) == ("destroyed", "lost")
    assert shown["death"]["detail"] == "It was not ready after 110 s."


def test_half_made_ones_of_a_dead_node_go_to_another(node_row: Node, as_alice: Api) -> None:
    sandbox = Sandbox.objects.get(public_id=made(as_alice)["vm_id"])
    rows(sandbox).update(node=node_row, slot=3, state="configuring", lease_holder="gone", lease_until=now())
    Node.objects.update(heartbeat_at=now() - seconds(31))
    sandboxes_unstick()
    row = rows(sandbox).get()
    assert (row.state, row.node, row.slot, row.generation) == ("creating", None, None, 2)


def test_a_claimed_one_that_nobody_configured_is_configured(sandbox: Sandbox, worker: Any) -> None:
    from tests.sandboxes.running import wait_until

    rows(sandbox).update(state="booting", lease_until=now() - seconds(1), configured_with="")
    sandboxes_unstick()
    wait_until(lambda: rows(sandbox).get().state == "running", what="running")
    assert rows(sandbox).get().configured_with != ""


def test_ended_ones_are_kept_for_thirty_days(node_row: Node, as_alice: Api) -> None:
    sandbox = Sandbox.objects.get(public_id=made(as_alice)["vm_id"])
    as_alice.delete(f"/v1/sandboxes/{sandbox.public_id}")
    rows(sandbox).update(destroyed_at=now() - seconds(29 * 86400))
    assert sandboxes_purge() == 0
    rows(sandbox).update(destroyed_at=now() - seconds(31 * 86400))
    assert sandboxes_purge() == 1
    assert as_alice.get(f"/v1/sandboxes/{sandbox.public_id}").status_code == 404

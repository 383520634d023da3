"""Persistent workspaces: restored on start, saved on end, one writer, never a half one over a good one."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings

from accounts.models import Tenant, User
from accounts.services import tenant_erase, tenant_suspend
from e2a.core.clock import now, seconds
from sandboxes import workspaces
from sandboxes.models import Sandbox, SandboxState
from sandboxes.reaping import sandboxes_reap
from sandboxes.snapshot_models import Snapshot, SnapshotState, Workspace
from sandboxes.storage import StorageError, storage
from sessions_app.tasks import tenants_erase
from tests.fixtures import Api
from tests.sandboxes.running import RunningNode, at_once, wait_until
from tests.sandboxes.test_warm_and_cold import exec_in, made


@pytest.fixture(autouse=True)
def store(settings_of_node: Callable[..., None], tmp_path: Path) -> Path:
    place = dataclasses.replace(settings.E2A.storage, folder=str(tmp_path / "store"))
    settings_of_node(storage=place)
    return tmp_path / "store"


@pytest.fixture
def running(make_node: Callable[..., RunningNode], worker: object) -> RunningNode:
    return make_node(pool=1)


def started(as_user: Api, **body: Any) -> str:
    sandbox = str(made(as_user, **body)["vm_id"])
    wait_until(lambda: Sandbox.objects.get(public_id=sandbox).ready_at, what="running")
    return sandbox


def gone(sandbox: str) -> Sandbox:
    """Once its container is removed."""
    rows = Sandbox.objects.filter(public_id=sandbox, state=SandboxState.DESTROYED)
    return wait_until(rows.first, what=f"{sandbox} is gone")  # type: ignore[no-any-return]


def destroyed(as_user: Api, sandbox: str) -> Sandbox:
    assert as_user.delete(f"/v1/sandboxes/{sandbox}").status_code == 200
    return gone(sandbox)


def test_files_go_from_one_sandbox_to_the_next(as_alice: Api, as_mallory: Api, running: RunningNode) -> None:
    first = started(as_alice, workspace="work")
    exec_in(as_alice, first, "echo one > x; mkdir -p d/e")
    destroyed(as_alice, first)
    shown = as_alice.get("/v1/workspaces").json()["workspaces"]
    assert [(row["name"], row["versions"], row["user_id"], row["sandbox_id"]) for row in shown] == [
        ("work", 1, None, None)
    ]
    second = started(as_alice, workspace="work")
    assert as_alice.get(f"/v1/sandboxes/{second}").json()["workspace"] == "work"
    assert as_alice.get("/v1/workspaces/work").json()["sandbox_id"] == second
    assert exec_in(as_alice, second, "cat x; echo two > x; ls d")["stdout"] == "one\ne\n"
    destroyed(as_alice, second)
    third = started(as_alice, workspace="work")
    assert exec_in(as_alice, third, "cat x")["stdout"] == "two\n"
    other = started(as_alice, workspace="other")
    assert exec_in(as_alice, other, "ls")["stdout"] == ""
    foreign = started(as_mallory, workspace="work")
    assert exec_in(as_mallory, foreign, "ls")["stdout"] == ""
    assert as_alice.get("/v1/snapshots").json()["snapshots"] == []


def test_only_the_last_three_versions_are_kept(as_alice: Api, running: RunningNode, store: Path) -> None:
    for number in range(5):
        sandbox = started(as_alice, workspace="work")
        exec_in(as_alice, sandbox, f"echo {number} > x")
        destroyed(as_alice, sandbox)
    wait_until(lambda: len(list(store.glob("*/*"))) == 3, what="three objects")
    assert as_alice.get("/v1/workspaces/work").json()["versions"] == 3
    assert Workspace.objects.get().current == Snapshot.objects.order_by("-pk").first()


def test_one_living_sandbox_has_it(as_alice: Api, running: RunningNode) -> None:
    answers = at_once(6, lambda n: as_alice.post("/v1/sandboxes", {"workspace": "work"}))
    told = sorted((a.status_code, a.json().get("code", "")) for a in answers)  # type: ignore[union-attr]
    assert told == [(201, "")] + [(409, "workspace_in_use")] * 5
    sandbox = Sandbox.objects.get(workspace__isnull=False).public_id
    wait_until(lambda: Sandbox.objects.get(public_id=sandbox).ready_at, what="running")
    refused = as_alice.delete("/v1/workspaces/work")
    assert (refused.status_code, refused.json()["code"]) == (409, "workspace_in_use")
    destroyed(as_alice, sandbox)
    started(as_alice, workspace="work")


def test_what_ends_it_does_not_matter(as_alice: Api, running: RunningNode) -> None:
    """Idleness and age save it as a DELETE does; a paused one is thawed for it."""
    idle = started(as_alice, workspace="work")
    exec_in(as_alice, idle, "echo idle > x")
    long_ago = now() - seconds(10_000)
    Sandbox.objects.filter(public_id=idle).update(last_active_at=long_ago, idle_timeout_seconds=0)
    assert wait_until(sandboxes_reap, what="it is reaped") == 1
    assert gone(idle).death_reason == "idle"
    old = started(as_alice, workspace="work")
    assert exec_in(as_alice, old, "cat x; echo old > x")["stdout"] == "idle\n"
    assert as_alice.post(f"/v1/sandboxes/{old}/pause").status_code == 200
    Sandbox.objects.filter(public_id=old).update(expires_at=now() - seconds(1))
    assert sandboxes_reap() == 1
    row = gone(old)
    assert (row.death_reason, "saved" in row.death_detail) == ("ttl", False)
    third = started(as_alice, workspace="work")
    assert exec_in(as_alice, third, "cat x")["stdout"] == "old\n"


def test_what_runs_is_ended_kindly_before_the_last_version_is_read(
    as_alice: Api, running: RunningNode
) -> None:
    sandbox = started(as_alice, workspace="work")
    command = "trap 'echo bye > x; exit' TERM; echo up > up; while :; do sleep 0.05; done"
    assert as_alice.post(f"/v1/sandboxes/{sandbox}/jobs", {"command": command}).status_code == 201
    wait_until(
        lambda: exec_in(as_alice, sandbox, "cat up 2>/dev/null; true")["stdout"] == "up\n",
        what="the job runs",
    )
    destroyed(as_alice, sandbox)
    second = started(as_alice, workspace="work")
    assert exec_in(as_alice, second, "cat x")["stdout"] == "bye\n"


def test_one_that_is_lost_keeps_the_version_before_and_says_so(as_alice: Api, running: RunningNode) -> None:
    first = started(as_alice, workspace="work")
    exec_in(as_alice, first, "echo good > x")
    destroyed(as_alice, first)
    second = started(as_alice, workspace="work")
    exec_in(as_alice, second, "echo lost > x")
    for pid in _pids(second):
        os.kill(pid, signal.SIGKILL)
    row = gone(second)
    assert "could not be saved: the version of" in row.death_detail, row.death_detail
    third = started(as_alice, workspace="work")
    assert exec_in(as_alice, third, "cat x")["stdout"] == "good\n"


def _pids(sandbox: str) -> list[int]:
    """The guest of that sandbox, and what it forked."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                line = Path(f"/proc/{name}/cmdline").read_bytes()
            except OSError:
                continue
            if sandbox.encode() in line and b"--listen" in line:
                found.append(int(name))
    assert found, f"{sandbox} has no guest"
    return sorted(found)


def test_one_that_cannot_be_put_back_is_never_saved_over_the_good_one(
    as_alice: Api, running: RunningNode, store: Path
) -> None:
    first = started(as_alice, workspace="work")
    exec_in(as_alice, first, "head -c 3000000 /dev/urandom > x")
    wanted = exec_in(as_alice, first, "sha256sum x")["stdout"]
    destroyed(as_alice, first)
    (path,) = store.glob("*/*")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    second = str(made(as_alice, workspace="work")["vm_id"])
    assert gone(second).death_reason == "image_error"
    assert [found.name for found in store.glob("*/*")] == [path.name]
    path.write_bytes(whole)
    third = started(as_alice, workspace="work")
    assert exec_in(as_alice, third, "sha256sum x")["stdout"] == wanted


def test_a_storage_that_fails_does_not_keep_the_sandbox(
    as_alice: Api, running: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = started(as_alice, workspace="work")

    def full(self: Any, key: str, pieces: Iterator[bytes]) -> int:
        raise StorageError("no space left")

    monkeypatch.setattr(type(storage()), "write", full)
    row = destroyed(as_alice, sandbox)
    assert row.death_detail.endswith("Its workspace could not be saved: there is no version of it.")
    assert (row.death_reason, Snapshot.objects.filter(state=SnapshotState.READY).count()) == ("user", 0)


def test_a_save_that_hangs_is_waited_for_so_long_only(
    as_alice: Api, make_node: Callable[..., RunningNode], alice: User
) -> None:
    """Without a worker nobody saves it."""
    node = make_node(pool=1)
    node.wait_parked(1)
    sandbox = str(made(as_alice, workspace="work")["vm_id"])
    as_alice.delete(f"/v1/sandboxes/{sandbox}")
    row = Sandbox.objects.get(public_id=sandbox)
    assert (row.state, row.save_until is not None) == (SandboxState.STOPPING, True)
    refused = as_alice.post("/v1/sandboxes", {"workspace": "work"})
    assert refused.json()["code"] == "workspace_in_use"
    Sandbox.objects.filter(pk=row.pk).update(save_until=now() - seconds(1))
    gone(sandbox)


def test_it_is_saved_now_and_then_when_it_is_used(
    as_alice: Api, running: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = started(as_alice, workspace="work")
    exec_in(as_alice, sandbox, "echo x > x")
    assert workspaces.workspaces_autosave() == 0
    monkeypatch.setattr(workspaces, "AUTOSAVE_SECONDS", 0.0)
    assert workspaces.workspaces_autosave() == 1
    wait_until(lambda: Workspace.objects.get().current, what="a version")
    assert workspaces.workspaces_autosave() == 0, "nothing moved since"
    exec_in(as_alice, sandbox, "echo y > x")
    assert workspaces.workspaces_autosave() == 1


def test_one_is_deleted_with_all_its_versions(
    as_alice: Api, as_mallory: Api, running: RunningNode, store: Path
) -> None:
    sandbox = started(as_alice, workspace="work")
    destroyed(as_alice, sandbox)
    refused = as_mallory.delete("/v1/workspaces/work")
    assert (refused.status_code, refused.json()["code"]) == (404, "workspace_not_found")
    assert as_alice.delete("/v1/workspaces/work").status_code == 204
    assert as_alice.get("/v1/workspaces/work").status_code == 404
    wait_until(lambda: list(store.glob("*/*")) == [], what="its objects are gone")
    again = started(as_alice, workspace="work")
    assert exec_in(as_alice, again, "ls")["stdout"] == ""


def test_a_sessions_workspace_is_its_users_and_its_apps(as_alice: Api, running: RunningNode) -> None:
    def session(**more: Any) -> str:
        body = {"agent": {"kind": "shell"}, "user_id": "u1", "workspace": "work"} | more
        answer = as_alice.post("/v1/sessions", body)
        assert answer.status_code == 201, answer.content
        assert answer.json()["workspace"] == "work"
        found = answer.json()
        wait_until(
            lambda: as_alice.get(f"/v1/sessions/{found['chat_session_id']}").json()["status"] == "idle",
            what="the session is ready",
        )
        sandbox = str(found["sandbox_id"])
        content = str(exec_in(as_alice, sandbox, "cat x 2>/dev/null; true")["stdout"])
        exec_in(as_alice, sandbox, f"echo {more} > x")
        assert as_alice.delete(f"/v1/sessions/{found['chat_session_id']}").status_code == 200
        gone(sandbox)
        return content

    assert session() == ""
    assert session(user_id="u2") == ""
    assert session(app={"id": "a"}) == ""
    assert session(app={"id": "a", "set_id": "b"}) == ""
    assert session(app={"id": "a", "capability_sets": ["x"]}) != ""
    assert session() != ""
    assert session(user_id="u2") != ""
    sandbox = started(as_alice, workspace="work")
    assert exec_in(as_alice, sandbox, "ls")["stdout"] == ""
    found = {(row["user_id"], row["app"]) for row in as_alice.get("/v1/workspaces").json()["workspaces"]}
    assert found == {("u1", None), ("u2", None), ("u1", "a"), ("u1", "a/b"), (None, None)}
    assert as_alice.delete("/v1/workspaces/work?user_id=u1&app=a/b").status_code == 204


def test_a_session_starts_from_a_snapshot(as_alice: Api, running: RunningNode) -> None:
    sandbox = started(as_alice)
    exec_in(as_alice, sandbox, "echo seed > x")
    snapshot = as_alice.post(f"/v1/sandboxes/{sandbox}/snapshot", {}).json()["snapshot_id"]
    body = {"agent": {"kind": "shell"}, "user_id": "u", "snapshot": snapshot}
    found = as_alice.post("/v1/sessions", body).json()
    wait_until(
        lambda: as_alice.get(f"/v1/sessions/{found['chat_session_id']}").json()["status"] == "idle",
        what="the session is ready",
    )
    assert exec_in(as_alice, found["sandbox_id"], "cat x")["stdout"] == "seed\n"


def test_an_erased_tenants_files_go_from_the_storage_and_the_last_ones_are_not_saved(
    alice: Any, as_alice: Api, as_mallory: Api, running: RunningNode, store: Path
) -> None:
    kept = started(as_mallory, workspace="his")
    destroyed(as_mallory, kept)
    first = started(as_alice, workspace="work")
    assert as_alice.post(f"/v1/sandboxes/{first}/snapshot", {}).status_code == 201
    destroyed(as_alice, first)
    living = started(as_alice, workspace="work")
    tenant_suspend(tenant=alice.tenant, actor="usr_operator")
    tenant_erase(tenant=alice.tenant, actor="usr_operator")

    def erased() -> bool:
        tenants_erase()
        return not Tenant.objects.filter(pk=alice.tenant_id).exists()

    wait_until(erased, what="the tenant is erased")
    assert not Sandbox.objects.filter(public_id=living).exists()
    rows = Snapshot.objects.all()
    assert [row.tenant_id for row in rows] == [Workspace.objects.get().tenant_id]
    assert [found.key for found in storage().objects()] == [rows[0].storage_key]

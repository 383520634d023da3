"""Snapshots: files are kept, whole or not at all, and start new sandboxes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings

from accounts.models import User
from e2a.core.clock import now, seconds
from sandboxes import saving
from sandboxes.models import Restore, Sandbox, SandboxState
from sandboxes.snapshot_models import Snapshot, SnapshotState
from sandboxes.snapshot_sweep import snapshots_sweep, storage_tidy
from sandboxes.storage import StorageError, storage
from tests.fixtures import Api
from tests.sandboxes.running import RunningNode, at_once, wait_until
from tests.sandboxes.test_warm_and_cold import exec_in, made


@pytest.fixture(autouse=True)
def store(settings_of_node: Callable[..., None], tmp_path: Path) -> Path:
    """An empty folder as storage."""
    import dataclasses

    place = dataclasses.replace(settings.E2A.storage, folder=str(tmp_path / "store"))
    settings_of_node(storage=place)
    return tmp_path / "store"


@pytest.fixture
def running(make_node: Callable[..., RunningNode], worker: object) -> RunningNode:
    return make_node(pool=1)


def kept(as_user: Api, sandbox: str, **body: Any) -> dict[str, Any]:
    """A snapshot that is ready."""
    answer = as_user.post(f"/v1/sandboxes/{sandbox}/snapshot", body)
    assert answer.status_code == 201, answer.content
    found: dict[str, Any] = answer.json()
    assert found["state"] == "ready", found
    return found


def started(as_user: Api, **body: Any) -> str:
    """A new sandbox, once it runs."""
    sandbox = str(made(as_user, **body)["vm_id"])
    wait_until(lambda: Sandbox.objects.get(public_id=sandbox).ready_at, what="running")
    return sandbox


def death_of(as_user: Api, sandbox: str) -> Any:
    return wait_until(lambda: as_user.get(f"/v1/sandboxes/{sandbox}").json()["death"], what="it ended")


def objects(store: Path) -> list[str]:
    return sorted(path.name for path in store.glob("*/*"))


def test_files_are_kept_and_start_another_sandbox(as_alice: Api, running: RunningNode, store: Path) -> None:
    first = started(as_alice)
    exec_in(
        as_alice, first, "mkdir -p a/b; head -c 3000000 /dev/urandom > a/b/x; chmod 600 a/b/x; ln -s b/x a/l"
    )
    snapshot = kept(as_alice, first, name="mine")
    assert (snapshot["name"], snapshot["sandbox_id"], snapshot["template"]) == ("mine", first, "standard")
    assert (snapshot["files"], snapshot["files_bytes"], snapshot["skipped"]) == (1, 3_000_000, 0)
    assert snapshot["size_bytes"] == sum(path.stat().st_size for path in store.glob("*/*"))
    wanted = exec_in(as_alice, first, "sha256sum a/b/x; stat -c '%a %Y %N' a/b/x a/l")["stdout"]
    as_alice.delete(f"/v1/sandboxes/{first}")
    second = started(as_alice, snapshot=snapshot["snapshot_id"])
    assert exec_in(as_alice, second, "sha256sum a/b/x; stat -c '%a %Y %N' a/b/x a/l")["stdout"] == wanted
    assert as_alice.get(f"/v1/sandboxes/{second}").json()["snapshot_id"] == snapshot["snapshot_id"]


def test_what_is_stored_is_not_readable(as_alice: Api, running: RunningNode, store: Path) -> None:
    sandbox = started(as_alice)
    exec_in(as_alice, sandbox, "for i in $(seq 2000); do echo planted-text-$i; done > x")
    kept(as_alice, sandbox)
    (path,) = store.glob("*/*")
    assert path.stat().st_mode & 0o77 == 0
    data = path.read_bytes()
    assert data.startswith(b"e2a\x01")
    assert b"planted" not in data
    assert b"\x28\xb5\x2f\xfd" not in data  # The magic number of zstd.


def test_a_list_holds_my_own_only_and_deleted_ones_are_gone(
    as_alice: Api, as_mallory: Api, running: RunningNode, store: Path
) -> None:
    sandbox = started(as_alice)
    ids = [kept(as_alice, sandbox, name=str(n))["snapshot_id"] for n in range(3)]
    page = as_alice.get("/v1/snapshots?limit=2").json()
    assert [row["snapshot_id"] for row in page["snapshots"]] == ids[:0:-1]
    rest = as_alice.get(f"/v1/snapshots?state=ready&cursor={page['next_cursor']}").json()
    assert [row["snapshot_id"] for row in rest["snapshots"]] == ids[:1]
    assert as_alice.get("/v1/snapshots?state=saving").json()["snapshots"] == []
    assert as_alice.get("/v1/snapshots?state=deleting").json()["code"] == "invalid_state"
    assert as_mallory.get("/v1/snapshots").json()["snapshots"] == []
    for method in ("GET", "DELETE"):
        refused = as_mallory.request(method, f"/v1/snapshots/{ids[0]}")
        assert (refused.status_code, refused.json()["code"]) == (404, "snapshot_not_found")
    foreign = as_mallory.post("/v1/sandboxes", {"snapshot": ids[0]})
    assert (foreign.status_code, foreign.json()["code"]) == (404, "snapshot_not_found")
    assert as_alice.delete(f"/v1/snapshots/{ids[0]}").status_code == 204
    assert as_alice.delete(f"/v1/snapshots/{ids[0]}").status_code == 404
    assert as_alice.post("/v1/sandboxes", {"snapshot": ids[0]}).json()["code"] == "snapshot_not_found"
    wait_until(lambda: len(objects(store)) == 2, what="its object is gone")
    wait_until(lambda: Snapshot.objects.count() == 2, what="then its row")


def test_ten_start_from_one_at_once(
    as_alice: Api, make_node: Callable[..., RunningNode], worker: object
) -> None:
    make_node(pool=2, capacity=20)
    first = started(as_alice)
    exec_in(as_alice, first, "head -c 1000000 /dev/urandom > x")
    wanted = exec_in(as_alice, first, "sha256sum x")["stdout"]
    snapshot = kept(as_alice, first)["snapshot_id"]
    answers = at_once(10, lambda n: as_alice.post("/v1/sandboxes", {"snapshot": snapshot}))
    ids = [answer.json()["vm_id"] for answer in answers]  # type: ignore[union-attr]
    assert len(set(ids)) == 10
    wait_until(
        lambda: Sandbox.objects.filter(public_id__in=ids, state=SandboxState.RUNNING).count() == 10,
        seconds=120,
        what="all ten run",
    )
    assert {exec_in(as_alice, sandbox, "sha256sum x")["stdout"] for sandbox in ids} == {wanted}


def test_one_that_is_not_ready_starts_nothing(as_alice: Api, running: RunningNode, alice: User) -> None:
    sandbox = Sandbox.objects.get(public_id=started(as_alice))
    row = Snapshot.objects.create(
        tenant=alice.tenant,
        sandbox=sandbox,
        sandbox_public_id=sandbox.public_id,
        template_name="standard",
        created_at=now(),
        lease_until=now() + seconds(600),
    )
    answer = as_alice.post("/v1/sandboxes", {"snapshot": row.public_id})
    assert (answer.status_code, answer.json()["code"]) == (409, "snapshot_not_ready")
    assert Sandbox.objects.filter(snapshot=row).count() == 0


def test_what_is_too_large_is_refused_and_leaves_nothing(
    as_alice: Api, running: RunningNode, store: Path, settings_of_node: Callable[..., None]
) -> None:
    settings_of_node(max_snapshot_mib=1)
    sandbox = started(as_alice)
    exec_in(as_alice, sandbox, "head -c 1100000 /dev/zero > x")
    answer = as_alice.post(f"/v1/sandboxes/{sandbox}/snapshot", {})
    assert (answer.status_code, answer.json()["code"]) == (413, "snapshot_too_large")
    assert as_alice.get("/v1/snapshots").json()["snapshots"] == []
    assert objects(store) == []
    exec_in(as_alice, sandbox, "head -c 1000000 /dev/zero > x")
    kept(as_alice, sandbox)


def test_number_and_size_are_limited(
    as_alice: Api, running: RunningNode, settings_of_node: Callable[..., None]
) -> None:
    settings_of_node(max_snapshots=2)
    sandbox = started(as_alice)
    answers = at_once(5, lambda n: as_alice.post(f"/v1/sandboxes/{sandbox}/snapshot", {}))
    codes = sorted(answer.status_code for answer in answers)  # type: ignore[union-attr]
    assert codes == [201, 201, 429, 429, 429]
    settings_of_node(max_snapshots=10, max_snapshots_mib=0)
    refused = as_alice.post(f"/v1/sandboxes/{sandbox}/snapshot", {})
    assert (refused.status_code, refused.json()["code"]) == (429, "quota_exceeded")


def test_a_damaged_one_ends_the_sandbox_and_says_so(as_alice: Api, running: RunningNode, store: Path) -> None:
    sandbox = started(as_alice)
    exec_in(as_alice, sandbox, "head -c 3000000 /dev/urandom > x")
    snapshot = kept(as_alice, sandbox)["snapshot_id"]
    (path,) = store.glob("*/*")
    data = bytearray(path.read_bytes())
    for damaged in (
        data[:2_000_000] + bytes([data[2_000_000] ^ 1]) + data[2_000_001:],
        data[:-100],
        data[: 4 + 1024 * 1024 + 16],
        b"",
    ):
        path.write_bytes(damaged)
        second = str(made(as_alice, snapshot=snapshot)["vm_id"])
        ended = death_of(as_alice, second)
        assert ended["reason"] == "image_error", ended
        assert "damaged" in ended["detail"]
    path.unlink()
    third = str(made(as_alice, snapshot=snapshot)["vm_id"])
    ended = death_of(as_alice, third)
    assert (ended["reason"], "storage" in ended["detail"]) == ("image_error", True)
    path.write_bytes(data)
    started(as_alice, snapshot=snapshot)


def test_a_sandbox_is_not_reached_before_its_files_are_there(
    as_alice: Api, running: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = started(as_alice)
    exec_in(as_alice, sandbox, "head -c 1000000 /dev/urandom > x")
    snapshot = kept(as_alice, sandbox)["snapshot_id"]
    go_on = threading.Event()
    read = type(storage()).read

    def slow(self: Any, key: str) -> Iterator[bytes]:
        pieces = read(self, key)
        assert go_on.wait(60)
        return pieces

    monkeypatch.setattr(type(storage()), "read", slow)
    second = str(made(as_alice, snapshot=snapshot)["vm_id"])
    wait_until(lambda: Sandbox.objects.get(public_id=second).lease_holder, what="it is being restored")
    assert as_alice.get(f"/v1/sandboxes/{second}").json()["state"] == "booting"
    go_on.set()
    assert exec_in(as_alice, second, "wc -c < x")["stdout"].strip() == "1000000"
    assert Sandbox.objects.get(public_id=second).restore == Restore.DONE


def test_a_save_that_was_left_is_begun_anew_and_leaves_no_half(
    as_alice: Api, running: RunningNode, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after kill -9 in the middle: the row says saving, its lease has run out, and parts lie about."""
    sandbox = Sandbox.objects.get(public_id=started(as_alice))
    assert sandbox.tenant is not None
    folder = store / sandbox.tenant.public_id
    folder.mkdir(parents=True)
    row = Snapshot.objects.create(
        tenant=sandbox.tenant,
        sandbox=sandbox,
        sandbox_public_id=sandbox.public_id,
        template_name="standard",
        created_at=now() - seconds(60),
        attempt=1,
        lease_holder="dead",
        lease_until=now() - seconds(1),
    )
    Snapshot.objects.filter(pk=row.pk).update(storage_key=f"{folder.name}/{row.public_id}.1")
    (folder / f"{row.public_id}.1").write_bytes(b"whole, and not committed")
    (folder / f"{row.public_id}.1.abcdef.part").write_bytes(b"half")
    snapshots_sweep()
    wait_until(lambda: Snapshot.objects.get(pk=row.pk).state == SnapshotState.READY, what="ready")
    assert objects(store) == [f"{row.public_id}.2"]


def test_one_that_never_ends_well_fails(as_alice: Api, running: RunningNode, store: Path) -> None:
    sandbox = Sandbox.objects.get(public_id=started(as_alice))
    assert sandbox.tenant is not None
    row = Snapshot.objects.create(
        tenant=sandbox.tenant, sandbox=sandbox, sandbox_public_id=sandbox.public_id, template_name="standard",
        created_at=now() - seconds(60), attempt=saving.ATTEMPTS,
    )  # fmt: skip
    snapshots_sweep()
    wait_until(lambda: Snapshot.objects.get(pk=row.pk).state == SnapshotState.FAILED, what="failed")
    shown = as_alice.get(f"/v1/snapshots/{row.public_id}").json()
    assert (shown["state"], shown["error"]["code"]) == ("failed", "snapshot_failed")
    assert objects(store) == []


def test_a_storage_that_fails_is_said(
    as_alice: Api, running: RunningNode, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = started(as_alice)

    def full(self: Any, key: str, pieces: Iterator[bytes]) -> int:
        next(iter(pieces))
        raise StorageError("no space left")

    monkeypatch.setattr(type(storage()), "write", full)
    answer = as_alice.post(f"/v1/sandboxes/{sandbox}/snapshot", {})
    assert (answer.status_code, answer.json()["code"]) == (503, "snapshot_failed")
    assert as_alice.get("/v1/snapshots").json()["snapshots"] == []


def test_a_deleted_one_that_is_still_saved_leaves_nothing(
    as_alice: Api, running: RunningNode, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = started(as_alice)
    exec_in(as_alice, sandbox, "head -c 1000000 /dev/urandom > x")
    write = type(storage()).write
    written = threading.Event()
    go_on = threading.Event()

    def slow(self: Any, key: str, pieces: Iterator[bytes]) -> int:
        size = write(self, key, pieces)
        written.set()
        assert go_on.wait(60)
        return size

    monkeypatch.setattr(type(storage()), "write", slow)
    thread = threading.Thread(
        target=lambda: as_alice.post(f"/v1/sandboxes/{sandbox}/snapshot", {}), daemon=True
    )
    thread.start()
    assert written.wait(30)
    snapshot = as_alice.get("/v1/snapshots").json()["snapshots"][0]["snapshot_id"]
    assert as_alice.delete(f"/v1/snapshots/{snapshot}").status_code == 204
    go_on.set()
    thread.join(30)
    wait_until(lambda: objects(store) == [] and not Snapshot.objects.exists(), what="nothing is left")


def test_objects_that_no_row_names_go_but_never_all_of_them(
    as_alice: Api, running: RunningNode, store: Path
) -> None:
    sandbox = started(as_alice)
    kept(as_alice, sandbox)
    folder = next(store.iterdir())
    (folder / "snp_orphan.1").write_bytes(b"x")
    (folder / "snp_other.1.abc.part").write_bytes(b"x")
    assert storage_tidy() == 0  # Young: somebody may be at it.
    assert storage_tidy(older_than_seconds=-1) == 2
    assert len(objects(store)) == 1
    for number in range(8):
        (folder / f"snp_{number}.1").write_bytes(b"x")
    assert storage_tidy(older_than_seconds=-1) == 0
    assert len(objects(store)) == 9


def test_a_snapshot_and_a_workspace_do_not_go_together(as_alice: Api, node_row: object) -> None:
    answer = as_alice.post("/v1/sandboxes", {"snapshot": "snp_x", "workspace": "w"})
    assert (answer.status_code, answer.json()["errors"][0]["code"]) == (400, "snapshot_and_workspace")
    for bad in ("", "a/b", ".x", 5, "x" * 129):
        assert as_alice.post("/v1/sandboxes", {"workspace": bad}).status_code == 400

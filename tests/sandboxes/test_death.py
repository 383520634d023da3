"""Every end has a reason and evidence, on real containers that die every way we know."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.db import connections

from e2a.core.clock import now, seconds
from sandboxes import death
from sandboxes.models import Job, Sandbox, SandboxState
from sandboxes.reaping import KEPT_DAYS, sandboxes_purge
from sandboxes.witness import Curve
from tests.fixtures import Api
from tests.sandboxes.running import RunningNode, streamed, wait_until
from tests.sandboxes.test_exec import events_of
from tests.sandboxes.test_warm_and_cold import exec_in, made

MakeNode = Callable[..., RunningNode]
on_docker = pytest.mark.docker
HOLD = "import sys, time; x = bytearray(int(sys.argv[1]) << 20); time.sleep(30)"
HOG = "python3 -c 'x = bytearray(900 << 20)'"


@pytest.fixture
def docker_node(make_node: MakeNode, worker: Any) -> RunningNode:
    node = make_node(pool=1, engine="docker")
    node.wait_parked(1)
    return node


def container_of(node: RunningNode, sandbox: str) -> str:
    state = node.host.engine.inspect(sandbox, 1)
    assert state is not None
    return state.container_id


def docker(*words: str) -> str:
    return subprocess.run(["docker", *words], check=True, capture_output=True, text=True).stdout.strip()


def death_shown(api: Api, sandbox: str) -> dict[str, Any]:
    """Its death, once its container is gone."""
    rows = Sandbox.objects.filter(public_id=sandbox)
    wait_until(lambda: rows.get().state == SandboxState.DESTROYED, what="destroyed", seconds=60)
    shown: dict[str, Any] = api.get(f"/v1/sandboxes/{sandbox}").json()["death"]
    return shown


@on_docker
def test_one_whose_guest_is_killed_for_memory_died_of_memory(docker_node: RunningNode, as_alice: Api) -> None:
    sandbox = made(as_alice)["vm_id"]
    exec_in(as_alice, sandbox, "echo the last words")
    # The kernel takes a command before the guest; here the guest is made worth more to it than any of many.
    pid = docker("inspect", "-f", "{{.State.Pid}}", container_of(docker_node, sandbox))
    Path(f"/proc/{pid}/oom_score_adj").write_text("1000")
    many = f"for i in $(seq 10); do python3 -c '{HOLD}' 70 & done; wait"
    answer = as_alice.post(f"/v1/sandboxes/{sandbox}/exec", {"command": many})
    assert (answer.status_code, answer.json()["code"], answer.json()["reason"]) == (
        409,
        "sandbox_ended",
        "oom",
    )
    shown = death_shown(as_alice, sandbox)
    assert (shown["reason"], shown["exit_code"], shown["oom"]) == ("oom", 137, True)
    assert shown["oom_kills"] >= 1
    assert shown["memory_peak_mib"] >= 512
    assert shown["last_output"].startswith("the last words\n")


@on_docker
def test_a_command_out_of_memory_is_told_so_and_a_later_kill_is_not(
    docker_node: RunningNode, as_alice: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = made(as_alice)["vm_id"]
    done = exec_in(as_alice, sandbox, HOG)
    assert (done["exit_code"], done["oom"]) == (137, True)
    job = as_alice.post(f"/v1/sandboxes/{sandbox}/jobs", {"command": HOG}).json()["job_id"]
    way = f"/v1/sandboxes/{sandbox}/jobs/{job}"
    wait_until(lambda: as_alice.get(way).json()["state"] == "exited", what="the job's end")
    assert (as_alice.get(way).json()["exit_code"], as_alice.get(way).json()["oom"]) == (137, True)
    assert exec_in(as_alice, sandbox, "exit 137")["oom"] is False
    death.memory_sample(docker_node.host)
    seen = docker_node.host.witness.seen((sandbox, 1))
    wait_until(lambda: seen is not None and seen.oom_at is not None, what="the engine's word")
    # Docker goes on saying OOMKilled of it, whatever ends it later.
    monkeypatch.setattr(death, "OOM_SECONDS", 0.0)
    docker("kill", container_of(docker_node, sandbox))
    shown = death_shown(as_alice, sandbox)
    assert (shown["reason"], shown["exit_code"], shown["oom"]) == ("lost", 137, False)
    assert shown["detail"] == "Its container was killed from outside (exit code 137), not for memory."
    assert shown["oom_kills"] >= 2


@on_docker
def test_what_others_do_to_its_container_is_lost_with_what_is_known(
    docker_node: RunningNode, as_alice: Api
) -> None:
    for words, exit_code, detail in (
        (("rm", "-f"), 137, "Its container was killed and removed from outside (exit code 137)."),
        (("stop", "-t", "10"), 0, "Its container was stopped from outside (exit code 0), not for memory."),
    ):
        docker_node.wait_parked(1)
        sandbox = made(as_alice)["vm_id"]
        exec_in(as_alice, sandbox, "seq 30000; echo done")
        docker(*words, container_of(docker_node, sandbox))
        shown = death_shown(as_alice, sandbox)
        # Killed and removed in one go, the engine's list may still have shown its end.
        assert (shown["reason"], shown["exit_code"]) == ("lost", exit_code)
        assert shown["detail"] == detail or (exit_code == 137 and "killed from outside" in shown["detail"])
        assert len(shown["last_output"]) == 64 * 1024
        assert shown["last_output"].endswith("29999\n30000\ndone\n")


@on_docker
def test_memory_over_time_outlives_the_container(docker_node: RunningNode, as_alice: Api) -> None:
    sandbox = made(as_alice)["vm_id"]
    hold = "import time; x = b'x' * (200 << 20); print('held', flush=True); time.sleep(60)"
    job = as_alice.post(f"/v1/sandboxes/{sandbox}/jobs", {"argv": ["python3", "-c", hold]}).json()["job_id"]
    output = f"/v1/sandboxes/{sandbox}/jobs/{job}/output"
    wait_until(lambda: as_alice.get(output).json()["output"], what="its words")
    host = docker_node.host

    def much() -> bool:
        death.memory_sample(host)
        seen = host.witness.seen((sandbox, 1))
        return seen is not None and any(value > 200 << 20 for _, value in seen.curve.points)

    wait_until(much, what="200 MiB in use")
    docker("kill", container_of(docker_node, sandbox))
    shown = death_shown(as_alice, sandbox)
    times, mib = zip(*shown["memory_curve"], strict=True)
    assert max(mib) > 200
    assert all(0 <= at < 120 for at in times)
    assert 200 < shown["memory_peak_mib"] <= 512
    assert shown["last_output"] == "held\n"
    assert host.witness.seen((sandbox, 1)) is None


@on_docker
def test_one_that_was_started_before_its_host_was_died_of_the_restart(
    docker_node: RunningNode, as_alice: Api
) -> None:
    sandbox = made(as_alice)["vm_id"]
    assert Sandbox.objects.get(public_id=sandbox).boot_id == death.boot_id()
    Sandbox.objects.filter(public_id=sandbox).update(boot_id="another run of the host")
    docker("kill", container_of(docker_node, sandbox))
    shown = death_shown(as_alice, sandbox)
    assert (shown["reason"], shown["detail"]) == ("host_restart", "Its host was restarted.")


@on_docker
def test_what_is_asked_of_it_while_it_dies_is_told_of_its_end(
    docker_node: RunningNode, as_alice: Api
) -> None:
    sandbox = made(as_alice)["vm_id"]
    way = f"/v1/sandboxes/{sandbox}"
    job = as_alice.post(f"{way}/jobs", {"command": "echo begun; sleep 100"}).json()["job_id"]
    calls: dict[str, Callable[[], Any]] = {
        "exec": lambda: as_alice.post(f"{way}/exec", {"command": "sleep 100"}),
        "stream": lambda: _read(
            as_alice.post(f"{way}/exec", {"command": "sleep 100"}, headers={"Accept": "text/event-stream"})
        ),
        "job": lambda: _read(
            as_alice.get(f"{way}/jobs/{job}/output", headers={"Accept": "text/event-stream"})
        ),
    }
    answers: dict[str, Any] = {}

    def ask(name: str) -> None:
        answers[name] = calls[name]()
        connections.close_all()

    threads = [threading.Thread(target=ask, args=(name,)) for name in calls]
    for thread in threads:
        thread.start()
    wait_until(lambda: _running(as_alice, sandbox) >= 3, what="all three run")
    docker("kill", container_of(docker_node, sandbox))
    for thread in threads:
        thread.join(60)
    assert answers.keys() == calls.keys()
    refused = answers["exec"]
    assert (refused.status_code, refused.json()["code"], refused.json()["reason"]) == (
        409,
        "sandbox_ended",
        "lost",
    )
    assert "killed from outside" in refused.json()["detail"]
    for name in ("stream", "job"):
        kind, last = list(events_of(answers[name]))[-1]
        assert (kind, last["code"], last["reason"]) == ("error", "sandbox_ended", "lost"), name
    assert death_shown(as_alice, sandbox)["last_output"] == "begun\n"
    ended = as_alice.get(f"{way}/jobs/{job}").json()
    assert (ended["state"], ended["exit_code"], ended["reason"]) == ("unknown", None, "lost")
    later = as_alice.post(f"{way}/exec", {"command": "true"})
    assert (later.status_code, later.json()["code"], later.json()["reason"]) == (409, "not_running", "lost")


def _read(answer: Any) -> bytes:
    assert answer.status_code == 200, answer.content
    return b"\n\n".join(
        b"\n".join(line for line in block.split(b"\n") if not line.startswith(b"id:"))
        for block in streamed(answer).split(b"\n\n")
    )


def _running(api: Api, sandbox: str) -> int:
    from sandboxes.configuration import guest_client

    return guest_client(Sandbox.objects.select_related("node").get(public_id=sandbox)).stats().running


def test_where_nobody_counts_memory_it_is_null(make_node: MakeNode, worker: Any, as_alice: Api) -> None:
    node = make_node(pool=1)
    node.wait_parked(1)
    sandbox = made(as_alice)["vm_id"]
    exec_in(as_alice, sandbox, "echo one; echo two >&2")
    as_alice.delete(f"/v1/sandboxes/{sandbox}")
    shown = death_shown(as_alice, sandbox)
    assert (shown["memory_peak_mib"], shown["memory_curve"], shown["oom_kills"]) == (None, [], None)
    assert sorted(shown["last_output"].splitlines()) == ["one", "two"]


def test_evidence_is_kept_for_30_days_and_no_longer(
    node_row: Any, parked_row: Callable[[], Sandbox], alice: Any, as_alice: Api
) -> None:
    row = parked_row()
    evidence = {"exit_code": 137, "last_output": "words"}
    rows = Sandbox.objects.filter(pk=row.pk)
    rows.update(
        tenant=alice.tenant, state="destroyed", death_reason="oom", death=evidence, destroyed_at=now()
    )
    Job.objects.create(public_id="job_" + "a" * 26, sandbox=row, command="x", created_at=now())
    rows.update(destroyed_at=now() - seconds((KEPT_DAYS - 1) * 86400))
    assert sandboxes_purge() == 0
    assert as_alice.get(f"/v1/sandboxes/{row.public_id}").json()["death"]["last_output"] == "words"
    rows.update(destroyed_at=now() - seconds((KEPT_DAYS + 1) * 86400))
    assert sandboxes_purge() == 1
    assert as_alice.get(f"/v1/sandboxes/{row.public_id}").status_code == 404
    assert not Job.objects.exists()


def test_a_curve_of_any_length_has_few_points_and_keeps_its_peak() -> None:
    curve = Curve()
    for tick in range(20_000):
        curve.add(tick * 5.0, 999 if tick == 777 else tick % 100)
    assert 60 <= len(curve.points) <= 120
    assert max(value for _, value in curve.points) == 999
    assert curve.points[0][0] == 0
    assert curve.points[-1][0] > 20_000 * 5.0 - 2 * curve.step
    assert [at for at, _ in curve.points] == sorted(at for at, _ in curve.points)
    assert len(json.dumps(curve.points)) < 4000

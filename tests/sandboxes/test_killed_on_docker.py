"""A real kill -9 at every step of making and of removing a sandbox on Docker; the next process goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from django.conf import settings
from django.db import connection

from sandboxes.models import Sandbox, SandboxState
from sandboxes.reaping import sandboxes_unstick
from tests.fixtures import Api
from tests.sandboxes.leftovers import containers, left_over, volumes
from tests.sandboxes.running import ROOT, RunningNode, celery_worker, wait_until
from tests.sandboxes.test_crashes import next_process
from tests.sandboxes.test_warm_and_cold import exec_in, made

pytestmark = [pytest.mark.docker, pytest.mark.timeout(400)]
MakeNode = Callable[..., RunningNode]

MAKING = [
    ("sandboxes.engines.host_folders:SandboxFolder.claim", "before"),  # The folder is there, and nobody's.
    ("sandboxes.engines.host_folders:SandboxFolder.claim", "after"),
    ("sandboxes.engines.host_folders:SandboxFolder.prepare", "after"),  # The guest's tmpfs is mounted.
    ("sandboxes.engines.loop_disk:run_host_command", "before"),  # The disk's file is sparse and empty.
    ("sandboxes.engines.loop_disk:run_host_command", "after"),  # mkfs is done, the file not yet in its place.
    ("sandboxes.engines.loop_disk:_format", "after"),
    ("sandboxes.engines.loop_disk:_make_disk_folders", "before"),  # The loop device is set up and mounted.
    ("sandboxes.engines.docker:_create", "before"),
    ("sandboxes.engines.docker:_create", "after"),  # The container is there, and no row knows its id.
    ("sandboxes.provision:_start", "before"),
    ("sandboxes.provision:_start", "after"),
    ("sandboxes.provision:_wait_healthy", "before"),  # Booting.
    ("sandboxes.provision:_wait_healthy", "after"),
]
REMOVING = [
    ("sandboxes.removal:death_evidence", "after"),
    ("sandboxes.engines.docker:DockerEngine._remove_container", "before"),
    ("sandboxes.engines.docker:DockerEngine._remove_container", "after"),
    ("sandboxes.engines.host_folders:unmount", "after"),  # The first of the two mounts.
    (
        "sandboxes.engines.host_folders:SandboxFolder._unmount_all",
        "after",
    ),  # The loop device has detached itself.
    ("sandboxes.engines.host_folders:_delete", "after"),
    ("sandboxes.removal:sandbox_gone", "before"),
    ("sandboxes.removal:sandbox_gone", "after"),
]


def named(steps: list[tuple[str, str]]) -> list[str]:
    return [f"{when} {target.rpartition(':')[2]}" for target, when in steps]


@pytest.fixture
def docker_node(make_node: MakeNode) -> Iterator[RunningNode]:
    """A node without a pool. At the end nothing of its instance may be left, nor any Docker volume made."""
    before = volumes()
    node = make_node(pool=0, engine="docker")
    yield node
    node.clear()
    assert left_over(node.host.instance, node.host.sandboxes_folder) == []
    assert volumes() <= before


def killed_at(what: str, sandbox: Sandbox, target: str, when: str) -> None:
    """Let a process do `what` and die at that step."""
    database = connection.settings_dict
    if connection.vendor == "sqlite":
        url = f"sqlite:///{database['NAME']}"
    else:  # The server of this run may be a socket in a folder: only the database's name is the test's own.
        url = urlsplit(os.environ["DATABASE_URL"])._replace(path=f"/{database['NAME']}").geturl()
    environment = os.environ | {
        "DATABASE_URL": url,
        "DJANGO_SETTINGS_MODULE": "e2a.settings",
        "E2A_ENGINE": settings.E2A.engine,
        "E2A_MAX_SANDBOXES": str(settings.E2A.max_sandboxes),
    }
    connection.close()
    done = subprocess.run(
        [sys.executable, "-m", "tests.sandboxes.dying_process", what, str(sandbox.pk), target, when],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, f"it did not come to {when} {target}: {done.stderr[-2000:]}"


def running_after_all(row: Sandbox) -> None:
    """With the sweeps that a whole installation has, it is running in the end."""
    with celery_worker():
        give_up_at = time.monotonic() + 110
        while Sandbox.objects.get(pk=row.pk).state != SandboxState.RUNNING:
            assert time.monotonic() < give_up_at, f"{Sandbox.objects.get(pk=row.pk).state} after 110 s"
            sandboxes_unstick()
            time.sleep(1)  # As often as beat would ask, about; the wait has a limit.


@pytest.mark.parametrize(("target", "when"), MAKING, ids=named(MAKING))
def test_killed_while_it_makes_one_the_next_makes_it(
    docker_node: RunningNode, as_alice: Api, target: str, when: str
) -> None:
    docker_node.stop()
    row = Sandbox.objects.get(public_id=made(as_alice)["vm_id"])
    killed_at("provision", row, target, when)
    row.refresh_from_db()
    assert row.state in (SandboxState.CONFIGURING, SandboxState.BOOTING)
    next_process(docker_node)
    running_after_all(row)
    assert len(containers(docker_node.host.instance)) == 1
    assert exec_in(as_alice, row.public_id, "echo fine > x; cat x")["stdout"] == "fine\n"


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_worker_killed_while_it_configures_the_next_configures(
    docker_node: RunningNode, as_alice: Api, when: str
) -> None:
    row = Sandbox.objects.get(public_id=made(as_alice, env_vars={"GREETING": "hello"})["vm_id"])
    wait_until(lambda: Sandbox.objects.get(pk=row.pk).state == SandboxState.BOOTING, what="booting")
    wait_until(lambda: Sandbox.objects.get(pk=row.pk).lease_until is None, what="its guest answers")
    killed_at("configure", row, "sandboxes.services:guest_configure", when)
    assert Sandbox.objects.get(pk=row.pk).state == SandboxState.BOOTING
    running_after_all(row)
    assert exec_in(as_alice, row.public_id, "echo $GREETING")["stdout"] == "hello\n"


@pytest.mark.parametrize(("target", "when"), REMOVING, ids=named(REMOVING))
def test_killed_while_it_removes_one_the_next_removes_it(
    docker_node: RunningNode, as_alice: Api, target: str, when: str
) -> None:
    row = Sandbox.objects.get(public_id=made(as_alice)["vm_id"])
    with celery_worker("control"):
        rows = Sandbox.objects.filter(pk=row.pk)
        wait_until(lambda: rows.get().state == SandboxState.RUNNING, what="running", seconds=90)
    docker_node.stop()
    assert as_alice.delete(f"/v1/sandboxes/{row.public_id}").status_code == 200
    killed_at("remove", row, target, when)
    next_process(docker_node)
    wait_until(lambda: rows.get().state == SandboxState.DESTROYED, what="destroyed")
    wait_until(
        lambda: left_over(docker_node.host.instance, docker_node.host.sandboxes_folder) == [],
        what="nothing left",
        seconds=90,
    )
    assert rows.get().death_reason == "user"


@pytest.mark.parametrize(
    "command", [["docker", "kill"], ["docker", "rm", "-f"]], ids=["docker kill", "docker rm -f"]
)
def test_taken_away_from_outside_its_state_is_true_within_a_minute(
    docker_node: RunningNode, worker: Any, as_alice: Api, command: list[str]
) -> None:
    row = Sandbox.objects.get(public_id=made(as_alice)["vm_id"])
    rows = Sandbox.objects.filter(pk=row.pk)
    wait_until(lambda: rows.get().state == SandboxState.RUNNING, what="running", seconds=90)
    (container,) = containers(docker_node.host.instance)
    subprocess.run([*command, container], check=True, capture_output=True, timeout=60)
    wait_until(lambda: rows.get().state == SandboxState.DESTROYED, what="destroyed", seconds=60)
    assert rows.get().death_reason == "lost"
    refused = as_alice.post(f"/v1/sandboxes/{row.public_id}/exec", {"command": "true"})
    assert (refused.status_code, refused.json()["code"]) == (409, "not_running")
    assert left_over(docker_node.host.instance, docker_node.host.sandboxes_folder) == []

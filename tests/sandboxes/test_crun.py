"""A template's own runtime, on a Docker daemon of the test's own that knows `crun` beside `runc`."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from django.conf import settings
from docker.errors import DockerException

from sandboxes.image_build import build_image
from sandboxes.models import Node, Template
from tests.fixtures import Api
from tests.sandboxes.running import RunningNode, wait_until
from tests.sandboxes.test_warm_and_cold import exec_in, made

pytestmark = [pytest.mark.docker, pytest.mark.one_database]


@pytest.fixture
def crun_daemon() -> Iterator[str]:
    """The address of a dockerd without a network that has the standard image. Ended with all that is its own."""
    image = build_image("standard", say=lambda _line: None).tag
    folder = Path(tempfile.mkdtemp(prefix="e2a-crun-"))
    address = f"unix://{folder}/docker.sock"
    # Debian's crun refuses a host where cgroups v1 and v2 share the controllers, as some virtual machines do. The
    # daemon sees v1 alone, in a mount namespace of its own; the sandboxes' disks still come in from ours.
    sandboxes = settings.E2A.data_dir / "sandboxes"
    sandboxes.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "--bind", sandboxes, sandboxes], check=True)
    subprocess.run(["mount", "--make-rshared", sandboxes], check=True)
    only_v1 = 'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"'
    command = [
        "unshare", "--mount", "--propagation=slave", "sh", "-c", only_v1, "sh", "dockerd",
        f"--data-root={folder}/root", f"--exec-root={folder}/exec", f"--pidfile={folder}/pid",
        f"--host={address}", "--bridge=none", "--iptables=false", "--add-runtime=crun=/usr/bin/crun",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        daemon = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    client = None

    def connected() -> docker.APIClient | None:
        assert daemon.poll() is None, (folder / "log").read_text()[-2000:]
        try:
            return docker.APIClient(base_url=address, version="auto", timeout=120)
        except DockerException:
            return None

    try:
        client = wait_until(connected, seconds=60, what="a dockerd of our own")
        ours = docker.APIClient(timeout=120)
        list(client.load_image(ours.get_image(image)))
        ours.close()
        yield address
    finally:
        if client is not None:
            client.close()
        daemon.terminate()
        daemon.wait(60)
        subprocess.run(["umount", "--recursive", sandboxes], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def assert_gone(node: RunningNode, sandbox: str) -> None:
    wait_until(lambda: node.host.engine.inspect(sandbox, 1) is None, what=f"{sandbox} is gone")


def test_a_template_runs_on_the_runtime_that_it_names(
    crun_daemon: str,
    make_node: Callable[..., RunningNode],
    settings_of_node: Callable[..., None],
    worker: Any,
    as_alice: Api,
) -> None:
    settings_of_node(docker_host=crun_daemon)
    node = make_node(engine="docker")
    assert {"crun", "runc"} <= set(Node.objects.get().runtimes)
    used = {}
    client = docker.APIClient(base_url=crun_daemon)
    for runtime in ("crun", "", "runc"):
        Template.objects.filter(name="standard").update(runtime=runtime)
        sandbox = made(as_alice)["vm_id"]
        assert exec_in(as_alice, sandbox, "id -u; cat /proc/self/status | grep CapEff")["exit_code"] == 0
        state = node.host.engine.inspect(sandbox, 1)
        assert state is not None
        used[runtime] = client.inspect_container(state.container_id)["HostConfig"]["Runtime"]
        assert as_alice.delete(f"/v1/sandboxes/{sandbox}").status_code == 200
        assert_gone(node, sandbox)
    client.close()
    assert used == {"crun": "crun", "": "runc", "runc": "runc"}

"""A node that runs as a user of the docker group: sandboxes work, and the limits that are soft are named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sandboxes.engines.docker import DockerConnection

USER = 12_345
ROOT = Path(__file__).parents[2]


def test_without_root_a_sandbox_runs_as_the_nodes_own_user_and_the_soft_limits_are_said(
    standard_image: str, instance: str, connection: DockerConnection
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="e2a-soft-"))
    os.chown(folder, USER, USER)
    docker_group = os.stat("/var/run/docker.sock").st_gid
    try:
        done = subprocess.run(
            (
                *(
                    "setpriv",
                    f"--reuid={USER}",
                    f"--regid={USER}",
                    f"--groups={docker_group}",
                    "--inh-caps=-all",
                ),
                *(sys.executable, "-m", "tests.engines.without_root", instance, str(folder), standard_image),
            ),
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        seen = json.loads(done.stdout)
        assert seen["inside"] == [str(USER), "agent", "kept"]
        assert seen["status"] == ["CapEff:", "0" * 16, "CapBnd:", "0" * 16, "NoNewPrivs:", "1"]
        assert seen["left"] == []
        assert len(seen["soft_limits"]) == 4
        assert any("disk_mib is not enforced" in sentence for sentence in seen["soft_limits"])
    finally:
        shutil.rmtree(folder)

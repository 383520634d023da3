"""Run by `test_without_root.py` as a user of the docker group: one sandbox from create to destroy.

Prints one JSON object: what the engine said of itself, and what a command inside saw.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sandboxes.engines.base import SandboxSpec
from sandboxes.engines.docker import DockerEngine
from tests.engines.inside import run, wait_until_ready


def main(instance: str, folder: str, image: str) -> None:
    sandboxes_folder = Path(folder) / "sandboxes"
    engine = DockerEngine(instance=instance, sandboxes_folder=sandboxes_folder)
    spec = SandboxSpec(
        sandbox_id="sbx_soft",
        instance=instance,
        generation=1,
        image=image,
        memory_mib=256,
        cpu=1.0,
        disk_mib=64,
        pids=64,
        uid=10_001,
        gid=10_001,
        folder=sandboxes_folder / "sbx_soft",
        lifetime_seconds=60,
    )
    try:
        engine.start(engine.create(spec))
        wait_until_ready(spec)
        inside = run(spec, "id -u; id -un; echo kept > ~/x && cat ~/x; mkdir -p d/d && chmod 0 d")
        status = run(spec, "grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/self/status")
    finally:
        engine.destroy("sbx_soft", 1)
    print(
        json.dumps(
            {
                "soft_limits": engine.check().soft_limits,
                "inside": inside.output.split(),
                "status": status.output.split(),
                "left": [path.name for path in sandboxes_folder.iterdir()],
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

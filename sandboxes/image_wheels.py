"""Python packages for an image's build, fetched by this process's own pip, which knows this site's index.

So no index stands in a Dockerfile, and none of its credentials in an image's history.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from e2a.core.errors import EngineError
from sandboxes.image_files import File

PIP_SECONDS = 300.0
PYTHON = "3.11"
"""Debian bookworm's, which every image of ours has."""
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
_LINUXES = ("manylinux1", "manylinux2014", "manylinux_2_17", "manylinux_2_24", "manylinux_2_28")


def wheels_fetch(requirements: Path, *, architecture: str) -> list[File]:
    """The wheels of the requirements and of what they need, below `wheels/`. Raises EngineError with pip's words.

    Requirements with hashes are complete: pip takes nothing else, so they are fetched without what they need.
    `architecture` is Docker's word for the machine that the image is for.
    """
    machine = MACHINES.get(architecture)
    if machine is None:
        raise EngineError(f"there are no wheels for the architecture {architecture!r}")
    platforms = [f"--platform={linux}_{machine}" for linux in _LINUXES]
    with tempfile.TemporaryDirectory(prefix="e2a-wheels-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp", *platforms]
        command += [f"--dest={folder}", f"--requirement={requirements}"]
        if "--hash=" in requirements.read_text():
            command.append("--no-deps")
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise EngineError(f"pip did not fetch {requirements.name} in {PIP_SECONDS:g} s") from error
        if done.returncode:
            words = " ".join(done.stderr.split())[-400:]
            raise EngineError(f"pip could not fetch what {requirements.parent.name} needs: {words}")
        return [
            (f"wheels/{path.name}", path.read_bytes(), 0o644) for path in sorted(Path(folder).glob("*.whl"))
        ]

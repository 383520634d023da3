"""Which processes make up e2a on one machine, and what each may hold (ARCHITECTURE 2)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from e2a.settings.environment import E2ASettings, Role
from sandboxes.host import MAKING_MOST

STOP_SECONDS: Final = 10.0
NODE_THREADS: Final = MAKING_MOST + 8
"""As many as ever make cold sandboxes at once (`Host.making` holds the true number, by CPUs), and some for what must
not wait behind them: removing, freezing. A thread is made when it is first needed."""
_SECRETS: Final = (
    "E2A_VAULT_KEYS",
    "E2A_SIGNING_KEYS",
    "E2A_NODE_KEY",
    "SECRET_KEY",
    "EMAIL_URL",
    "DOCKER_HOST",
    "E2A_STORAGE_SECRET_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)
_ALLOWED: Final[Mapping[Role, frozenset[str]]] = {
    "all": frozenset(),
    "web": frozenset({"E2A_VAULT_KEYS", "E2A_SIGNING_KEYS", "E2A_NODE_KEY", "SECRET_KEY", "EMAIL_URL"}),
    "worker": frozenset(
        {
            *("E2A_VAULT_KEYS", "E2A_SIGNING_KEYS", "E2A_NODE_KEY", "SECRET_KEY", "EMAIL_URL"),
            # Snapshots; the last two are what boto3 looks for by itself.
            *("E2A_STORAGE_SECRET_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
        }
    ),
    "node": frozenset({"DOCKER_HOST"}),
    "gateway": frozenset({"E2A_NODE_KEY"}),
    "broker": frozenset({"E2A_VAULT_KEYS", "E2A_NODE_KEY"}),
    "beat": frozenset(),
}
"""The secrets that a role's environment keeps; the others are taken out before it starts."""


@dataclass(frozen=True, slots=True)
class Process:
    """One child. `role` decides what it may hold, `argv` what it is."""

    name: str
    role: Role
    argv: tuple[str, ...]


def environment_of(role: Role, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment that a child of that role gets: the parent's, without the secrets it has no use for."""
    kept = {
        name: value for name, value in environment.items() if name not in _SECRETS or name in _ALLOWED[role]
    }
    return kept | {"E2A_ROLE": role, "PYTHONUNBUFFERED": "1"}


def processes(settings: E2ASettings, base_dir: Path) -> tuple[Process, ...]:
    """Everything that runs, in the order of start; it is stopped the other way round."""
    python = sys.executable
    manage = str(base_dir / "manage.py")
    # Celery warns at each start of root, which the node must be (loops, mounts) and the others run as.
    celery = (
        python,
        "-W",
        "ignore:You're running the worker with superuser",
        "-m",
        "celery",
        "-A",
        "e2a",
        "--quiet",
    )
    quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat")

    def worker(name: str, queues: str, threads: int) -> tuple[str, ...]:
        return (
            *celery,
            "worker",
            "-P",
            "threads",
            "-c",
            str(threads),
            "-Q",
            queues,
            "-n",
            f"{name}@%h",
            *quiet,
        )

    schedule = str(settings.data_dir / "run" / "beat-schedule")
    return (
        Process("gateway", "gateway", (python, manage, "gateway")),
        Process("broker", "broker", (python, manage, "broker")),
        Process("node", "node", worker("node", f"provision,node.{settings.node_name}", NODE_THREADS)),
        # Two processes of one role: turns may take hours, and must not keep a sandbox from being configured or reaped.
        Process("worker", "worker", worker("worker", "control", 8)),
        Process("turns", "worker", worker("turns", "turns", 64)),
        # Saving and restoring files takes minutes and much CPU.
        Process("archives", "worker", worker("archives", "archives", 6)),
        Process("beat", "beat", (*celery, "beat", "--schedule", schedule, "--pidfile=")),
        Process("web", "web", (python, manage, "web")),
    )

"""What Docker's JSON means: pure translation of an inspect answer or an event into our types."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sandboxes.engines.base import ContainerEvent, ContainerState, ContainerStatus, EventKind
from sandboxes.engines.container_options import LABEL_GENERATION, LABEL_INSTANCE, LABEL_SANDBOX

STATUSES: dict[str, ContainerStatus] = {
    "created": "created",
    "running": "running",
    "restarting": "running",
    "paused": "paused",
    "exited": "exited",
    "dead": "exited",
    "removing": "exited",
}
EVENT_KINDS: dict[str, EventKind] = {
    "create": "created",
    "start": "started",
    "pause": "paused",
    "unpause": "resumed",
    "oom": "oom",
    "die": "died",
    "destroy": "destroyed",
}

SIGKILL_EXIT = 137

NEEDED_OF_DAEMON = {
    "MemoryLimit": "this kernel has no memory limit: memory_mib is not enforced",
    "SwapLimit": "this kernel has no swap limit: a sandbox can swap beyond memory_mib",
    "PidsLimit": "this kernel has no pids limit: a fork bomb is not contained",
    "CpuCfsQuota": "this kernel has no CPU quota: cpu is not enforced",
}


def container_state(found: dict[str, Any]) -> ContainerState:
    labels, state = found["Config"]["Labels"], found["State"]
    status = STATUSES[state["Status"]]
    ended = status == "exited"
    return ContainerState(
        sandbox_id=labels[LABEL_SANDBOX],
        generation=int(labels[LABEL_GENERATION]),
        instance=labels[LABEL_INSTANCE],
        container_id=found["Id"],
        status=status,
        exit_code=state["ExitCode"] if ended else None,
        # Docker says OOMKilled also when only a child died; PID 1 that died of it was killed by signal 9.
        oom=bool(ended and state["OOMKilled"] and state["ExitCode"] == SIGKILL_EXIT),
        started_at=_moment(state["StartedAt"]),
        finished_at=_moment(state["FinishedAt"]) if ended else None,
    )


def _moment(text: str) -> datetime | None:
    """Docker's RFC 3339 with up to nine digits; its year 1 means never."""
    if text.startswith("0001-"):
        return None
    whole, _dot, fraction = text.removesuffix("Z").partition(".")
    return datetime.fromisoformat(f"{whole}.{fraction[:6]:0<6}+00:00")


def container_event(raw: dict[str, Any]) -> ContainerEvent:
    attributes = raw["Actor"]["Attributes"]
    kind = EVENT_KINDS[raw["Action"]]
    code = attributes.get("exitCode")
    return ContainerEvent(
        sandbox_id=attributes[LABEL_SANDBOX],
        generation=int(attributes[LABEL_GENERATION]),
        kind=kind,
        at=datetime.fromtimestamp(raw["timeNano"] / 1e9, UTC),
        exit_code=int(code) if kind == "died" and code is not None else None,
    )


def daemon_soft_limits(info: dict[str, Any]) -> list[str]:
    """Sentences about what this daemon or its kernel cannot hold to, from `docker info`."""
    limits = [sentence for key, sentence in NEEDED_OF_DAEMON.items() if not info.get(key, True)]
    if not any("seccomp" in option for option in info.get("SecurityOptions") or ()):
        limits.append("this daemon has no seccomp profile: the kernel's whole surface is open to sandboxes")
    return limits

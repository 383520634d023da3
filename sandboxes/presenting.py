"""How sandboxes look outside. Plain dicts, the same for the API's answers and those that `sessions_app` adds
to."""

from __future__ import annotations

import datetime as dt
from typing import Any

from e2a.core.api import time_text
from sandboxes.activity import Alive, alive_look
from sandboxes.arrivals import queue_position
from sandboxes.guest_client import Completed, FileInfo
from sandboxes.models import Sandbox, SandboxLogEntry, SandboxState, Template
from sandboxes.paths import path_base64, path_shown


def sandbox_shown(sandbox: Sandbox) -> dict[str, Any]:
    """The fields of CONTRACT 7. `created_at` is when it became the tenant's: a warm one was made before."""
    template = sandbox.template
    return {
        "vm_id": sandbox.public_id,
        "sandbox_id": sandbox.public_id,
        "state": str(sandbox.state),
        "template": template.name,
        "vcpu": float(template.vcpu),
        "cpu_fraction": float(template.vcpu),
        "memory_mib": template.memory_mib,
        "created_at": time_text(sandbox.claimed_at or sandbox.created_at),
        "expires_at": time_text(sandbox.expires_at),
        "metadata": sandbox.metadata,
    }


def sandbox_detailed(sandbox: Sandbox) -> dict[str, Any]:
    """With what keeps it alive, or what it died of. Asks a running one's guest, at most 1 s."""
    return sandbox_shown(sandbox) | {
        "disk_mib": sandbox.template.disk_mib,
        "idle_timeout_seconds": sandbox.idle_timeout_seconds,
        "max_lifetime_seconds": sandbox.max_lifetime_seconds,
        "last_active_at": time_text(sandbox.last_active_at),
        "ready_at": time_text(sandbox.ready_at),
        "destroyed_at": time_text(sandbox.destroyed_at),
        "workspace": sandbox.workspace.name if sandbox.workspace is not None else None,
        "snapshot_id": _started_from(sandbox),
        "queue_position": queue_position(sandbox),
        "death": death_shown(sandbox),
        **alive_shown(alive_look(sandbox)),
    }


def _started_from(sandbox: Sandbox) -> str | None:
    """A workspace's own versions have no id that anybody could use."""
    snapshot = sandbox.snapshot
    return None if snapshot is None or snapshot.is_version else snapshot.public_id


def alive_shown(alive: Alive | None) -> dict[str, Any]:
    """Why it lives and when it ends if nothing more happens; all null once it is over."""
    return {
        "alive_because": None if alive is None else alive.reason,
        "alive_detail": None if alive is None else alive.text,
        "alive_since": None if alive is None else time_text(alive.since),
        "ends_at": None if alive is None else time_text(alive.ends_at),
    }


def death_shown(sandbox: Sandbox) -> dict[str, Any] | None:
    """`None` while it lives."""
    if sandbox.state not in (SandboxState.STOPPING, SandboxState.DESTROYED):
        return None
    evidence = {
        "exit_code": None,
        "oom": False,
        "oom_kills": None,
        "memory_peak_mib": None,
        "memory_curve": [],
        "last_output": "",
    } | sandbox.death
    return {"reason": sandbox.death_reason, "detail": sandbox.death_detail, **evidence}


def completed_shown(completed: Completed) -> dict[str, Any]:
    return {
        "exit_code": completed.exit_code,
        "stdout": completed.stdout.decode(errors="replace"),
        "stderr": completed.stderr.decode(errors="replace"),
        "duration_ms": completed.duration_ms,
        "truncated": completed.truncated,
        "oom": completed.oom,
    }


def file_shown(info: FileInfo) -> dict[str, Any]:
    return {
        "name": path_shown(info.name),
        "name_base64": path_base64(info.name),
        "path": path_shown(info.path),
        "type": info.type,
        "size": info.size,
        "mode": f"{info.mode:04o}",
        "modified_at": time_text(_moment(info.mtime)),
    }


def _moment(timestamp: float) -> dt.datetime:
    """A file's time may be anything; what no calendar has is shown as 1970."""
    try:
        return dt.datetime.fromtimestamp(timestamp, dt.UTC)
    except (ValueError, OverflowError, OSError):
        return dt.datetime.fromtimestamp(0, dt.UTC)


def log_entry_shown(entry: SandboxLogEntry) -> dict[str, Any]:
    return {
        "id": entry.pk,
        "at": time_text(entry.at),
        "process_id": entry.process_id,
        "command": entry.command,
        "exit_code": entry.exit_code,
        "output": entry.output,
    }


def template_shown(template: Template, soft_limits: list[str], available: set[str]) -> dict[str, Any]:
    return {
        "name": template.name,
        "description": template.description,
        "vcpu": float(template.vcpu),
        "memory_mib": template.memory_mib,
        "disk_mib": template.disk_mib,
        "agents": template.agents,
        "available": template.name in available,
        "soft_limits": soft_limits,
    }

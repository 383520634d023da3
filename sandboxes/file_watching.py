"""Changes in a folder of a sandbox as server-sent events, until the caller or the sandbox is gone.

A frozen guest says nothing and a dead one cannot: why a watch ends is read from the sandbox's row.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import structlog

from e2a.core.errors import E2AError
from e2a.core.problems import problem
from e2a.core.requests import request_id_var
from e2a.core.threads import in_thread
from sandboxes.guest_client import FileChange
from sandboxes.models import Sandbox, SandboxState
from sandboxes.paths import path_base64, path_shown
from sandboxes.streams import KEEP_ALIVE_SECONDS, Slotted

log = structlog.get_logger(__name__)

LOOK_SECONDS = 2.0
"""How often a quiet watch asks whether its sandbox still runs; one query."""
_LOOKS_AFTER_THE_END = 5


def change_shown(change: FileChange) -> dict[str, Any]:
    """As the API shows it. A path that is not UTF-8 has U+FFFD where it is not, and its bytes beside it."""
    shown: dict[str, Any] = {"type": change.kind}
    if change.path:
        shown["path"] = path_shown(change.path)
        if (raw := path_base64(change.path)) is not None:
            shown["path_base64"] = raw
    if change.kind in ("created", "modified", "deleted", "moved"):
        shown["is_directory"] = change.is_directory
    if change.source:
        shown["from"] = path_shown(change.source)
    if change.reason:
        shown["reason"] = change.reason
    return shown


async def change_events(sandbox: Sandbox, slotted: Slotted[FileChange]) -> AsyncIterator[bytes]:
    """The events; the last is `end` with its `reason` (`paused`, a cause of death, `path_gone`,
    `too_many_folders`), or `error` when it broke and the sandbox runs."""
    quiet = 0.0
    try:
        async for change in slotted.items(silence_seconds=LOOK_SECONDS):
            if change is not None:
                quiet = 0.0
                yield _event(change_shown(change))
                continue
            if (reason := await in_thread(_why_over, sandbox.pk)) is not None:
                yield _event({"type": "end", "reason": reason})
                return
            quiet += LOOK_SECONDS
            if quiet >= KEEP_ALIVE_SECONDS:
                quiet = 0.0
                yield b": keep-alive\n\n"
    except E2AError as error:
        reason = await _why_broken(sandbox)
        if reason is not None:
            yield _event({"type": "end", "reason": reason})
            return
        log.warning("watch.failed", sandbox=sandbox.public_id, code=error.code, detail=error.detail)
        yield _event({"type": "error", **problem(error, request_id=request_id_var.get())})


def _why_over(sandbox_pk: int) -> str | None:
    """`None` while it runs; `paused`, or what it died of."""
    row = Sandbox.objects.filter(pk=sandbox_pk).only("state", "death_reason").first()
    if row is None or row.state in (SandboxState.STOPPING, SandboxState.DESTROYED):
        return str(row.death_reason) if row is not None and row.death_reason else "destroyed"
    return "paused" if row.state == SandboxState.PAUSED else None


async def _why_broken(sandbox: Sandbox) -> str | None:
    """As `_why_over`, for a connection that broke: the row may learn of it a moment later."""
    for _ in range(_LOOKS_AFTER_THE_END):
        if (reason := await in_thread(_why_over, sandbox.pk)) is not None:
            return reason
        await asyncio.sleep(LOOK_SECONDS / 2)
    return None


def _event(document: dict[str, Any]) -> bytes:
    return f"event: {document['type']}\ndata: {json.dumps(document)}\n\n".encode()

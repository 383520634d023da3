"""How a node asks a guest of its own host: straight over the guest's socket, without key or gateway."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import h11

from e2a.core.errors import GuestError, GuestUnreachable
from sandboxes.gateway.guest_socket import GuestBusy, NoGuest, NoSuchSandbox, guest_connect
from sandboxes.guest_client.shapes import GuestHealth, GuestStats, guest_health, guest_stats

LARGEST_ANSWER_BYTES = 64 * 1024
_READ_BYTES = 16 * 1024


def probe_health(sandboxes_folder: Path, sandbox_id: str, *, timeout_seconds: float = 2.0) -> GuestHealth:
    """Raises GuestUnreachable when it does not listen or is silent, GuestError when it answers nonsense."""
    return guest_health(_get(sandboxes_folder, sandbox_id, "/health", timeout_seconds))


def probe_stats(sandboxes_folder: Path, sandbox_id: str, *, timeout_seconds: float = 1.0) -> GuestStats:
    """Raises as `probe_health`."""
    return guest_stats(_get(sandboxes_folder, sandbox_id, "/stats", timeout_seconds))


def _get(sandboxes_folder: Path, sandbox_id: str, target: str, timeout_seconds: float) -> dict[str, Any]:
    give_up_at = time.monotonic() + timeout_seconds
    try:
        connection = guest_connect(sandboxes_folder, sandbox_id)
    except (NoSuchSandbox, NoGuest, GuestBusy) as error:
        raise GuestUnreachable(f"sandbox {sandbox_id}: {error or type(error).__name__}") from error
    http = h11.Connection(h11.CLIENT)
    request = h11.Request(method="GET", target=target, headers=[("host", "guest"), ("connection", "close")])
    body = b""
    status = 0
    with connection:
        try:
            connection.settimeout(timeout_seconds)
            connection.sendall((http.send(request) or b"") + (http.send(h11.EndOfMessage()) or b""))
            while not isinstance(event := http.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    connection.settimeout(max(0.001, give_up_at - time.monotonic()))
                    http.receive_data(connection.recv(_READ_BYTES))
                elif isinstance(event, h11.Response):
                    status = event.status_code
                elif isinstance(event, h11.Data):
                    body += event.data
                elif isinstance(event, h11.ConnectionClosed):
                    break
                if len(body) > LARGEST_ANSWER_BYTES:
                    raise GuestError(f"sandbox {sandbox_id}: its answer is too long", code="bad_answer")
        except (OSError, h11.RemoteProtocolError) as error:
            raise GuestUnreachable(f"sandbox {sandbox_id}: no answer to GET {target}: {error}") from error
    try:
        answer = json.loads(body)
    except ValueError as error:
        raise GuestError(f"sandbox {sandbox_id}: its answer is no JSON", code="bad_answer") from error
    if status != 200 or not isinstance(answer, dict):
        raise GuestError(f"sandbox {sandbox_id}: GET {target} gave {status}", code="bad_answer")
    return answer

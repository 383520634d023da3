"""How a node asks a guest of its own host: straight over the guest's socket, without key or gateway."""

from __future__ import annotations

import json
import secrets
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


def probe_run(
    sandboxes_folder: Path, sandbox_id: str, command: str, *, timeout_seconds: float = 10.0
) -> int | None:
    """Run a shell command as the sandbox's user and wait for its end: its exit code, 124 after `timeout_seconds`.

    None when nobody knows. Raises as `probe_health`, and GuestUnreachable when it does not end.
    """
    process_id = f"probe-{secrets.token_hex(8)}"
    body = {"id": process_id, "command": command, "timeout_seconds": timeout_seconds}
    give_up_at = time.monotonic() + timeout_seconds + 5.0
    found = _ask(sandboxes_folder, sandbox_id, "POST", "/processes", 5.0, body)
    while found["state"] == "running":
        if time.monotonic() > give_up_at:
            raise GuestUnreachable(f"sandbox {sandbox_id}: a command does not end")
        time.sleep(0.02)  # Its commands take milliseconds; following one would need the stream's reader here.
        found = _ask(sandboxes_folder, sandbox_id, "GET", f"/processes/{process_id}", 5.0)
    code = found["exit_code"]
    return None if code is None else int(code)


def _get(sandboxes_folder: Path, sandbox_id: str, target: str, timeout_seconds: float) -> dict[str, Any]:
    return _ask(sandboxes_folder, sandbox_id, "GET", target, timeout_seconds)


def _ask(
    sandboxes_folder: Path,
    sandbox_id: str,
    method: str,
    target: str,
    timeout_seconds: float,
    document: dict[str, Any] | None = None,
) -> dict[str, Any]:
    give_up_at = time.monotonic() + timeout_seconds
    try:
        connection = guest_connect(sandboxes_folder, sandbox_id)
    except (NoSuchSandbox, NoGuest, GuestBusy) as error:
        raise GuestUnreachable(f"sandbox {sandbox_id}: {error or type(error).__name__}") from error
    http = h11.Connection(h11.CLIENT)
    sent = b"" if document is None else json.dumps(document).encode()
    headers = [("host", "guest"), ("connection", "close")]
    if document is not None:
        headers += [("content-type", "application/json"), ("content-length", str(len(sent)))]
    request = h11.Request(method=method, target=target, headers=headers)
    body = b""
    status = 0
    with connection:
        try:
            connection.settimeout(timeout_seconds)
            connection.sendall(http.send(request) or b"")
            if sent:
                connection.sendall(http.send(h11.Data(data=sent)) or b"")
            http.send(h11.EndOfMessage())
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
            raise GuestUnreachable(
                f"sandbox {sandbox_id}: no answer to {method} {target}: {error}"
            ) from error
    try:
        answer = json.loads(body)
    except ValueError as error:
        raise GuestError(f"sandbox {sandbox_id}: its answer is no JSON", code="bad_answer") from error
    if status not in (200, 201) or not isinstance(answer, dict):
        raise GuestError(f"sandbox {sandbox_id}: {method} {target} gave {status}", code="bad_answer")
    return answer

"""`PUT /v1/sandboxes/{id}/files?path=` and `…/archive?path=`, straight over ASGI: pieces go to the guest as they
come, nothing is spooled."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qs

from django.conf import settings

from accounts.principal import Principal
from e2a.core.errors import (
    CallerError,
    DeadlineExceeded,
    E2AError,
    Forbidden,
    GuestError,
    GuestUnreachable,
    NotFound,
    TooLarge,
    Unauthenticated,
    ValidationFailed,
)
from e2a.core.requests import Receive, Scope
from e2a.core.threads import in_thread
from sandboxes.guest_answers import guest_answers, not_running
from sandboxes.guest_client import AsyncGuestClient
from sandboxes.models import Sandbox
from sandboxes.paths import MODE, path_check
from sandboxes.selectors import sandbox_get
from sandboxes.services import sandbox_used, sandbox_wait_running

LARGEST_FILE_BYTES = 512 * 1024 * 1024
UPLOAD_SECONDS = 3600.0
SCOPE = "sandboxes:write"

_ROUTE = re.compile(r"^/v1/sandboxes/([^/]+)/(files|archive)$")


class ClientGone(CallerError):
    """The client left before its body was whole. Nobody reads the answer; the guest keeps the old file."""

    code = "client_gone"
    title = "The client closed the connection"


async def file_put(scope: Scope, receive: Receive, principal: Principal) -> dict[str, Any]:
    """Take the request's body; returns what its answer says, or raises the E2AError that its problem is made of.

    A file appears whole or not at all; of an archive what was unpacked before an error stays. A body over 512 MiB
    is refused (413) by its length, else where it goes over.
    """
    public_id, kind, path, mode = _target(scope)
    size = _length(scope)
    if principal.kind not in ("key", "account"):
        raise Unauthenticated("A valid bearer token is needed.")
    if not principal.has_scope(SCOPE):
        raise Forbidden(f"This key has no scope {SCOPE}.", code="missing_scope")
    sandbox, client = await in_thread(_ready, principal, public_id)
    try:
        answer: dict[str, Any]
        pieces = _pieces(receive)
        if kind == "archive":
            unpacked = await client.archive_write(path, pieces, size=size, deadline_seconds=UPLOAD_SECONDS)
            answer = {"path": unpacked.path, "files": unpacked.files, "size": unpacked.size}
        else:
            written = await client.file_write(
                path, pieces, mode=mode, size=size, deadline_seconds=UPLOAD_SECONDS
            )
            answer = {"path": written.path, "size": written.size}
    except (GuestError, GuestUnreachable, DeadlineExceeded) as error:
        raise await in_thread(_translated, sandbox, error) from error
    except ValueError as error:
        raise CallerError("The body is not as long as Content-Length says.", code="bad_length") from error
    await in_thread(sandbox_used, sandbox)
    return answer


def _target(scope: Scope) -> tuple[str, str, str, int | None]:
    match = _ROUTE.match(scope["path"])
    if match is None:
        raise NotFound("There is no such path.")
    try:
        query = parse_qs(scope["query_string"].decode("ascii"), keep_blank_values=True, errors="strict")
    except ValueError as error:
        raise ValidationFailed.of("path", "bad_path", "The query is not valid UTF-8.") from error
    mode = query.get("mode", [None])[-1]
    if mode is not None and not MODE.fullmatch(mode):
        raise ValidationFailed.of("mode", "invalid_mode", "mode is three or four octal digits.")
    path = path_check(query.get("path", [""])[-1])
    return match[1], match[2], path, None if mode is None else int(mode, 8)


def _length(scope: Scope) -> int | None:
    """The body's declared size, `None` when it comes in chunks. Raises `TooLarge`."""
    headers = {name.lower(): value for name, value in scope["headers"]}
    if b"transfer-encoding" in headers:
        return None
    raw = headers.get(b"content-length", b"0").decode("latin-1")
    if not (raw.isascii() and raw.isdigit()):
        raise ValidationFailed.of("Content-Length", "invalid_length", "Content-Length is not a number.")
    if int(raw) > LARGEST_FILE_BYTES:
        raise TooLarge(f"A file has at most {LARGEST_FILE_BYTES} bytes.")
    return int(raw)


def _ready(principal: Principal, public_id: str) -> tuple[Sandbox, AsyncGuestClient]:
    """The sandbox once it runs, and the way to it. Its node is read here: a row that was read anew while it was
    waited for asks the database again, which async code may not."""
    sandbox = sandbox_get(principal.tenant, public_id)
    sandbox_wait_running(sandbox)
    sandbox_used(sandbox)
    if sandbox.node is None:
        raise not_running(sandbox)
    return sandbox, AsyncGuestClient(sandbox.public_id, sandbox.node.address, settings.E2A.node_key)


def _translated(sandbox: Sandbox, error: E2AError) -> E2AError:
    try:
        with guest_answers(sandbox):
            raise error
    except E2AError as answer:
        return answer


async def _pieces(receive: Receive) -> AsyncIterator[bytes]:
    """The body as it comes; the server reads on only when the guest has taken the last piece."""
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("The client closed the connection before its body was whole.")
        piece = message.get("body", b"")
        size += len(piece)
        if size > LARGEST_FILE_BYTES:
            raise TooLarge(f"A file has at most {LARGEST_FILE_BYTES} bytes.")
        if piece:
            yield piece
        if not message.get("more_body"):
            return

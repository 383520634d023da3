"""ASGI, before Django: a `/v1` body is neither read nor spooled until its size and its sender are known (CONTRACT 1).

Django's handler writes the whole body to a spooled file before any view runs. So the 1 MiB cap, the credential and the
streamed uploads are decided here, from the request's head.
"""

from __future__ import annotations

import json
import re
from typing import Any

import structlog

from e2a.core.errors import E2AError, OurError, TooLarge, ValidationFailed
from e2a.core.problems import CONTENT_TYPE, problem, problem_headers
from e2a.core.requests import ASGIApp, Receive, Scope, Send, forwarded_address
from e2a.core.threads import in_thread
from keys.authentication import principal_for_bearer
from sandboxes.upload import file_put

log = structlog.get_logger(__name__)

BODY_LIMIT = 1024 * 1024
_OPEN_PATHS = frozenset({"/v1/auth/login", "/v1/auth/verify-otp", "/v1/auth/refresh"})
_UPLOAD = re.compile(r"^/v1/sandboxes/([^/]+)/files$")


def _header(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]


def _declared_length(scope: Scope) -> int | None:
    """The body's size as declared; `None` when it is chunked. Raises `ValidationFailed` for nonsense."""
    lengths = _header(scope, b"content-length")
    if _header(scope, b"transfer-encoding"):
        return None
    if not lengths:
        return 0
    if len(set(lengths)) != 1 or not lengths[0].isascii() or not lengths[0].isdigit():
        raise ValidationFailed.of("Content-Length", "invalid_length", "Content-Length is not a number.")
    return int(lengths[0])


class BodyGate:
    """Refuses too large bodies (413) and bodies without a valid credential (401) from the head alone."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        try:
            await self._guarded(scope, receive, send)
        except E2AError as error:
            await send_problem(scope, send, error)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        length = _declared_length(scope)
        upload = _UPLOAD.match(path) if scope["method"] == "PUT" else None
        if upload is None and length is not None and length > BODY_LIMIT:
            raise TooLarge("The body is over 1 MiB.")
        if length != 0 and path not in _OPEN_PATHS:
            scope["e2a.principal"] = await in_thread(_principal, scope)
        if upload is not None:
            if "e2a.principal" not in scope:
                scope["e2a.principal"] = await in_thread(_principal, scope)
            await file_put(scope, receive, send, scope["e2a.principal"])
            return
        if length is not None:
            await self.app(scope, receive, send)
            return
        body = await _read_capped(receive)
        await self.app(scope, _replayed(body, receive), send)


def _principal(scope: Scope) -> Any:
    """Who sends this. Raises `Unauthenticated`, and `RateLimited` for an address that keeps failing."""
    authorization = _header(scope, b"authorization")
    peer = scope["client"][0] if scope.get("client") else ""
    address = forwarded_address(peer, ", ".join(_header(scope, b"x-forwarded-for")))
    return principal_for_bearer(authorization[0] if len(authorization) == 1 else None, address=address)


async def _read_capped(receive: Receive) -> bytes:
    """A body of undeclared size, at most 1 MiB of it. Raises `TooLarge`."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b""
        part = message.get("body", b"")
        size += len(part)
        if size > BODY_LIMIT:
            raise TooLarge("The body is over 1 MiB.")
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    state = {"sent": False}

    async def replay() -> dict[str, Any]:
        if state["sent"]:
            return await receive()
        state["sent"] = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def send_problem(scope: Scope, send: Send, error: E2AError) -> None:
    """Answer `error` as problem+json, straight over ASGI."""
    if isinstance(error, OurError):
        log.error("request.failed", exc_info=error, path=scope["path"])
    body = json.dumps(problem(error, request_id=scope.get("e2a.request_id", ""))).encode()
    headers = [(b"content-type", CONTENT_TYPE.encode()), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in problem_headers(error).items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

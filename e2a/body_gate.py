"""ASGI, before Django: a `/v1` body is neither read nor spooled until its size and its sender are known (CONTRACT 1).

Django's handler writes the whole body to a spooled file before any view runs. So the 1 MiB cap, the credential and the
streamed uploads are decided here, from the request's head.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

from e2a.core.decided import DECIDED
from e2a.core.errors import E2AError, TooLarge, ValidationFailed
from e2a.core.requests import ASGIApp, Receive, Scope, Send, forwarded_address
from e2a.core.threads import in_thread
from keys.authentication import principal_for_bearer
from sandboxes.upload import file_put

BODY_LIMIT = 1024 * 1024
_OPEN_PATHS = frozenset({"/v1/auth/login", "/v1/auth/verify-otp", "/v1/auth/refresh"})
_UPLOAD = re.compile(r"^/v1/sandboxes/([^/]+)/(?:files|archive)$")


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
            decided: bytes | dict[str, Any] | E2AError | None = await self._guarded(scope, receive)
        except E2AError as error:
            decided = error
        if isinstance(decided, bytes):
            await self.app(_measured(scope, len(decided)), _replayed(decided, receive), send)
        elif decided is None:
            await self.app(scope, receive, send)
        else:
            # Through Django all the same, for the headers that every answer has; `DecidedMiddleware` gives it.
            scope[DECIDED] = decided
            await self.app(scope, _replayed(b"", _nothing), send)

    async def _guarded(self, scope: Scope, receive: Receive) -> bytes | dict[str, Any] | None:
        """The body where it had to be read, the answer where it is known already, else `None`."""
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
            return await file_put(scope, receive, scope["e2a.principal"])
        return None if length is not None else await _read_capped(receive)


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


def _measured(scope: Scope, length: int) -> Scope:
    """The request as if it had said its length: Django REST framework takes a body without one for none."""
    kept = [
        pair for pair in scope["headers"] if pair[0].lower() not in (b"transfer-encoding", b"content-length")
    ]
    return scope | {"headers": [*kept, (b"content-length", str(length).encode())]}


def _replayed(body: bytes, receive: Receive) -> Receive:
    state = {"sent": False}

    async def replay() -> dict[str, Any]:
        if state["sent"]:
            return await receive()
        state["sent"] = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _nothing() -> dict[str, Any]:
    """Say no more: what was not read stays unread."""
    await asyncio.Event().wait()
    raise AssertionError("nobody sets this event")

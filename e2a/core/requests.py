"""What every request carries: an id, and the address it came from."""

from __future__ import annotations

import contextvars
import re
from collections.abc import Awaitable, Callable
from typing import Any

from django.conf import settings
from django.http import HttpRequest

from e2a.core.ids import new_id

request_id_var: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")

Scope = dict[str, Any]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

_FORWARDED_ADDRESS = re.compile(r"^[0-9A-Fa-f:.]{2,45}$")


class RequestIdMiddleware:
    """ASGI: gives each HTTP request an id, binds it to the log's context and answers it as `X-Request-Id`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        request_id = new_id("req")
        scope["e2a.request_id"] = request_id
        token = request_id_var.set(request_id)

        async def send_with_id(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            request_id_var.reset(token)


def request_id(request: HttpRequest) -> str:
    """The id of this request; a fresh one where no ASGI server gave it one (the test client)."""
    scope = getattr(request, "scope", None)
    if scope is not None and "e2a.request_id" in scope:
        return str(scope["e2a.request_id"])
    if not hasattr(request, "_e2a_request_id"):
        request._e2a_request_id = new_id("req")  # type: ignore[attr-defined]
    return str(request._e2a_request_id)  # type: ignore[attr-defined]


def client_address(request: HttpRequest) -> str:
    """The caller's IP: the Nth `X-Forwarded-For` entry from the right with `TRUSTED_PROXIES=N`; N=0 ignores it."""
    return forwarded_address(
        request.META.get("REMOTE_ADDR", "") or "", request.META.get("HTTP_X_FORWARDED_FOR", "") or ""
    )


def forwarded_address(peer: str, forwarded_for: str) -> str:
    """As `client_address`, of the two raw values. A short or malformed chain counts as the peer itself."""
    proxies = settings.E2A.trusted_proxies
    if proxies < 1:
        return peer
    hops = [hop.strip() for hop in forwarded_for.split(",") if hop.strip()]
    if len(hops) < proxies or not _FORWARDED_ADDRESS.match(hops[-proxies]):
        return peer
    return hops[-proxies]

"""ASGI, before everything else: by its `Host` a request is for a preview or for us, and never for the other."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from typing import Any, Final

import structlog

from e2a.core import errors
from e2a.core.clock import now
from e2a.core.requests import ASGIApp, Receive, Scope, Send
from e2a.core.threads import in_thread
from sandboxes.activity import viewer_attached
from sandboxes.models import UNREADY_STATES
from sandboxes.preview import access
from sandboxes.preview.headers import (
    COOKIE,
    PLAIN_COOKIE,
    cookie_headers,
    cookies_named,
    token_of,
    without_token,
)
from sandboxes.preview.hosts import PreviewHost, preview_host
from sandboxes.preview.refusals import answered, refusal
from sandboxes.socket_access import AttachRefused, running_client, sandbox_row

log = structlog.get_logger("e2a.preview")

READY_SECONDS: Final = 30.0
CHECK_SECONDS: Final = 2.0
TOUCH_SECONDS: Final = 30.0
REQUESTS_PER_SANDBOX: Final = 100
"""At once, in one web process; below the guest's own limit of tunnels."""
REQUESTS_AT_ONCE: Final = 1000
_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})

_open: dict[str, int] = {}


class PreviewGate:
    """Sends each request where its host belongs."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        ours, previews = 0, []
        for host in hosts:
            try:
                previews.append(preview_host(host))
            except LookupError:
                ours += 1
        if not previews:
            await self.app(scope, receive, send)
        elif len(hosts) > 1 or previews[0] is None:
            missing = errors.NotFound("There is no such preview.")
            await refuse(scope, send, missing, port=None)
        else:
            await _Visit(previews[0], scope, receive, send).serve()


async def refuse(scope: Scope, send: Send, error: errors.E2AError, *, port: int | None) -> None:
    """Answer ourselves; a WebSocket's handshake as well."""
    status, headers, body = refusal(scope, error, port=port)
    kind = "http.response" if scope["type"] == "http" else "websocket.http.response"
    await send({"type": f"{kind}.start", "status": status, "headers": headers})
    await send({"type": f"{kind}.body", "body": b"" if scope.get("method") == "HEAD" else body})


class _Visit:
    """One request, or one WebSocket, from its token to its last byte."""

    def __init__(self, preview: PreviewHost, scope: Scope, receive: Receive, send: Send) -> None:
        self.preview = preview
        self.scope = scope
        self.receive = receive
        self.send = send
        self.status = 0

    async def serve(self) -> None:
        started = time.monotonic()
        try:
            await self._serve()
        except Exception as error:
            told = answered(error, self.preview) if not isinstance(error, errors.AccessError) else error
            if told.status == 500:
                log.exception("preview.broken", sandbox=self.preview.sandbox_id, exc_info=error)
            if not self.status:
                self.status = told.status
                await refuse(self.scope, self.send, told, port=self.preview.port)
            else:
                log.info("preview.cut", sandbox=self.preview.sandbox_id, error=str(error)[:200])
        finally:
            log.info(
                "preview",
                sandbox=self.preview.sandbox_id,
                port=self.preview.port,
                method=self.scope.get("method", "WEBSOCKET"),
                status=self.status,
                ms=round((time.monotonic() - started) * 1000, 1),
            )

    async def _serve(self) -> None:
        headers: list[tuple[bytes, bytes]] = list(self.scope["headers"])
        token, in_address = token_of(self.scope["query_string"], headers)
        names = (COOKIE,) if self.preview.is_secure else (COOKIE, PLAIN_COOKIE)
        cookies = [value for name in names for value in cookies_named(headers, name)]
        grant = await in_thread(access.preview_grant, self.preview, token=token, cookies=cookies)
        if grant.by_cookie:
            self._same_origin(headers)
        if in_address and self.scope.get("method") in ("GET", "HEAD"):
            await self._enter(grant)
            return
        sandbox_id = self.preview.sandbox_id
        if _open.get(sandbox_id, 0) >= REQUESTS_PER_SANDBOX or sum(_open.values()) >= REQUESTS_AT_ONCE:
            raise errors.Unavailable("Too many previews are open at once.", code="busy", retry_after=1)
        _open[sandbox_id] = _open.get(sandbox_id, 0) + 1
        try:
            await self._while_allowed(grant, self._carry(grant))
        finally:
            _open[sandbox_id] -= 1
            if not _open[sandbox_id]:
                del _open[sandbox_id]

    def _same_origin(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Another site's page may not act with the cookie: neither open sockets, nor change anything.

        Raises `Forbidden`. Neighbouring previews are other tenants', whatever a browser calls "the same site".
        """
        if self.scope["type"] == "http" and self.scope["method"] in _SAFE:
            return
        origins = [value.decode("latin-1") for name, value in headers if name == b"origin"]
        if any(origin != self.preview.origin for origin in origins):
            raise errors.Forbidden("A page of another origin may not do this here.", code="forbidden_origin")

    async def _enter(self, grant: access.PreviewGrant) -> None:
        """The token becomes a cookie, and goes out of the address bar, the history and every `Referer`."""
        value, seconds = grant.cookie()
        query = without_token(self.scope["query_string"])
        path = self.scope.get("raw_path") or b"/"
        location = self.preview.origin.encode() + path + (b"?" + query if query else b"")
        self.status = 303
        await self.send(
            {
                "type": "http.response.start",
                "status": 303,
                "headers": [
                    (b"location", location),
                    (b"content-length", b"0"),
                    (b"cache-control", b"no-store"),
                    (b"referrer-policy", b"no-referrer"),
                    *cookie_headers(value, preview=self.preview, seconds=seconds),
                ],
            }
        )
        await self.send({"type": "http.response.body", "body": b""})

    async def _carry(self, grant: access.PreviewGrant) -> None:
        from sandboxes.preview import http, websocket

        client = await self._client(grant)
        carry = http.carry if self.scope["type"] == "http" else websocket.carry
        await carry(client, self.preview, self.scope, self.receive, self._send_noted)

    async def _client(self, grant: access.PreviewGrant) -> Any:
        """Wait, holding nothing, until the sandbox is made; a paused one is resumed."""
        give_up_at, pause = time.monotonic() + READY_SECONDS, 0.02
        sandbox = await in_thread(sandbox_row, grant.sandbox_pk)
        while sandbox.state in UNREADY_STATES:
            if time.monotonic() > give_up_at:
                raise errors.Unavailable(f"The sandbox is still {sandbox.state}.", code="sandbox_not_ready")
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.25)
            sandbox = await in_thread(sandbox_row, grant.sandbox_pk)
        return await in_thread(running_client, sandbox)

    async def _send_noted(self, message: dict[str, Any]) -> None:
        if message["type"].endswith("response.start"):
            self.status = message["status"]
        elif message["type"] == "websocket.accept":
            self.status = 101
        await self.send(message)

    async def _while_allowed(self, grant: access.PreviewGrant, work: Coroutine[Any, Any, None]) -> None:
        """Do `work`; cut it when what was shown holds no longer. It counts as use of the sandbox all the while."""
        working = asyncio.create_task(work)
        touched = time.monotonic()
        try:
            while not (await asyncio.wait({working}, timeout=CHECK_SECONDS))[0]:
                if now() > grant.until:
                    raise errors.Unauthenticated("The token has expired.")
                try:
                    await in_thread(access.preview_standing, grant)
                except AttachRefused as refused:
                    raise answered(refused, self.preview) from refused
                if time.monotonic() - touched > TOUCH_SECONDS:
                    touched = time.monotonic()
                    await in_thread(viewer_attached, grant.sandbox_pk, "preview", f"{id(self):x}")
        finally:
            if not working.done():
                working.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await working
        working.result()

"""A call with a secret that stays outside (`inject`): the program names the host, the broker speaks TLS with it and
adds the header. What comes back passes a redactor of the value."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any, Final

from django.conf import settings
from django.db import DatabaseError

from e2a.core.outbound_async import StreamedAnswer
from sandboxes.gateway.egress_proxy import HOP_BY_HOP
from sandboxes.guest.redaction import Redactor
from sessions_app.broker.admission import Injection, Injections, injections_for
from sessions_app.broker.exchange import Denied, Exchange, Gone, Headers, log

METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""Not TRACE, whose answer is the request."""
_REST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+):([0-9]{1,5})(/.*)", re.ASCII | re.DOTALL)
_OURS: Final = frozenset(b"host content-length accept-encoding".split())


class InjectedCall(Exchange):
    """`/<sandbox>/to/<host>:<port>/<path>`, any method; `rest` is `<host>:<port>/<path>`. The gateway has found that
    the sandbox's egress rules allow the host."""

    def __init__(self, *args: Any, rest: str) -> None:
        super().__init__(*args)
        self._match = _REST.fullmatch(rest)

    def refusal(self, denied: Denied) -> bytes:
        return json.dumps({"code": denied.kind, "detail": denied.text}).encode() + b"\n"

    async def serve(self) -> None:
        match, method = self._match, self.scope["method"]
        if match is None or method not in METHODS:
            raise Denied(400, "bad_request", "This is http://gateway.e2a/<host>/<path>.")
        host, port = match[1].strip("[]"), int(match[2])
        try:
            found = await self.broker.in_database(
                lambda: injections_for(self.sandbox_id, self.broker.injections)
            )
        except DatabaseError as error:
            log.error("broker.database", error=str(error)[:200])
            raise Denied(503, "overloaded", "The database does not answer.") from None
        # One header of a name: that of the bundle that was named first.
        by_name: dict[str, Injection] = {}
        for one in found.all:
            if one.is_for(host, port):
                by_name.setdefault(one.header.lower(), one)
        used = list(by_name.values())
        if not used:
            raise Denied(403, "not_injected", f"No secret of this sandbox is injected for {host}:{port}.")
        given = dict(self.scope["headers"])
        has_body = b"transfer-encoding" in given or given.get(b"content-length", b"0") != b"0"
        call = self._call(method, host, port, match[3], used, found, has_body=has_body)
        # A body is read by the call itself, which sees there that its program leaves.
        await (call if has_body else self.until_left(call))

    async def _call(
        self,
        method: str,
        host: str,
        port: int,
        path: str,
        used: list[Injection],
        found: Injections,
        *,
        has_body: bool,
    ) -> None:
        query = self.scope["query_string"].decode("latin-1")
        named = {one.header.lower().encode() for one in used}
        headers: Headers = [
            (name, value)
            for name, value in self.scope["headers"]
            if name not in named
            and name not in _OURS
            and name not in HOP_BY_HOP
            and not name.startswith(b"x-e2a-")
        ]
        headers += [(one.header.encode(), one.value.encode()) for one in used]
        length = dict(self.scope["headers"]).get(b"content-length")
        allowed: frozenset[str] = settings.E2A.egress_allow_private
        with self.failures(host, what="The host"):
            async with self.broker.pool_for(allowed, any_port=True).stream(
                method,
                scheme="https",
                host=host,
                port=port,
                target=f"{path}?{query}" if query else path,
                headers=headers,
                body=self._sent() if has_body else b"",
                length=None if length is None else int(length),
            ) as answer:
                passing = self._pass_on(answer, found, is_head=method == "HEAD")
                await (self.until_left(passing) if has_body else passing)

    async def _sent(self) -> AsyncIterator[bytes]:
        """The program's body, as it comes."""
        while True:
            message = await self.hear()
            if message["type"] == "http.disconnect":
                raise Gone
            if piece := message.get("body", b""):
                yield piece
            if not message.get("more_body"):
                return

    async def _pass_on(self, answer: StreamedAnswer, found: Injections, *, is_head: bool) -> None:
        headers: Headers = []
        for name, value in answer.headers:
            if name in HOP_BY_HOP or (name == b"content-length" and not is_head):
                continue  # What is redacted has another length.
            headers.append((name, found.patterns.redact(value)))
        await self.begin(answer.status, headers)
        redactor = Redactor(found.patterns)
        async for piece in answer.chunks:
            await self.more(redactor.feed(piece))
        await self.end(redactor.end())

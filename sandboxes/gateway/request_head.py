"""One request, read strictly by h11 and written anew for the guest. No I/O.

Only what a client of ours sends is taken: HTTP/1.1, four methods, a body by length or in chunks and never
both, one request a connection. The head for the guest is built from the parsed parts, so no byte that h11 did
not understand, no hop-by-hop header and no signature reaches it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import h11

from sandboxes.gateway.signing import CHUNKED, SIGNATURE_HEADERS

LARGEST_HEAD_BYTES = 16 * 1024

TUNNEL = "e2a-tunnel"
"""The one protocol that a request may switch to (PROTOCOL.md of the guest)."""

_TARGET = re.compile(r"/sandboxes/(?P<sandbox>[^/?]{1,80})(?P<guest_target>/[\x21-\x7e]*)")
_METHODS = frozenset({"GET", "PUT", "POST", "DELETE"})
_NOT_PASSED_ON = SIGNATURE_HEADERS | {
    "host",
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authorization",
    "authorization",
    "cookie",
    "te",
    "trailer",
    "upgrade",
    "expect",
    "content-length",
    "transfer-encoding",
}


class HeadRefused(Exception):
    """The request is not one we take. The detail is safe to show."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail


@dataclass(frozen=True, slots=True)
class RequestHead:
    """A request that is well formed; whether its sender may ask is for the signature to say."""

    method: str
    target: str
    headers: Mapping[str, str]
    length: str
    """Content-Length as sent, `0` without a body, or `CHUNKED`."""
    waits_for_100: bool
    is_tunnel: bool = False
    """It asks to switch to bytes both ways: what follows the head is no body, and has no end of its own."""

    def sandbox_and_target(self) -> tuple[str, str]:
        """The sandbox that is meant and what to ask its guest.

        Raises HeadRefused (404) for any other path.
        """
        found = _TARGET.fullmatch(self.target)
        if found is None:
            raise HeadRefused(404, "not_found", "there is nothing at this path")
        return found["sandbox"], found["guest_target"]

    def for_guest(self, guest_target: str) -> bytes:
        """The head that the guest gets."""
        lines = [f"{self.method} {guest_target} HTTP/1.1", "host: guest"]
        lines += ["connection: upgrade", f"upgrade: {TUNNEL}"] if self.is_tunnel else ["connection: close"]
        lines += [f"{name}: {value}" for name, value in self.headers.items() if name not in _NOT_PASSED_ON]
        if self.length == CHUNKED:
            lines.append("transfer-encoding: chunked")
        elif self.length != "0" or self.method in {"PUT", "POST"}:
            lines.append(f"content-length: {self.length}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class RequestReader:
    """Feed bytes, take the head, then the body as it must be written to the guest."""

    def __init__(self) -> None:
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=LARGEST_HEAD_BYTES)
        self._received = 0
        self._head: RequestHead | None = None
        self._tunnelled = b""
        self.is_complete = False
        """All of the request was seen."""

    def feed(self, data: bytes) -> None:
        """Raises HeadRefused for bytes after the end of the request: one a connection."""
        self._received += len(data)
        if self._head is not None and self._head.is_tunnel:
            self._tunnelled += data
            return
        if self.is_complete:
            raise HeadRefused(400, "bad_request", "more than one request on a connection")
        self._http.receive_data(data)

    def head(self) -> RequestHead | None:
        """The head, None while it is not all there. Raises HeadRefused."""
        event = self._event()
        if event is h11.NEED_DATA:
            return None
        if not isinstance(event, h11.Request):
            raise HeadRefused(400, "bad_request", "this is not a request")
        if self._received - len(self._http.trailing_data[0]) > LARGEST_HEAD_BYTES:
            raise HeadRefused(431, "head_too_large", f"the head has more than {LARGEST_HEAD_BYTES} bytes")
        self._head = _checked(event, waits_for_100=self._http.they_are_waiting_for_100_continue)
        if self._head.is_tunnel:
            self._tunnelled = self._http.trailing_data[0]
            self.is_complete = True
        return self._head

    def body(self) -> bytes:
        """What has arrived since the last call, framed for the guest.

        Raises HeadRefused when the framing is broken.
        """
        assert self._head is not None
        if self._head.is_tunnel:
            return self._raw()
        chunked = self._head.length == CHUNKED
        parts: list[bytes] = []
        while not self.is_complete:
            event = self._event()
            if isinstance(event, h11.Data):
                parts += (b"%x\r\n" % len(event.data), event.data, b"\r\n") if chunked else (event.data,)
            elif isinstance(event, h11.EndOfMessage):
                self.is_complete = True
                if chunked:
                    parts.append(b"0\r\n\r\n")
                if self._http.trailing_data[0]:
                    raise HeadRefused(400, "bad_request", "more than one request on a connection")
            else:
                break
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _raw(self) -> bytes:
        data, self._tunnelled = self._tunnelled, b""
        return data

    def _event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        try:
            return self._http.next_event()
        except h11.RemoteProtocolError as error:
            status = error.error_status_hint
            if status == 431:
                raise HeadRefused(
                    431, "head_too_large", f"the head has more than {LARGEST_HEAD_BYTES} bytes"
                ) from None
            raise HeadRefused(status, "bad_request", "the request is malformed") from error


def _checked(request: h11.Request, *, waits_for_100: bool) -> RequestHead:
    if request.http_version != b"1.1":
        raise HeadRefused(505, "bad_request", "only HTTP/1.1 is spoken here")
    method = request.method.decode("ascii")
    if method not in _METHODS:
        raise HeadRefused(
            405, "method_not_allowed", f"the method is not one of {', '.join(sorted(_METHODS))}"
        )
    headers: dict[str, str] = {}
    for raw_name, raw_value in request.headers:
        name = raw_name.decode("ascii")
        if name in headers:
            raise HeadRefused(400, "bad_request", f"the header {name} is there twice")
        headers[name] = raw_value.decode("latin-1")
    if "transfer-encoding" in headers:
        if "content-length" in headers:
            raise HeadRefused(400, "bad_request", "a length and chunks exclude each other")
        length = CHUNKED
    else:
        length = headers.get("content-length", "0")
    is_tunnel = (
        headers.get("upgrade", "").lower() == TUNNEL and "upgrade" in headers.get("connection", "").lower()
    )
    if is_tunnel and (length != "0" or method != "POST"):
        raise HeadRefused(400, "bad_request", "a tunnel is asked for with POST, without a body")
    return RequestHead(
        method=method,
        target=request.target.decode("ascii"),
        headers=headers,
        length=length,
        waits_for_100=waits_for_100,
        is_tunnel=is_tunnel,
    )

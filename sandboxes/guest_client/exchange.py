"""One request and its answer as bytes, without I/O; both clients drive it.

Signed, written and read by h11, bounded: what comes out of a sandbox may be anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import h11

from e2a.core.errors import E2AError, GuestError, GuestUnreachable
from sandboxes.gateway.request_head import TUNNEL
from sandboxes.gateway.signing import CHUNKED, signed_headers
from sandboxes.guest_client.calls import Call

LARGEST_HEAD_BYTES = 16 * 1024
LARGEST_ERROR_BYTES = 64 * 1024
_CONTENT_RANGE = re.compile(r"bytes [0-9]{1,18}-[0-9]{1,18}/[0-9]{1,18}")
LARGEST_JSON_BYTES = 16 * 1024 * 1024
"""A folder of 50,000 files, listed."""


class Exchange:
    """The bytes to send and what the received ones mean. For one connection, used once."""

    def __init__(
        self, call: Call, *, sandbox_id: str, node_key: bytes, stream_bytes: int | None = -1
    ) -> None:
        """`stream_bytes`: the body follows in pieces, of this length in all or (None) of unknown length."""
        self.call = call
        self.sandbox_id = sandbox_id
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=LARGEST_HEAD_BYTES)
        self._is_closed = False
        self._is_streaming = stream_bytes is None or stream_bytes >= 0
        place = "egress" if call.of_gateway else "sandboxes"
        target = f"/{place}/{sandbox_id}{call.target}"
        headers = [("host", "gateway")]
        if call.is_tunnel:
            headers += [("connection", "upgrade"), ("upgrade", TUNNEL)]
        else:
            headers.append(("connection", "close"))
        if stream_bytes is None:
            length = CHUNKED
            headers.append(("transfer-encoding", "chunked"))
        else:
            length = str(stream_bytes if stream_bytes >= 0 else len(call.body or b""))
            headers.append(("content-length", length))
        if self._is_streaming or call.body is not None:
            headers.append(("content-type", call.content_type))
        if call.byte_range is not None:
            headers.append(("range", call.byte_range))
        headers += signed_headers(node_key=node_key, method=call.method, target=target, length=length)
        self._head = h11.Request(method=call.method, target=target, headers=headers)

    def opening(self) -> bytes:
        """The first bytes to send: the head, and the body unless it is streamed."""
        data = self._http.send(self._head) or b""
        if self._is_streaming:
            return data
        if self.call.body:
            data += self._http.send(h11.Data(data=self.call.body)) or b""
        return data + self.closing()

    def piece(self, data: bytes) -> bytes:
        """More of a streamed body. Raises ValueError when it is longer than was said."""
        try:
            return self._http.send(h11.Data(data=data)) or b""
        except h11.LocalProtocolError as error:
            raise ValueError(f"{self.call.what}: more bytes than the length that was given") from error

    def closing(self) -> bytes:
        """The end of the body. Raises ValueError when it is shorter than was said."""
        try:
            return self._http.send(h11.EndOfMessage()) or b""
        except h11.LocalProtocolError as error:
            raise ValueError(f"{self.call.what}: fewer bytes than the length that was given") from error

    def receive(self, data: bytes) -> None:
        """What came from the gateway; empty: it closed."""
        self._is_closed = not data
        try:
            self._http.receive_data(data)
        except h11.RemoteProtocolError as error:
            raise self.bad_answer() from error

    def read_head(self) -> bool:
        """Whether the answer's head is all there: then `status` and `headers` are."""
        while self.status is None:
            event = self._next()
            if event is h11.NEED_DATA:
                return False
            if isinstance(event, h11.Response):
                self.status = event.status_code
                for name, value in event.headers:
                    self.headers[name.decode("latin-1")] = value.decode("latin-1")
            elif isinstance(event, h11.InformationalResponse):
                if event.status_code == 101:
                    self.status = 101
            else:
                raise self.unreachable("the connection closed without an answer")
        return True

    def read_body(self) -> bytes | None:
        """The next piece of the answer's body; empty: more is needed; None: it is over."""
        event = self._next()
        if isinstance(event, h11.Data):
            return bytes(event.data)
        if event is h11.NEED_DATA:
            return b""
        return None

    def content_length(self) -> int | None:
        """Bytes that the answer has, None when it does not say."""
        length = self.headers.get("content-length", "")
        return int(length) if length.isdigit() else None

    def file_mode(self) -> int | None:
        """Permission bits out of `X-E2A-Mode`, None for anything but octal digits."""
        try:
            return int(self.headers.get("x-e2a-mode", ""), 8) & 0o7777
        except ValueError:
            return None

    def content_range(self) -> str | None:
        """`Content-Range` of a part of a file, None for a whole one or one that is malformed."""
        value = self.headers.get("content-range", "")
        return value if self.status == 206 and _CONTENT_RANGE.fullmatch(value) else None

    def largest_body(self) -> int:
        """Bytes that may be held of an answer that is read as a whole."""
        return LARGEST_JSON_BYTES if self.is_ok() else LARGEST_ERROR_BYTES

    def is_ok(self) -> bool:
        return self.status is not None and 200 <= self.status < 300

    def document(self, body: bytes) -> Mapping[str, Any]:
        """The answer's JSON object. Raises GuestError, or GuestUnreachable for the gateway's refusals."""
        if not self.is_ok():
            raise self.error(body)
        if self.status == 204 or not body:
            return {}
        try:
            document = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise self.bad_answer() from error
        if not isinstance(document, dict):
            raise self.bad_answer()
        return document

    def error(self, body: bytes) -> E2AError:
        """What an answer that is not 2xx means."""
        code, detail = "guest_error", f"status {self.status}"
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            document = None  # Not ours to read: the status says enough.
        if isinstance(document, dict):
            code = str(document.get("code", code))[:64]
            detail = str(document.get("detail", detail))[:1000]
        if self.headers.get("x-e2a-answered-by") == "gateway":
            return self.unreachable(detail, code=code)
        status = self.status or 502
        return GuestError(detail, code=code, guest_status=status)

    def unreachable(self, why: str, *, code: str | None = None) -> GuestUnreachable:
        """An error that names the sandbox and what was awaited."""
        return GuestUnreachable(f"sandbox {self.sandbox_id}: {why}; awaited {self.call.what}", code=code)

    def bad_answer(self) -> GuestError:
        detail = f"sandbox {self.sandbox_id}: the answer is malformed; awaited {self.call.what}"
        return GuestError(detail, code="bad_answer", guest_status=502)

    def too_large(self) -> GuestError:
        detail = f"sandbox {self.sandbox_id}: the answer is longer than {self.largest_body()} bytes"
        return GuestError(f"{detail}; awaited {self.call.what}", code="bad_answer", guest_status=502)

    def _next(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        try:
            return self._http.next_event()
        except h11.RemoteProtocolError as error:
            if not self._is_closed:
                raise self.bad_answer() from error
            why = "the connection closed without an answer" if self.status is None else "the answer broke off"
            raise self.unreachable(why) from error

"""One client connection: reads requests, answers them, streams."""

import _socket

from . import wire
from .loop import ERR, HUP, IN, OUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .server import Server

RECEIVE = 64 * 1024
HEAD_SECONDS = 10.0
BODY_SECONDS = 60.0
JSON_LIMIT = 2 << 20
CONFIGURE_LIMIT = 4 << 20
"""An environment of 1 MiB and the same values to redact, JSON-escaped."""


class Connection:
    """HTTP/1.1, one request at a time, kept alive when the client likes."""

    __slots__ = (
        "_asked",
        "_busy",
        "_closing",
        "_handler",
        "_inbox",
        "_lingering",
        "_mask",
        "_on_gone",
        "_on_room",
        "_outbox",
        "_server",
        "_sock",
        "_unread",
        "since",
    )

    def __init__(self, server: "Server", sock: _socket.socket, now: float) -> None:
        self._server = server
        self._sock = sock
        self._inbox = bytearray()
        self._outbox = b""
        self._asked: wire.Request | None = None
        self._busy = False
        self._closing = False
        self._unread = False
        self._lingering = False
        self._mask = IN
        self._on_room: Callable[[], None] | None = None
        self._on_gone: Callable[[], None] | None = None
        self.since: float | None = now  # When it began to be waited for; None while we are the ones who work.
        server.loop.watch(sock.fileno(), self._on_event)

    @property
    def in_body(self) -> bool:
        """True while a body is awaited that was announced."""
        return self._asked is not None

    def _on_event(self, events: int) -> None:
        if events & (HUP | ERR):
            self.close()
            return
        if self._lingering:
            self._discard()
            return
        if events & OUT and self.flush() and self._on_room is not None:
            self._on_room()
        if events & IN and self._sock.fileno() >= 0:
            if self._busy or self._closing:
                self._watch(self._mask & ~IN)  # Not now: neither more requests nor the client's half-close.
            else:
                self.receive()

    def _watch(self, mask: int) -> None:
        if mask != self._mask:
            self._mask = mask
            self._server.loop.change(self._sock.fileno(), mask)

    def receive(self) -> None:
        try:
            piece = self._sock.recv(RECEIVE, _socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        if not piece:
            self.close()
            return
        self._inbox += piece
        self._advance()

    def _advance(self) -> None:
        """Handle a request when it is complete, and none is being handled."""
        if self._busy or self._closing:
            return
        try:
            request = self._asked
            if request is None:
                end = self._inbox.find(b"\r\n\r\n")
                if end < 0 or end > wire.HEAD_LIMIT:
                    if len(self._inbox) > wire.HEAD_LIMIT:
                        detail = f"a head has at most {wire.HEAD_LIMIT} bytes"
                        raise wire.Refused(431, "head_too_large", detail)
                    return
                request = wire.parse_head(bytes(self._inbox[:end]))
                del self._inbox[: end + 4]
                if request.path in ("/files", "/archive", "/snapshot") and request.method in ("GET", "PUT"):
                    self._handle(request, b"")
                    return
                limit = CONFIGURE_LIMIT if request.path == "/configure" else JSON_LIMIT
                if request.length < 0:
                    raise wire.Refused(411, "length_required", "a body needs a Content-Length here")
                if request.length > limit:
                    raise wire.Refused(413, "too_large", f"a body has at most {limit} bytes here")
                self._asked = request
                if request.expects_continue and len(self._inbox) < request.length:
                    self.queue(wire.CONTINUE)
                    self.flush()
            if len(self._inbox) < request.length:
                return
            body = bytes(self._inbox[: request.length])
            del self._inbox[: request.length]
            self._handle(request, body)
        except wire.Refused as refused:
            # After a malformed request nobody knows where the next one begins.
            self._closing = self._unread = True
            self._asked = None
            self.refuse(refused)

    def _handle(self, request: wire.Request, body: bytes) -> None:
        self._asked = request
        self._busy = True
        self.since = None
        try:
            self._server.routes.handle(self, request, body)
        except wire.Refused as refused:
            if request.length != len(body):  # A file's content, that nobody has read.
                self._closing = self._unread = True
            self.refuse(refused)
        except Exception as error:  # Told, not hidden; the connection ends, the sandbox goes on.
            self.respond(500, {"code": "internal", "detail": "the guest failed"})
            raise error

    def hand_over(self) -> tuple[int, bytes]:
        """Give the connection to a runner: returns its descriptor and what was read of the body. Call
        `let_go` after.
        """
        return self._sock.fileno(), bytes(self._inbox)

    def let_go(self) -> None:
        """Close our end of a connection that a runner has."""
        self._drop()

    def respond(self, status: int, value: object) -> None:
        keep_alive = self._asked is not None and self._asked.keep_alive and not self._closing
        self.queue(wire.response(status, value, keep_alive))
        self._busy = False
        self._asked = None
        if not keep_alive:
            self.finish()
            return
        self.flush()
        if self._sock.fileno() >= 0:
            self.since = self._server.now()
            self._watch(self._mask | IN)
            if self._inbox:
                self._server.loop.call_later(self._advance)

    def refuse(self, refused: wire.Refused) -> None:
        self.respond(refused.status, refused.body())

    def begin_stream(self, status: int, on_room: "Callable[[], None]", on_gone: "Callable[[], None]") -> None:
        """Start an answer that ends with the connection. Sent with the first frames, or when this turn is
        over.
        """
        self._on_room = on_room
        self._on_gone = on_gone
        self.queue(wire.STREAM_HEAD[status])
        self._server.loop.call_later(on_room)

    def queue(self, data: bytes) -> None:
        self._outbox = self._outbox + data if self._outbox else data

    def flush(self) -> bool:
        """Send what is queued; False when some of it is left, or the client is gone."""
        if self._sock.fileno() < 0:
            return False
        while self._outbox:
            try:
                sent = self._sock.send(self._outbox, _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._watch(self._mask | OUT)
                return False
            except OSError:
                self.close()
                return False
            self._outbox = self._outbox[sent:]
        self._watch(self._mask & ~OUT)
        if self._closing:
            self._end()
            return False
        return True

    def finish(self) -> None:
        """Close when everything queued is sent."""
        self._closing = True
        self._on_room = self._on_gone = None
        self.since = self._server.now()
        self.flush()

    def _end(self) -> None:
        """Close so that the client gets all of it: a socket closed with unread bytes is reset, its answer
        lost.
        """
        if self._unread:
            self._sock.shutdown(_socket.SHUT_WR)
            self._lingering = True
            self._watch(IN)
        else:
            self._drop()

    def _discard(self) -> None:
        try:
            piece = self._sock.recv(RECEIVE, _socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        if not piece:
            self._drop()

    def close(self) -> None:
        """Close now; what was queued is lost."""
        gone, self._on_gone = self._on_gone, None
        self._drop()
        if gone is not None:
            gone()

    def _drop(self) -> None:
        if self._sock.fileno() >= 0:
            self._server.loop.unwatch(self._sock.fileno())
            self._sock.close()
        self._server.connections.discard(self)

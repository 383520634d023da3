"""One request of a sandbox for the broker, and its answer, which is passed on byte for byte as it comes.

The request was parsed and is written anew, since it comes from inside. The answer is the broker's own: a parser only
looks where it ends, so that both connections can be kept for the next call.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

import h11
import httptools

from sandboxes.gateway.broker_door import BrokerConnection, BrokerDoor
from sandboxes.gateway.refusal import Refusal
from sandboxes.gateway.signing import CHUNKED

CONNECT_SECONDS: Final = 10.0
ANSWER_SECONDS: Final = 300.0
"""Between two pieces of an answer; the broker has shorter limits of its own."""
SEND_SECONDS: Final = 600.0
"""For the next piece of a request, and for the program to take a piece of its answer."""
PIECE: Final = 64 * 1024
WAITING_BYTES: Final = 64 * 1024
"""Of an answer that wait for the program; then no more is read of the broker."""

Headers = list[tuple[bytes, bytes]]


class Program(asyncio.StreamReader):
    """What a program sends. Its call learns that it hung up, also while nobody reads."""

    def __init__(self) -> None:
        super().__init__(limit=PIECE)
        self.call: BrokerCall | None = None
        self.has_left = False

    def feed_eof(self) -> None:
        super().feed_eof()
        self._leave()

    def set_exception(self, exc: Exception) -> None:
        super().set_exception(exc)
        self._leave()

    def _leave(self) -> None:
        self.has_left = True
        if self.call is not None:
            self.call.leave()


class BrokerCall:
    """`headers` are without the framing of the body, which `framing` has: its one header, or none."""

    def __init__(
        self,
        door: BrokerDoor,
        *,
        method: bytes,
        target: str,
        headers: Headers,
        framing: Headers,
        http: h11.Connection,
        program: Program,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._door = door
        self._method = method
        self._target = target
        self._headers = headers
        self._framing = framing
        self._is_chunked = bool(framing) and framing[0][0] == b"transfer-encoding"
        self._http = http
        self._program = program
        self._writer = writer
        self._parser = httptools.HttpResponseParser(self)
        self._side: BrokerConnection | None = None
        self._sending: asyncio.Task[None] | None = None
        self._now = asyncio.get_running_loop().time
        self._wake = asyncio.Event()
        self._is_sent = False
        self._has_begun = False
        self._is_whole = False
        self._is_kept = False
        self._is_held = False
        self._has_left = program.has_left
        self._moved_at = 0.0
        self.bytes_out = 0
        self.bytes_in = 0

    async def run(self) -> bool:
        """Whether another request may follow on the program's connection.

        Raises Refusal before the answer begins; when it ends in the middle, or the program leaves, what ends a
        connection: IncompleteReadError, TimeoutError, OSError.
        """
        self._program.call = self
        try:
            begun = self._available()
            await self._ask(begun, fresh=False)
            is_all_here = self._is_sent
            if not is_all_here:
                self._sending = asyncio.create_task(self._send_rest())
                self._sending.add_done_callback(self._on_sent)
            while not await self._answered():
                # A kept connection whose broker has gone. Nothing was answered, and all of the request is here.
                if self._has_begun or not is_all_here or self._side is None or self._side.is_fresh:
                    raise self._broken()
                await self._ask(begun, fresh=True)
            return self._may_follow()
        finally:
            self._program.call = None
            await self._end()

    def leave(self) -> None:
        """The program is gone: a call that nobody hears shall cost nothing further."""
        self._has_left = True
        self._wake.set()

    def cut(self) -> None:
        """End it now."""
        if self._side is not None:
            self._side.transport.abort()

    def _may_follow(self) -> bool:
        is_over = self._is_whole and self._is_sent and self._method != b"HEAD"
        return is_over and self._is_kept

    async def _end(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.gather(self._sending, return_exceptions=True)
        if self._is_held:
            self._hold(False)
        side, self._side = self._side, None
        if side is None:
            return
        if self._may_follow():
            self._door.keep(side)
        else:
            side.call = None
            side.transport.abort()

    # -- the request

    async def _ask(self, begun: bytes, *, fresh: bool) -> None:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                self._side = await self._door.connected(fresh=fresh)
        except (OSError, TimeoutError):
            raise Refusal(503, "broker_down", "the broker is not there; try again") from None
        self._side.call = self
        self._side.transport.write(self._head() + begun)
        self._moved_at = self._now()

    def _head(self) -> bytes:
        """Names and values have passed a parser: none holds the end of a line."""
        length = (
            CHUNKED if self._is_chunked else self._framing[0][1].decode("ascii") if self._framing else "0"
        )
        signed = self._door.signed(self._method.decode("ascii"), self._target, length)
        lines = [b"%s %s HTTP/1.1" % (self._method, self._target.encode("ascii"))]
        lines += [b"%s: %s" % header for header in (*self._headers, *self._framing, *signed)]
        if self._method == b"HEAD":
            lines.append(b"connection: close")  # Its answer says a length that does not come.
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def _available(self) -> bytes:
        """What has come of the body already."""
        pieces = []
        while not self._is_sent and isinstance(event := self._http.next_event(), h11.Data | h11.EndOfMessage):
            pieces.append(self._framed(event))
        if not self._is_sent and self._http.they_are_waiting_for_100_continue:
            go_on = h11.InformationalResponse(status_code=100, headers=[])
            self._writer.write(self._http.send(go_on) or b"")
        return b"".join(pieces)

    def _framed(self, event: h11.Data | h11.EndOfMessage) -> bytes:
        """A part of the body as it is sent."""
        if isinstance(event, h11.EndOfMessage):
            self._is_sent = True
            return b"0\r\n\r\n" if self._is_chunked else b""
        self.bytes_out += len(event.data)
        return b"%x\r\n%b\r\n" % (len(event.data), event.data) if self._is_chunked else bytes(event.data)

    async def _send_rest(self) -> None:
        assert self._side is not None
        while not self._is_sent:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                async with asyncio.timeout(SEND_SECONDS):
                    self._http.receive_data(await self._program.read(PIECE))
            elif isinstance(event, h11.Data | h11.EndOfMessage):
                if not self._side.is_lost:
                    self._side.transport.write(self._framed(event))
                async with asyncio.timeout(SEND_SECONDS):
                    await self._side.room()
            else:
                raise asyncio.IncompleteReadError(b"", None)

    def _on_sent(self, sending: asyncio.Task[None]) -> None:
        if not sending.cancelled() and sending.exception() is not None:
            self.leave()  # It broke off, or said what is no HTTP.

    # -- the answer

    def on_data(self, data: bytes) -> None:
        self._has_begun = True
        self._moved_at = self._now()
        self.bytes_in += len(data)
        if not self._writer.transport.is_closing():
            self._writer.write(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.cut()
        if self._writer.transport.get_write_buffer_size() > WAITING_BYTES and not self._is_held:
            self._hold(True)
            self._wake.set()

    def on_lost(self) -> None:
        self._wake.set()

    def on_headers_complete(self) -> None:
        """The parser's, which knows later no longer whether the connection is kept."""
        self._is_kept = bool(self._parser.should_keep_alive())
        if self._method == b"HEAD":
            self.on_message_complete()

    def on_message_complete(self) -> None:
        """The parser's."""
        self._is_whole = True
        self._wake.set()

    def _hold(self, is_held: bool) -> None:
        """Whether to read no more of the broker for now."""
        self._is_held = is_held
        if self._side is not None and not self._side.transport.is_closing():
            turn = self._side.transport.pause_reading if is_held else self._side.transport.resume_reading
            turn()

    async def _answered(self) -> bool:
        """Whether the answer came to its end; False when the connection was lost before."""
        side = self._side
        assert side is not None
        while True:
            if self._is_whole:
                return True
            if self._has_left:
                raise asyncio.IncompleteReadError(b"", None)
            if side.is_lost:
                return False
            if self._is_held:  # Also when the program has taken all by now: nobody else lets it go on.
                async with asyncio.timeout(SEND_SECONDS):
                    await self._writer.drain()
                self._hold(False)
            if self._now() >= self._moved_at + ANSWER_SECONDS:
                raise self._broken()
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._moved_at + ANSWER_SECONDS):
                    await self._wake.wait()

    def _broken(self) -> Exception:
        if self._has_begun:
            return asyncio.IncompleteReadError(b"", None)  # Cut, so that it is not taken for whole.
        return Refusal(502, "bad_gateway", "the broker ended without an answer; try again")

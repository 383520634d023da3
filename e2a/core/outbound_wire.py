"""One connection to a host outside, and HTTP/1.1 on it: one exchange at a time, its answer as it comes.

The parser is llhttp's, in C: an h11 connection under httpcore cost a model call 0.7 ms more, and each chunk of its
answer 0.1 ms (bench/BROKER.md). It is strict, and what it would let pass but nobody here could use is refused: more
than an answer, an unasked upgrade, codings, a header that would end a line of ours.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Sequence

import httpcore2
import httptools

from e2a.core.outbound_transport import MAX_HEADER_BYTES, UNREACHABLE, Timeouts

Headers = Sequence[tuple[bytes, bytes]]

PIECE = 64 * 1024
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(rb"[^\x00\r\n]*")
_TARGET = re.compile(r"[\x21-\x7e]+")


class BadAnswer(Exception):
    """The host's answer is none that we take: too large a header, compressed unasked, more than an answer."""


class _Parsed:
    """What an answer says, as its bytes come."""

    def __init__(self, *, is_head: bool) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.has_head = False
        self.is_over = False
        self.pieces: list[bytes] = []
        self.fault = ""
        self._is_head = is_head
        self._is_interim = False
        self._is_kept = False
        self._head_bytes = 0
        self._parser = httptools.HttpResponseParser(self)

    @property
    def may_follow(self) -> bool:
        """Whether another exchange may follow on the connection."""
        return self.is_over and not self.fault and not self._is_head and self._is_kept

    @property
    def ends_with_connection(self) -> bool:
        """Whether its length is not said."""
        return self.has_head and not any(
            name in (b"content-length", b"transfer-encoding") for name, _ in self.headers
        )

    def feed(self, data: bytes) -> None:
        """Raises BadAnswer, RemoteProtocolError."""
        if not self.has_head:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.fault = "an upgrade that was not asked for"
        except httptools.HttpParserError as error:
            raise httpcore2.RemoteProtocolError(f"the answer is not HTTP: {type(error).__name__}") from None
        if not self.has_head and self._head_bytes > 2 * MAX_HEADER_BYTES:
            self.fault = "a header without an end"
        if self.fault:
            raise BadAnswer(self.fault)

    # -- called by the parser

    def on_message_begin(self) -> None:
        if self.is_over:
            self.fault = "more than an answer"

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.has_head or self.is_over:
            return  # A trailer; or of what is refused.
        name = name.lower()
        if not _VALUE.fullmatch(value):
            self.fault = "a header that holds the end of a line"
        elif name == b"transfer-encoding" and value.strip().lower() != b"chunked":
            self.fault = "a coding that was not asked for"
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._is_interim = 100 <= self.status < 200
        if self._is_interim:
            self.headers.clear()
            return
        self.has_head = True
        self._is_kept = bool(self._parser.should_keep_alive())  # The parser knows it no longer at the end.
        if self._is_head:
            self.is_over = True

    def on_body(self, body: bytes) -> None:
        if not self._is_head:
            self.pieces.append(body)

    def on_message_complete(self) -> None:
        self.is_over = self.is_over or not self._is_interim


class Wire:
    """A connected socket with our limits, which count for every read and write."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, timeouts: Timeouts
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._timeouts = timeouts
        self._awaits_first_byte = True
        self._is_sent = False
        self._parsed = _Parsed(is_head=False)
        self.idle_since = 0.0

    # -- bytes

    async def start_tls(self, context: ssl.SSLContext, *, name: str) -> None:
        """Raises ConnectTimeout, ConnectError."""
        try:
            async with asyncio.timeout(self._timeouts.connect):
                await self._writer.start_tls(context, server_hostname=name)
        except TimeoutError as error:
            self.abort()
            raise httpcore2.ConnectTimeout(UNREACHABLE) from error
        except (OSError, ValueError) as error:
            self.abort()
            raise httpcore2.ConnectError(UNREACHABLE) from error
        except BaseException:
            self.abort()
            raise

    async def _read(self) -> bytes:
        limit = self._timeouts.first_byte if self._awaits_first_byte else self._timeouts.idle
        try:
            async with asyncio.timeout(limit):
                data = await self._reader.read(PIECE)
        except TimeoutError:
            what = "first byte" if self._awaits_first_byte else "next byte"
            raise httpcore2.ReadTimeout(f"no {what} of the answer within {limit:g} s") from None
        except OSError as error:
            # It broke while we were writing: what had come before is still an answer.
            data = bytes(self._reader._buffer)  # type: ignore[attr-defined]
            self._reader._buffer.clear()  # type: ignore[attr-defined]
            if not data:
                raise httpcore2.ReadError("the connection broke") from error
        self._awaits_first_byte = False
        return data

    async def _write(self, data: bytes) -> None:
        self._awaits_first_byte = True
        try:
            self._writer.write(data)
            async with asyncio.timeout(self._timeouts.write):
                await self._writer.drain()
        except TimeoutError:
            seconds = self._timeouts.write
            raise httpcore2.WriteTimeout(f"the request was not taken within {seconds:g} s") from None
        except OSError as error:
            raise httpcore2.WriteError("the connection broke") from error

    def abort(self) -> None:
        """Close at once: a TLS peer that never says goodbye would hold the caller."""
        self._writer.transport.abort()

    # -- exchanges

    @property
    def may_follow(self) -> bool:
        """Whether the last exchange is over, in a way that another one may follow."""
        return self._is_sent and self._parsed.may_follow

    def is_readable(self) -> bool:
        """Of an idle one this means that the other side hung up, or speaks unasked."""
        return self._reader.at_eof() or self._writer.is_closing() or bool(self._reader._buffer)  # type: ignore[attr-defined]

    async def ask(
        self,
        method: str,
        target: str,
        headers: Headers,
        body: bytes | AsyncIterator[bytes],
        *,
        is_chunked: bool,
    ) -> tuple[int, list[tuple[bytes, bytes]]]:
        """Send a request, and wait for the head of its answer. `is_chunked` is for a body in pieces.

        Raises LocalProtocolError for a target or header that would not stay what it is, and what reading and writing
        raise.
        """
        self._parsed = _Parsed(is_head=method == "HEAD")
        self._is_sent = False
        head = _head(method, target, headers)
        try:
            if isinstance(body, bytes):
                await self._write(head + body)
            else:
                await self._write(head)
                async for piece in body:
                    await self._write(b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece)
                if is_chunked:
                    await self._write(b"0\r\n\r\n")
            self._is_sent = True
        except httpcore2.WriteError:
            pass  # It may have answered early, and that is there to be read.
        parsed = self._parsed
        while not parsed.has_head:
            data = await self._read()
            if not data:
                raise httpcore2.RemoteProtocolError("closed without an answer")
            parsed.feed(data)
        return parsed.status, parsed.headers

    async def chunks(self) -> AsyncIterator[bytes]:
        """The answer's body as it comes. Raises what reading raises, RemoteProtocolError for one that ends early."""
        parsed = self._parsed
        while True:
            if parsed.pieces:
                pieces, parsed.pieces = parsed.pieces, []
                yield b"".join(pieces)
            if parsed.is_over:
                return
            data = await self._read()
            if data:
                parsed.feed(data)
            elif parsed.ends_with_connection:
                return
            else:
                raise httpcore2.RemoteProtocolError("closed in the middle of an answer")


def _head(method: str, target: str, headers: Headers) -> bytes:
    if not _TARGET.fullmatch(target) or not _TOKEN.fullmatch(method.encode()):
        raise httpcore2.LocalProtocolError("this target or method is none")
    for name, value in headers:
        if not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
            raise httpcore2.LocalProtocolError(
                "a header's name or value is none"
            )  # Not which: it may hold a key.
    lines = [f"{method} {target} HTTP/1.1".encode("ascii"), *(b"%b: %b" % header for header in headers)]
    return b"\r\n".join(lines) + b"\r\n\r\n"

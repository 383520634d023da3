"""The client for the event loop: streams that web passes on. The same calls as the one for threads.

A stream is read only as fast as its reader asks; what is not asked for stays with the guest.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from e2a.core.errors import GuestUnreachable
from sandboxes.gateway.address import Address, TcpAddress, address_parse, socket_path
from sandboxes.guest_client import calls
from sandboxes.guest_client.calls import Call
from sandboxes.guest_client.collected import KEPT_BYTES, Collected
from sandboxes.guest_client.deadline import (
    ANSWER_SECONDS,
    CONNECT_SECONDS,
    SILENCE_SECONDS,
    Deadline,
    run_deadline,
)
from sandboxes.guest_client.exchange import Exchange
from sandboxes.guest_client.frames import Frame, FrameReader
from sandboxes.guest_client.shapes import (
    ArchiveWritten,
    Completed,
    FileInfo,
    FileWritten,
    FolderListing,
    GuestHealth,
    GuestStats,
    ProcessInfo,
    ProcessSpec,
    RedactedValue,
    archive_written,
    file_info,
    file_written,
    folder_listing,
    guest_health,
    guest_stats,
    listed,
    not_redacted,
    process_info,
)
from sandboxes.guest_client.watching import ChangeReader, FileChange

_READ_BYTES = 64 * 1024
_RETRY_SECONDS = 0.005


class _Link:
    """A connection to the gateway that carries one exchange."""

    def __init__(
        self,
        exchange: Exchange,
        deadline: Deadline,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._exchange = exchange
        self._deadline = deadline
        self._reader = reader
        self._writer = writer
        self._pending: asyncio.Task[bytes] | None = None

    @classmethod
    async def connect(cls, address: Address, exchange: Exchange, deadline: Deadline) -> _Link:
        seconds = deadline.remaining(CONNECT_SECONDS)
        try:
            async with asyncio.timeout(seconds):
                reader, writer = await _streams(address)
        except TimeoutError as error:
            deadline.remaining(0)
            why = f"gateway {address}: no answer in {CONNECT_SECONDS:g} s"
            raise exchange.unreachable(why, code="gateway_unreachable") from error
        except OSError as error:
            why = f"gateway {address}: {error.strerror or error}"
            raise exchange.unreachable(why, code="gateway_unreachable") from error
        return cls(exchange, deadline, reader, writer)

    async def send(self, data: bytes) -> bool:
        """False when the other side takes no more: then its answer says why."""
        try:
            async with asyncio.timeout(self._deadline.remaining(SILENCE_SECONDS)):
                self._writer.write(data)
                await self._writer.drain()
        except TimeoutError as error:
            self._deadline.remaining(0)
            raise self._exchange.unreachable(f"it took nothing for {SILENCE_SECONDS:g} s") from error
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    async def receive(self) -> None:
        """Read once and give it to the exchange."""
        try:
            async with asyncio.timeout(self._deadline.remaining(SILENCE_SECONDS)):
                data = await (self._pending or self._reader.read(_READ_BYTES))
        except TimeoutError as error:
            self._deadline.remaining(0)
            raise self._exchange.unreachable(f"silent for {SILENCE_SECONDS:g} s") from error
        except (BrokenPipeError, ConnectionResetError):
            data = b""
        except OSError as error:
            raise self._exchange.unreachable(f"the connection broke: {error.strerror}") from error
        self._pending = None
        self._exchange.receive(data)

    def start_reading(self) -> None:
        """Read ahead, once, while something else is done; `receive` takes it up."""
        if self._pending is None:
            self._pending = asyncio.ensure_future(self._reader.read(_READ_BYTES))

    def has_answer(self) -> bool:
        """Whether what was read ahead is there."""
        return self._pending is not None and self._pending.done()

    async def read_head(self) -> None:
        while not self._exchange.read_head():
            await self.receive()

    async def switch(self) -> None:
        """As `read_head`, byte by byte as far as it goes: what follows is for whoever takes the streams over."""
        try:
            async with asyncio.timeout(self._deadline.remaining(SILENCE_SECONDS)):
                head = await self._reader.readuntil(b"\r\n\r\n")
        except TimeoutError as error:
            self._deadline.remaining(0)
            raise self._exchange.unreachable(f"silent for {SILENCE_SECONDS:g} s") from error
        except asyncio.IncompleteReadError as error:
            raise self._exchange.unreachable("the connection closed without an answer") from error
        except (asyncio.LimitOverrunError, OSError) as error:
            raise self._exchange.unreachable("the connection broke") from error
        self._exchange.receive(head)
        await self.read_head()

    def streams(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return self._reader, self._writer

    async def next_piece(self) -> bytes | None:
        """More of the answer's body, None at its end."""
        while (piece := self._exchange.read_body()) is not None:
            if piece:
                return piece
            await self.receive()
        return None

    async def whole_body(self) -> bytes:
        parts: list[bytes] = []
        size = 0
        while (piece := await self.next_piece()) is not None:
            size += len(piece)
            if size > self._exchange.largest_body():
                raise self._exchange.too_large()
            parts.append(piece)
        return b"".join(parts)

    def close(self) -> None:
        """Cut both directions at once; nothing that is still to be sent matters then."""
        if self._pending is not None:
            self._pending.cancel()
        self._writer.transport.abort()


async def _streams(address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if isinstance(address, TcpAddress):
        return await asyncio.open_connection(address.host, address.port, limit=_READ_BYTES)
    while True:
        try:
            with socket_path(address.path) as name:
                return await asyncio.open_unix_connection(name, limit=_READ_BYTES)
        except BlockingIOError:
            # The gateway's queue is full; a unix socket does not wait for a place in it (connect(2)).
            await asyncio.sleep(_RETRY_SECONDS)


async def _pieces(data: bytes | AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    if isinstance(data, bytes):
        yield data
    else:
        async for piece in data:
            yield piece


class AsyncOutputStream:
    """The frames of one process, to iterate once. Closing it is what `kill_on_disconnect` means.

    `aclose` from another task ends the iteration. An end without an Exit frame is otherwise an error
    (GuestUnreachable), never silence.
    """

    def __init__(self, link: _Link, exchange: Exchange, *, ends_open: bool) -> None:
        self._link = link
        self._exchange = exchange
        self._reader = FrameReader()
        self._ends_open = ends_open
        self._is_closed = False

    async def __aiter__(self) -> AsyncIterator[Frame]:
        try:
            while (piece := await self._next_piece()) is not None:
                for frame in self._reader.feed(piece):
                    yield frame
                if self._reader.has_ended:
                    return
            if not (self._is_closed or self._ends_open):
                raise self._exchange.unreachable("the stream ended before the process did")
        finally:
            self._link.close()

    async def _next_piece(self) -> bytes | None:
        try:
            return await self._link.next_piece()
        except GuestUnreachable:
            if self._is_closed:
                return None
            raise

    async def aclose(self) -> None:
        self._is_closed = True
        self._link.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class AsyncWatchStream:
    """What changes in a folder, to iterate once; see WatchStream. `aclose` from another task ends it."""

    def __init__(self, link: _Link, exchange: Exchange) -> None:
        self._link = link
        self._exchange = exchange
        self._is_closed = False

    async def __aiter__(self) -> AsyncIterator[FileChange]:
        reader = ChangeReader()
        try:
            while (piece := await self._next_piece()) is not None:
                for change in reader.feed(piece):
                    yield change
            if not (self._is_closed or reader.has_ended):
                raise self._exchange.unreachable("the watch broke off")
        finally:
            self._link.close()

    async def _next_piece(self) -> bytes | None:
        try:
            return await self._link.next_piece()
        except GuestUnreachable:
            if self._is_closed:
                return None
            raise

    async def aclose(self) -> None:
        self._is_closed = True
        self._link.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class AsyncFileStream:
    """A file's bytes, to iterate once.

    `size` in bytes, `mode` the permission bits; None: the guest did not say.
    """

    def __init__(self, link: _Link, exchange: Exchange) -> None:
        self._link = link
        self.size = exchange.content_length()
        self.mode = exchange.file_mode()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while (piece := await self._link.next_piece()) is not None:
                yield piece
        finally:
            self._link.close()

    async def aclose(self) -> None:
        self._link.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class AsyncGuestClient:
    """As GuestClient, for coroutines:

    The same calls, the same errors. Close streams, or use them in `async with`.
    """

    def __init__(
        self, sandbox_id: str, address: str, node_key: bytes, *, timeout_seconds: float = ANSWER_SECONDS
    ) -> None:
        self.sandbox_id = sandbox_id
        self._address = address_parse(address)
        self._node_key = node_key
        self._timeout_seconds = timeout_seconds

    # -- the guest itself

    async def health(self, *, timeout_seconds: float | None = None) -> GuestHealth:
        return guest_health(await self._ask(calls.health(), timeout_seconds))

    async def stats(self) -> GuestStats:
        return guest_stats(await self._ask(calls.stats()))

    async def configure(
        self,
        *,
        env: Mapping[str, str],
        redact: Iterable[RedactedValue] = (),
        deadline_seconds: float | None = None,
    ) -> tuple[str, ...]:
        call = calls.configure(env=env, redact=redact, deadline_seconds=deadline_seconds)
        return not_redacted(await self._ask(call))

    # -- processes

    async def process_start(self, spec: ProcessSpec) -> ProcessInfo:
        return process_info(await self._ask(calls.process_start(spec, follow=False)))

    async def process_get(self, process_id: str) -> ProcessInfo:
        return process_info(await self._ask(calls.process_get(process_id)))

    async def process_list(self) -> list[ProcessInfo]:
        return [process_info(row) for row in listed(await self._ask(calls.process_list()), "processes")]

    async def process_follow(
        self,
        process: ProcessSpec | str,
        *,
        after: int = 0,
        follow: bool = True,
        deadline_seconds: float | None = None,
    ) -> AsyncOutputStream:
        """See GuestClient.process_follow. Awaiting it starts the process; iterating reads."""
        call = calls.process_follow(process, after=after, follow=follow)
        link, exchange = await self._open(call, Deadline(self._what(call), deadline_seconds))
        return AsyncOutputStream(link, exchange, ends_open=not follow)

    async def run(
        self,
        spec: ProcessSpec,
        *,
        max_output_bytes: int = KEPT_BYTES,
        deadline_seconds: float | None = None,
    ) -> Completed:
        """See GuestClient.run. Cancelling it closes the stream."""
        seconds = run_deadline(spec.timeout_seconds, deadline_seconds)
        collected = Collected(max_output_bytes)
        async with await self.process_follow(spec, deadline_seconds=seconds) as stream:
            async for frame in stream:
                completed = collected.add(frame)
                if completed is not None:
                    return completed
        raise AssertionError("a stream ends with an exit or an error")

    async def process_stdin(self, process_id: str, data: bytes, *, close: bool = False) -> None:
        await self._ask(calls.process_stdin(process_id, data, close=close))

    async def process_signal(self, process_id: str, signal: str) -> None:
        await self._ask(calls.process_signal(process_id, signal))

    async def process_resize(self, process_id: str, *, cols: int, rows: int) -> None:
        await self._ask(calls.process_resize(process_id, cols=cols, rows=rows))

    async def process_forget(self, process_id: str) -> None:
        await self._ask(calls.process_forget(process_id))

    # -- files

    async def file_read(self, path: str, *, deadline_seconds: float | None = None) -> AsyncFileStream:
        call = calls.file_read(path)
        return AsyncFileStream(*await self._open(call, Deadline(self._what(call), deadline_seconds)))

    async def file_write(
        self,
        path: str,
        data: bytes | AsyncIterable[bytes],
        *,
        mode: int | None = None,
        size: int | None = None,
        deadline_seconds: float | None = None,
    ) -> FileWritten:
        """See GuestClient.file_write."""
        call = calls.file_write(path, mode=mode)
        return file_written(await self._upload(call, data, size, deadline_seconds))

    async def archive_write(
        self,
        path: str,
        data: bytes | AsyncIterable[bytes],
        *,
        size: int | None = None,
        deadline_seconds: float | None = None,
    ) -> ArchiveWritten:
        """Unpack a tar into a folder. What was unpacked before an error stays."""
        return archive_written(await self._upload(calls.archive_write(path), data, size, deadline_seconds))

    async def _upload(
        self,
        call: Call,
        data: bytes | AsyncIterable[bytes],
        size: int | None,
        deadline_seconds: float | None,
    ) -> Mapping[str, Any]:
        if isinstance(data, bytes):
            size = len(data)
        deadline = Deadline(self._what(call), deadline_seconds)
        exchange = Exchange(call, sandbox_id=self.sandbox_id, node_key=self._node_key, stream_bytes=size)
        link = await _Link.connect(self._address, exchange, deadline)
        try:
            if await link.send(exchange.opening()):
                await self._send_pieces(link, exchange, data)
            await link.read_head()
            return exchange.document(await link.whole_body())
        finally:
            link.close()

    @staticmethod
    async def _send_pieces(link: _Link, exchange: Exchange, data: bytes | AsyncIterable[bytes]) -> None:
        link.start_reading()
        async for piece in _pieces(data):
            # An answer before the end is a refusal: the rest need not be sent.
            if link.has_answer() or not await link.send(exchange.piece(piece)):
                return
        await link.send(exchange.closing())

    async def file_stat(self, path: str) -> FileInfo:
        return file_info(await self._ask(calls.file_stat(path)))

    async def file_list(self, path: str, *, after: str = "") -> FolderListing:
        """See GuestClient.file_list."""
        return folder_listing(await self._ask(calls.file_list(path, after=after)))

    async def file_delete(self, path: str, *, recursive: bool = False) -> None:
        """A file, a link or an empty folder; with `recursive` any folder."""
        await self._ask(calls.file_delete(path, recursive=recursive))

    async def file_watch(self, path: str, *, recursive: bool = False) -> AsyncWatchStream:
        """See GuestClient.file_watch."""
        call = calls.file_watch(path, recursive=recursive)
        return AsyncWatchStream(*await self._open(call, Deadline(self._what(call), None)))

    async def file_move(self, source: str, destination: str) -> None:
        await self._ask(calls.file_move(source, destination))

    async def file_mkdir(self, path: str) -> None:
        await self._ask(calls.file_mkdir(path))

    # -- tunnels

    async def tunnel(self, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Bytes both ways to a server on this loopback port of the sandbox. Close the writer.

        Raises GuestError: `port_closed` (409) when nothing listens there, `port_silent` (504), `busy` (503).
        """
        call = calls.tunnel(port)
        deadline = Deadline(self._what(call), self._timeout_seconds)
        exchange = Exchange(call, sandbox_id=self.sandbox_id, node_key=self._node_key)
        link = await _Link.connect(self._address, exchange, deadline)
        try:
            await link.send(exchange.opening())
            await link.switch()
            if exchange.status != 101:
                raise exchange.error(await link.whole_body())
        except BaseException:
            link.close()
            raise
        return link.streams()

    # -- one exchange

    def _what(self, call: Call) -> str:
        return f"sandbox {self.sandbox_id}: {call.what}"

    async def _open(self, call: Call, deadline: Deadline) -> tuple[_Link, Exchange]:
        """Send and read the answer's head. Raises what an answer other than 2xx means."""
        exchange = Exchange(call, sandbox_id=self.sandbox_id, node_key=self._node_key)
        link = await _Link.connect(self._address, exchange, deadline)
        try:
            await link.send(exchange.opening())
            await link.read_head()
            if not exchange.is_ok():
                raise exchange.error(await link.whole_body())
        except BaseException:
            link.close()
            raise
        return link, exchange

    async def _ask(self, call: Call, timeout_seconds: float | None = None) -> Mapping[str, Any]:
        seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        link, exchange = await self._open(call, Deadline(self._what(call), seconds))
        try:
            return exchange.document(await link.whole_body())
        finally:
            link.close()

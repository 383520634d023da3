"""The client for threads: web's exec, workers, tasks. One connection a call, a deadline on every wait."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
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

    def __init__(self, address: Address, exchange: Exchange, deadline: Deadline) -> None:
        self._exchange = exchange
        self._deadline = deadline
        self._socket = _connected(address, exchange, deadline)

    def send(self, data: bytes) -> bool:
        """False when the other side takes no more: then its answer says why."""
        try:
            self._socket.settimeout(self._deadline.remaining(SILENCE_SECONDS))
            self._socket.sendall(data)
        except TimeoutError as error:
            self._deadline.remaining(0)
            raise self._exchange.unreachable(f"it took nothing for {SILENCE_SECONDS:g} s") from error
        except (BrokenPipeError, ConnectionResetError):
            return False
        except OSError as error:
            raise self._exchange.unreachable(f"the connection broke: {error.strerror}") from error
        return True

    def receive(self) -> None:
        """Read once and give it to the exchange."""
        try:
            self._socket.settimeout(self._deadline.remaining(SILENCE_SECONDS))
            data = self._socket.recv(_READ_BYTES)
        except TimeoutError as error:
            self._deadline.remaining(0)
            raise self._exchange.unreachable(f"silent for {SILENCE_SECONDS:g} s") from error
        except ConnectionResetError:
            data = b""
        except OSError as error:
            raise self._exchange.unreachable(f"the connection broke: {error.strerror}") from error
        self._exchange.receive(data)

    def has_answer(self) -> bool:
        """Whether there is something to read already."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def read_head(self) -> None:
        while not self._exchange.read_head():
            self.receive()

    def next_piece(self) -> bytes | None:
        """More of the answer's body, None at its end."""
        while (piece := self._exchange.read_body()) is not None:
            if piece:
                return piece
            self.receive()
        return None

    def whole_body(self) -> bytes:
        parts: list[bytes] = []
        size = 0
        while (piece := self.next_piece()) is not None:
            size += len(piece)
            if size > self._exchange.largest_body():
                raise self._exchange.too_large()
            parts.append(piece)
        return b"".join(parts)

    def shut(self) -> None:
        """Wake a reader in another thread with an end."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # Closed already.

    def close(self) -> None:
        self._socket.close()


def _connected(address: Address, exchange: Exchange, deadline: Deadline) -> socket.socket:
    connection: socket.socket | None = None
    try:
        if isinstance(address, TcpAddress):
            seconds = deadline.remaining(CONNECT_SECONDS)
            connection = socket.create_connection((address.host, address.port), timeout=seconds)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        give_up_at = time.monotonic() + CONNECT_SECONDS
        with socket_path(address.path) as name:
            while True:
                connection.settimeout(deadline.remaining(CONNECT_SECONDS))
                try:
                    connection.connect(name)
                    return connection
                except BlockingIOError:
                    # The gateway's queue is full; a unix socket does not wait for a place in it (connect(2)).
                    if time.monotonic() > give_up_at:
                        raise
                    time.sleep(_RETRY_SECONDS)
    except OSError as error:
        if connection is not None:
            connection.close()
        why = error.strerror or "no answer in time"
        raise exchange.unreachable(f"gateway {address}: {why}", code="gateway_unreachable") from error
    except BaseException:
        if connection is not None:
            connection.close()
        raise


class OutputStream:
    """The frames of one process, to iterate once. Closing it is what `kill_on_disconnect` means.

    `close` may be called from another thread: the reader's iteration then just ends. An end without an Exit
    frame is otherwise an error (GuestUnreachable), never silence.
    """

    def __init__(self, link: _Link, exchange: Exchange, *, ends_open: bool) -> None:
        self._link = link
        self._exchange = exchange
        self._reader = FrameReader()
        self._ends_open = ends_open
        self._is_closed = False

    def __iter__(self) -> Iterator[Frame]:
        try:
            while (piece := self._next_piece()) is not None:
                yield from self._reader.feed(piece)
                if self._reader.has_ended:
                    return
            if not (self._is_closed or self._ends_open):
                raise self._exchange.unreachable("the stream ended before the process did")
        finally:
            self._link.close()

    def _next_piece(self) -> bytes | None:
        try:
            return self._link.next_piece()
        except GuestUnreachable:
            if self._is_closed:
                return None
            raise

    def close(self) -> None:
        self._is_closed = True
        self._link.shut()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._link.close()


class WatchStream:
    """What changes in a folder, to iterate once, without an end of its own but `end`.

    `close` may be called from another thread: the iteration then just ends. A connection that breaks is an error
    (GuestUnreachable), never silence.
    """

    def __init__(self, link: _Link, exchange: Exchange) -> None:
        self._link = link
        self._exchange = exchange
        self._is_closed = False

    def __iter__(self) -> Iterator[FileChange]:
        reader = ChangeReader()
        try:
            while (piece := self._next_piece()) is not None:
                yield from reader.feed(piece)
            if not (self._is_closed or reader.has_ended):
                raise self._exchange.unreachable("the watch broke off")
        finally:
            self._link.close()

    def _next_piece(self) -> bytes | None:
        try:
            return self._link.next_piece()
        except GuestUnreachable:
            if self._is_closed:
                return None
            raise

    def close(self) -> None:
        self._is_closed = True
        self._link.shut()


class FileStream:
    """A file's bytes, to iterate once.

    `size` in bytes, `mode` the permission bits; None: the guest did not say. `content_range` when it is a part.
    """

    def __init__(self, link: _Link, exchange: Exchange) -> None:
        self._link = link
        self.size = exchange.content_length()
        self.mode = exchange.file_mode()
        self.content_range = exchange.content_range()
        self.headers = exchange.headers

    def __iter__(self) -> Iterator[bytes]:
        try:
            while (piece := self._link.next_piece()) is not None:
                yield piece
        finally:
            self._link.close()

    def close(self) -> None:
        self._link.shut()
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class GuestClient:
    """Speaks with one sandbox's guest through its node's gateway.

    All methods raise GuestError (the guest says no, with its code), GuestUnreachable (gateway or guest do not
    answer; code `no_such_sandbox`, `guest_unreachable`, `gateway_unreachable`, `unauthenticated`) and
    DeadlineExceeded. Holds no connection between calls; may be used by many threads.
    """

    def __init__(
        self, sandbox_id: str, address: str, node_key: bytes, *, timeout_seconds: float = ANSWER_SECONDS
    ) -> None:
        self.sandbox_id = sandbox_id
        self._address = address_parse(address)
        self._node_key = node_key
        self._timeout_seconds = timeout_seconds

    # -- the guest itself

    def health(self, *, timeout_seconds: float | None = None) -> GuestHealth:
        return guest_health(self._ask(calls.health(), timeout_seconds))

    def stats(self) -> GuestStats:
        return guest_stats(self._ask(calls.stats()))

    def configure(
        self,
        *,
        env: Mapping[str, str],
        redact: Iterable[RedactedValue] = (),
        deadline_seconds: float | None = None,
    ) -> tuple[str, ...]:
        """Replace environment, redaction and the guest's own end (None: its life time only), as a whole.

        Returns the names of values that are too short to be redacted.
        """
        call = calls.configure(env=env, redact=redact, deadline_seconds=deadline_seconds)
        return not_redacted(self._ask(call))

    # -- the gateway's own

    def egress_set(self, rules: Mapping[str, Any]) -> None:
        """Give the gateway the sandbox's rules (`EgressRules.as_json`); they hold from now on, for what is open too."""
        self._ask(calls.egress_set(rules))

    def egress_shown(self) -> dict[str, Any]:
        """`{"rules", "seen": newest first, "open": connections}`, as the gateway says."""
        return dict(self._ask(calls.egress_shown()))

    # -- processes

    def process_start(self, spec: ProcessSpec) -> ProcessInfo:
        """Start it, or find the one with its id."""
        return process_info(self._ask(calls.process_start(spec, follow=False)))

    def process_get(self, process_id: str) -> ProcessInfo:
        return process_info(self._ask(calls.process_get(process_id)))

    def process_list(self) -> list[ProcessInfo]:
        return [process_info(row) for row in listed(self._ask(calls.process_list()), "processes")]

    def process_follow(
        self,
        process: ProcessSpec | str,
        *,
        after: int = 0,
        follow: bool = True,
        deadline_seconds: float | None = None,
    ) -> OutputStream:
        """Output from offset `after` until the exit; a spec is started first (once), an id must exist.

        With `follow=False` what is there now, without waiting. Raises, while it is read, DeadlineExceeded
        after `deadline_seconds` (None: as long as the guest gives signs of life, one every 30 s at least).
        """
        call = calls.process_follow(process, after=after, follow=follow)
        link, exchange = self._open(call, Deadline(self._what(call), deadline_seconds))
        return OutputStream(link, exchange, ends_open=not follow)

    def run(
        self,
        spec: ProcessSpec,
        *,
        max_output_bytes: int = KEPT_BYTES,
        deadline_seconds: float | None = None,
    ) -> Completed:
        """Run to the end. Keeps `max_output_bytes` of each stream, reads and counts the rest.

        `deadline_seconds` None: the process's own time limit and 30 s more, or two hours without one.
        """
        seconds = run_deadline(spec.timeout_seconds, deadline_seconds)
        collected = Collected(max_output_bytes)
        with self.process_follow(spec, deadline_seconds=seconds) as stream:
            for frame in stream:
                completed = collected.add(frame)
                if completed is not None:
                    return completed
        raise AssertionError("a stream ends with an exit or an error")

    def process_stdin(self, process_id: str, data: bytes, *, close: bool = False) -> None:
        self._ask(calls.process_stdin(process_id, data, close=close))

    def process_signal(self, process_id: str, signal: str) -> None:
        """`signal` is a name without SIG, such as TERM; it reaches all that the process started."""
        self._ask(calls.process_signal(process_id, signal))

    def process_resize(self, process_id: str, *, cols: int, rows: int) -> None:
        self._ask(calls.process_resize(process_id, cols=cols, rows=rows))

    def process_forget(self, process_id: str) -> None:
        """Kill it and drop its output."""
        self._ask(calls.process_forget(process_id))

    # -- files

    def file_read(
        self, path: str, *, byte_range: str | None = None, deadline_seconds: float | None = None
    ) -> FileStream:
        """`byte_range` is `bytes=a-b`, `bytes=a-` or `bytes=-n`; anything else is the whole file."""
        call = calls.file_read(path, byte_range=byte_range)
        return FileStream(*self._open(call, Deadline(self._what(call), deadline_seconds)))

    def archive_read(self, path: str, *, deadline_seconds: float | None = None) -> FileStream:
        """A folder, or one file, as a tar. One that breaks off raises GuestUnreachable while it is read."""
        call = calls.archive_read(path)
        return FileStream(*self._open(call, Deadline(self._what(call), deadline_seconds)))

    def file_write(
        self,
        path: str,
        data: bytes | Iterable[bytes],
        *,
        mode: int | None = None,
        size: int | None = None,
        deadline_seconds: float | None = None,
    ) -> FileWritten:
        """Replace a file at once (readers see the old or the new one). `size`: of an iterable, when known."""
        return file_written(self._upload(calls.file_write(path, mode=mode), data, size, deadline_seconds))

    def archive_write(
        self,
        path: str,
        data: bytes | Iterable[bytes],
        *,
        size: int | None = None,
        deadline_seconds: float | None = None,
    ) -> ArchiveWritten:
        """Unpack a tar into a folder. What was unpacked before an error stays."""
        return archive_written(self._upload(calls.archive_write(path), data, size, deadline_seconds))

    def snapshot_read(self, *, limit_bytes: int, deadline_seconds: float | None = None) -> FileStream:
        """Workspace and home as one tar. `headers` has how much it is: `x-e2a-files`, `-bytes`, `-skipped`."""
        call = calls.snapshot_read(limit_bytes=limit_bytes)
        return FileStream(*self._open(call, Deadline(self._what(call), deadline_seconds)))

    def snapshot_write(
        self, data: Iterable[bytes], *, deadline_seconds: float | None = None
    ) -> ArchiveWritten:
        """Make workspace and home what such a tar holds; what they held before is gone, also after an error."""
        return archive_written(self._upload(calls.snapshot_write(), data, None, deadline_seconds))

    def _upload(
        self, call: Call, data: bytes | Iterable[bytes], size: int | None, deadline_seconds: float | None
    ) -> Mapping[str, Any]:
        pieces: Iterable[bytes] = (data,) if isinstance(data, bytes) else data
        if isinstance(data, bytes):
            size = len(data)
        deadline = Deadline(self._what(call), deadline_seconds)
        exchange = Exchange(call, sandbox_id=self.sandbox_id, node_key=self._node_key, stream_bytes=size)
        link = _Link(self._address, exchange, deadline)
        try:
            if link.send(exchange.opening()):
                self._send_pieces(link, exchange, pieces)
            link.read_head()
            return exchange.document(link.whole_body())
        finally:
            link.close()

    @staticmethod
    def _send_pieces(link: _Link, exchange: Exchange, pieces: Iterable[bytes]) -> None:
        for piece in pieces:
            # An answer before the end is a refusal: the rest need not be sent.
            if link.has_answer() or not link.send(exchange.piece(piece)):
                return
        link.send(exchange.closing())

    def file_stat(self, path: str) -> FileInfo:
        return file_info(self._ask(calls.file_stat(path)))

    def file_list(self, path: str, *, after: str = "") -> FolderListing:
        """The first 10,000 by name, of those after the name `after`."""
        return folder_listing(self._ask(calls.file_list(path, after=after)))

    def file_delete(self, path: str, *, recursive: bool = False) -> None:
        """A file, a link or an empty folder; with `recursive` any folder."""
        self._ask(calls.file_delete(path, recursive=recursive))

    def file_watch(self, path: str, *, recursive: bool = False) -> WatchStream:
        """Changes in a folder from now on. Raises GuestError `too_many_watches`, `too_many_folders`."""
        call = calls.file_watch(path, recursive=recursive)
        return WatchStream(*self._open(call, Deadline(self._what(call), None)))

    def file_move(self, source: str, destination: str) -> None:
        self._ask(calls.file_move(source, destination))

    def file_mkdir(self, path: str) -> None:
        self._ask(calls.file_mkdir(path))

    # -- one exchange

    def _what(self, call: Call) -> str:
        return f"sandbox {self.sandbox_id}: {call.what}"

    def _open(self, call: Call, deadline: Deadline) -> tuple[_Link, Exchange]:
        """Send and read the answer's head. Raises what an answer other than 2xx means."""
        exchange = Exchange(call, sandbox_id=self.sandbox_id, node_key=self._node_key)
        link = _Link(self._address, exchange, deadline)
        try:
            link.send(exchange.opening())
            link.read_head()
            if not exchange.is_ok():
                raise exchange.error(link.whole_body())
        except BaseException:
            link.close()
            raise
        return link, exchange

    def _ask(self, call: Call, timeout_seconds: float | None = None) -> Mapping[str, Any]:
        seconds = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        link, exchange = self._open(call, Deadline(self._what(call), seconds))
        try:
            return exchange.document(link.whole_body())
        finally:
            link.close()

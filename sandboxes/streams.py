"""Handing what a blocking reader yields to an async response, without holding the event loop or a request's
thread.

Django buffers a synchronous iterator under ASGI, so every streamed answer is an async generator. The readers
stay the blocking ones: their first answer is read by the view, which can then still say 404.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Generic, Protocol, TypeVar

import structlog
from django.db import connection
from django.http import StreamingHttpResponse

from e2a.core.errors import E2AError, Unavailable
from e2a.core.problems import problem
from e2a.core.requests import request_id_var

log = structlog.get_logger(__name__)

MOST_STREAMS = 128
"""Streams at once in one web process; each holds a thread while it waits for its guest."""
KEEP_ALIVE_SECONDS = 15.0
"""Proxies cut a connection on which nothing moves for a minute."""

_threads = ThreadPoolExecutor(MOST_STREAMS, thread_name_prefix="sandbox-stream")
_slots = threading.BoundedSemaphore(MOST_STREAMS)


Item = TypeVar("Item", covariant=True)
_NO_MORE: Final = object()


class Closable(Protocol[Item]):
    """Something to iterate once, which `close`, from any thread, ends."""

    def __iter__(self) -> Iterator[Item]: ...

    def close(self) -> None: ...


def stream_open(opened: Callable[[], Closable[Item]]) -> Slotted[Item]:
    """Open a stream in this thread; what it raises is the view's answer. Raises 503 `too_many_streams` at the
    limit."""
    if not _slots.acquire(blocking=False):
        raise Unavailable(f"This server has {MOST_STREAMS} streams open.", code="too_many_streams")
    try:
        return Slotted(opened())
    except BaseException:
        _slots.release()
        raise


class Slotted(Generic[Item]):
    """An open stream that counts against the limit until it is closed. `closed_by` a response that never
    began, too."""

    def __init__(self, source: Closable[Item]) -> None:
        self.source = source
        self._lock = threading.Lock()
        self._is_open = True

    def close(self) -> None:
        """Twice is fine."""
        with self._lock:
            was_open, self._is_open = self._is_open, False
        if was_open:
            try:
                self.source.close()
            finally:
                _slots.release()

    async def items(self, *, silence_seconds: float = KEEP_ALIVE_SECONDS) -> AsyncIterator[Item | None]:
        """What the source yields, `None` whenever it was silent for so long. Closes it at the end, however that
        comes."""
        loop = asyncio.get_running_loop()
        iterator = iter(self.source)
        try:
            while True:
                coming = loop.run_in_executor(_threads, _next, iterator)
                while not (await asyncio.wait({coming}, timeout=silence_seconds))[0]:
                    yield None
                item = coming.result()
                if item is _NO_MORE:
                    return
                yield item
        finally:
            # Wakes the thread that waits for the guest; its end of the iteration writes the log entry.
            self.close()
            loop.run_in_executor(_threads, _finish, iterator)


def _next(iterator: Iterator[Any]) -> Any:
    try:
        return next(iterator, _NO_MORE)
    finally:
        connection.close()


def _finish(iterator: Any) -> None:
    """Run the `finally` of a generator that was left in the middle."""
    try:
        if (close := getattr(iterator, "close", None)) is not None:
            close()
    except (ValueError, RuntimeError):
        log.debug("stream.still_running")  # The thread that is in it runs its `finally` itself.
    finally:
        connection.close()


async def byte_stream(slotted: Slotted[bytes]) -> AsyncIterator[bytes]:
    """A file's pieces. One that breaks ends the connection early: the reader sees fewer bytes than were
    promised."""
    async for piece in slotted.items():
        if piece is not None:
            yield piece


async def event_stream(slotted: Slotted[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Documents as server-sent events, named by their `type`. What breaks the stream is its last event,
    `error`."""
    try:
        async for document in slotted.items():
            yield b": keep-alive\n\n" if document is None else _event(str(document["type"]), document)
    except E2AError as error:
        log.warning("stream.failed", code=error.code, detail=error.detail)
        yield _event("error", {"type": "error", **problem(error, request_id=request_id_var.get())})


def _event(name: str, document: Mapping[str, Any]) -> bytes:
    """With `next_after` as its id: a browser says it again as `Last-Event-ID`."""
    place = f"id: {document['next_after']}\n" if "next_after" in document else ""
    return f"{place}event: {name}\ndata: {json.dumps(document)}\n\n".encode()


def streamed(
    body: AsyncIterator[bytes], slotted: Slotted[Any], *, content_type: str
) -> StreamingHttpResponse:
    """The response that streams `body`, and lets go of the stream also when nobody ever reads it."""
    response = StreamingHttpResponse(body, content_type=content_type)
    # Django closes what a response streams by this list, but knows only `close`, not a generator's `aclose`.
    response._resource_closers.append(slotted.close)  # type: ignore[attr-defined]
    return response

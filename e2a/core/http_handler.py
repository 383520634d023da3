"""Django's HTTP handler for this product: a request is one call in a thread that lives on.

As Django has it, each request starts a thread, is handed back and forth between that and the event loop some ten
times, and opens a database connection anew, since those belong to threads: two thirds of what a small one costs.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, Any, Final

from asgiref.sync import ThreadSensitiveContext, sync_to_async
from django.core.exceptions import RequestAborted
from django.core.handlers.asgi import ASGIHandler, get_script_prefix
from django.core.handlers.base import BaseHandler
from django.core.signals import request_started
from django.http.response import FileResponse, HttpResponseBase
from django.urls import set_script_prefix

THREADS_KEPT: Final = 32
"""Each keeps a database connection. More requests than that at once get threads that end with them."""


class RequestThread(ThreadPoolExecutor):
    """One thread, which knows whether it is at work."""

    def __init__(self) -> None:
        super().__init__(1, thread_name_prefix="request")
        self._last: Future[Any] | None = None

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self._last = super().submit(fn, *args, **kwargs)
        return self._last

    @property
    def is_idle(self) -> bool:
        return self._last is None or self._last.done()


class RequestThreads:
    """Lends each request a thread of its own, and keeps it for a later one. For one event loop."""

    def __init__(self) -> None:
        self._idle: deque[RequestThread] = deque()

    @contextmanager
    def one(self) -> Iterator[RequestThread]:
        """The thread that was used last: its caches are warm, and the others may not be needed again."""
        thread = self._idle.pop() if self._idle else RequestThread()
        try:
            yield thread
        finally:
            # A request whose client went away may still be in its view; nobody is to wait for that.
            if thread.is_idle and len(self._idle) < THREADS_KEPT:
                self._idle.append(thread)
            else:
                thread.shutdown(wait=False)


class ThreadHandler(ASGIHandler):
    """`ASGIHandler` whose signals, middleware and view run in one call; bodies and answers are Django's own."""

    def __init__(self) -> None:
        BaseHandler.__init__(self)
        self.load_middleware(is_async=False)
        self._threads = RequestThreads()

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            body = await self.read_body(receive)
        except RequestAborted:
            return
        with contextlib.closing(body), self._threads.one() as thread:
            async with ThreadSensitiveContext(executor=thread):  # For what answers a stream piece by piece.
                await self._until_gone(receive, self._answered(thread, scope, body, send))

    async def _until_gone(self, receive: Any, answer: Coroutine[Any, Any, None]) -> None:
        """Run `answer` to its end, or until the client goes away; raises what it raises."""
        answering = asyncio.create_task(answer)
        watching = asyncio.create_task(self.listen_for_disconnect(receive))
        try:
            await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            is_gone = not answering.done()
            answering.cancel()
            watching.cancel()
            await asyncio.gather(answering, watching, return_exceptions=True)
        if not is_gone:
            answering.result()

    async def _answered(self, thread: RequestThread, scope: Any, body: IO[bytes], send: Any) -> None:
        context = contextvars.copy_context()
        responding = asyncio.get_running_loop().run_in_executor(
            thread, context.run, self._respond, scope, body
        )
        try:
            response = await asyncio.shield(responding)
        except asyncio.CancelledError:
            responding.add_done_callback(_close_unwanted)
            raise
        try:
            await self.send_response(response, send)
        finally:
            if response.streaming:
                await sync_to_async(response.close)()

    def _respond(self, scope: Any, body: IO[bytes]) -> HttpResponseBase:
        """In the thread: the response, closed already unless it streams, so that the database is let go of."""
        set_script_prefix(get_script_prefix(scope))
        request_started.send(sender=self.__class__, scope=scope)
        request, refusal = self.create_request(scope, body)
        response = refusal if request is None else self.get_response(request)
        assert response is not None, "there is one of the two"
        response._handler_class = self.__class__  # type: ignore[attr-defined]
        if isinstance(response, FileResponse):
            response.block_size = self.chunk_size
        if not response.streaming:
            response.close()
        return response


def _close_unwanted(responding: asyncio.Future[HttpResponseBase]) -> None:
    """The client went away before the view was done: what the view opened must be closed all the same."""
    if not responding.cancelled() and responding.exception() is None and responding.result().streaming:
        asyncio.get_running_loop().run_in_executor(None, responding.result().close)

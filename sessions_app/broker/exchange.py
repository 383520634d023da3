"""One request of one sandbox, whatever it is for: how it is answered, cut, and ended when its program leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any, Final

import httpcore2
import structlog

from e2a.core.outbound import refused_address
from e2a.core.outbound_wire import BadAnswer
from sessions_app.llm.sse import BadEventStreamError

if TYPE_CHECKING:
    from sessions_app.broker.server import Broker

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

log = structlog.get_logger("e2a.broker")


LINGER_SECONDS: Final = 5.0
"""How long what is left of a request is read and dropped after its answer."""


class Denied(Exception):
    """The broker's own answer to a program. `kind` is in the words of Anthropic's errors."""

    def __init__(self, status: int, kind: str, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.kind = kind
        self.text = text


class Gone(Exception):
    """One side went away: what is open is cut."""


class Exchange:
    """What model calls and injected calls share."""

    def __init__(self, broker: Broker, scope: Scope, receive: Receive, send: Send, sandbox_id: str) -> None:
        self.broker = broker
        self.scope = scope
        self.send = send
        self.sandbox_id = sandbox_id
        self.has_begun = False
        self._receive = receive
        self._is_heard = False

    async def serve(self) -> None:
        """Answer. Raises Denied before the first byte, Gone, CancelledError."""
        raise NotImplementedError

    def refusal(self, denied: Denied) -> bytes:
        """The body of an answer of our own."""
        raise NotImplementedError

    # -- with the host outside

    async def until_left(self, work: Awaitable[None]) -> None:
        """Run to the end, or until the program leaves, which ends the work. Raises Gone then."""
        limit = asyncio.timeout(None)

        def cut(task: asyncio.Task[None]) -> None:
            if not task.cancelled():
                with contextlib.suppress(RuntimeError):  # It has just come to its end.
                    limit.reschedule(asyncio.get_running_loop().time())

        leaving = asyncio.create_task(self._left())
        leaving.add_done_callback(cut)
        try:
            async with limit:
                await work
        except TimeoutError:
            if limit.expired():
                raise Gone from None
            raise
        finally:
            leaving.cancel()

    async def _left(self) -> None:
        while (await self.hear())["type"] != "http.disconnect":
            pass  # It has nothing more to say.

    @contextlib.contextmanager
    def failures(self, host: str, *, what: str) -> Any:
        """What the way to a host raises becomes Denied, or Gone where the answer has begun: cut, so that it is not
        taken for whole."""
        try:
            yield
        except (httpcore2.ConnectError, httpcore2.ConnectTimeout, httpcore2.PoolTimeout) as error:
            denied = Denied(502, "api_error", f"{what} could not be reached.")
            failure: Exception = error
        except httpcore2.TimeoutException as error:
            denied, failure = Denied(504, "timeout_error", f"{what} fell silent."), error
        except (httpcore2.NetworkError, httpcore2.ProtocolError, BadAnswer, BadEventStreamError) as error:
            denied, failure = Denied(502, "api_error", f"{what} broke off its answer."), error
        else:
            return
        # Not the error's text: libraries quote headers, which hold the key.
        log.warning(
            "broker.call_failed",
            sandbox=self.sandbox_id,
            host=host,
            kind=type(failure).__name__,
            refused=refused_address(failure),
        )
        if self.has_begun:
            raise Gone
        raise denied

    # -- with the program

    async def hear(self) -> MutableMapping[str, Any]:
        """The next that comes of the request."""
        message = await self._receive()
        self._is_heard = message["type"] == "http.disconnect" or not message.get("more_body")
        return message

    async def begin(self, status: int, headers: Headers) -> None:
        """The answer's head."""
        self.has_begun = True
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def more(self, piece: bytes) -> None:
        """A piece of the answer; nothing for none."""
        if piece:
            await self.send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end(self, piece: bytes = b"") -> None:
        """The last of it. What the program still has to say is heard and dropped first: a socket that is closed with
        unread bytes is reset, and the answer lost."""
        if not self._is_heard:
            await self.more(piece)
            piece = b""
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_SECONDS):
                    while not self._is_heard:
                        await self.hear()
        await self.send({"type": "http.response.body", "body": piece, "more_body": False})

    async def deny(self, denied: Denied) -> None:
        """Our own answer. Raises Gone when another has begun."""
        if self.has_begun:
            raise Gone
        log.info("broker.denied", sandbox=self.sandbox_id, status=denied.status, why=denied.text[:200])
        body = self.refusal(denied)
        await self.begin(denied.status, answer_head(body, [(b"x-e2a-answered-by", b"broker")]))
        await self.end(body)


def answer_head(body: bytes, more: Headers | None = None) -> Headers:
    """The headers of a JSON document of ours."""
    length = str(len(body)).encode()
    return [(b"content-type", b"application/json"), (b"content-length", length), *(more or ())]

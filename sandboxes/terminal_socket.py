"""`WS /v1/sandboxes/{id}/terminal`: binary frames are the terminal's bytes, text frames say everything else.

The socket is accepted first and then closed with a code, so that a browser can see why. Reading and writing are two
things: `receive` translates what the client says and never waits; tasks of the socket carry it out, follow the shell's
log, and look every 2 s whether the socket may stay and who types. Hints only make that sooner.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

import structlog
from channels.generic.websocket import AsyncWebsocketConsumer

from e2a.core.errors import Conflict, DeadlineExceeded, E2AError, GuestError, GuestUnreachable, Unavailable
from e2a.core.hints import publish
from e2a.core.sockets import FrameRate, hear_hints
from e2a.core.threads import in_thread
from sandboxes import terminal
from sandboxes.activity import BEAT_SECONDS, viewer_attached, viewer_left
from sandboxes.guest_client import AsyncGuestClient, Exit, Gap, Output, ProcessInfo
from sandboxes.models import UNREADY_STATES, Sandbox, SandboxState
from sandboxes.services import sandbox_wait_running
from sandboxes.socket_access import (
    BAD_FRAMES,
    ENDED,
    FAILED,
    FRAME_TOO_LARGE,
    NO_AUTH,
    SANDBOX_OVER,
    TOO_MANY,
    AttachRefused,
    SandboxGrant,
    running_client,
    sandbox_grant,
    sandbox_row,
    standing_check,
)
from sandboxes.terminal_frames import Opening, frame_parse, opening_parse

log = structlog.get_logger(__name__)

AUTH_SECONDS: Final = 10.0
READY_SECONDS: Final = 30.0
CHECK_SECONDS: Final = 2.0
STALL_SECONDS: Final = 300.0
"""A reader that takes nothing for so long is closed with 4429."""
CLOSE_SECONDS: Final = 5.0
LAST_WORDS_SECONDS: Final = 2.0
SILENT_SECONDS: Final = 60.0
"""A guest that answers nothing for so long: by then reconcile has found out whether it is gone."""
AGAIN_SECONDS: Final = 0.5
FULL_SECONDS: Final = 10.0
"""How long input waits for a program that does not read it."""
FRAME_LIMIT: Final = 64 * 1024
WAITING_LIMIT: Final = 1024 * 1024
ORDERS_LIMIT: Final = 256
BAD_FRAME_LIMIT: Final = 10
RATE: Final = (1000, 10.0)
"""Client frames per seconds: several fast typists and a mouse."""
SOCKETS_PER_SANDBOX: Final = 20
"""In one web process."""

_open_sockets: dict[str, int] = {}


class TerminalConsumer(AsyncWebsocketConsumer):
    """One viewer of one terminal; at most one of all of them types."""

    channel_layer_alias = ""  # See `hear_hints`.
    client: AsyncGuestClient
    opening: Opening

    async def connect(self) -> None:
        self.sandbox_id: str = self.scope["url_route"]["kwargs"]["sandbox_id"]
        self.tasks: set[asyncio.Task[None]] = set()
        self.closing = False
        self.is_counted = False
        self.sandbox_pk: int | None = None
        self.is_authenticating = False
        self.is_writer = False
        self.wants_writing = False
        self.is_paused = False
        self.bad_frames = 0
        self.rate = FrameRate(*RATE)
        self.wake = asyncio.Event()
        self.roles = asyncio.Lock()
        self.orders: deque[bytes | dict[str, Any]] = deque()
        self.waiting_bytes = 0
        self.ordered = asyncio.Event()
        self.at_rest = asyncio.Event()
        self.at_rest.set()
        await self.accept()
        self.headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in self.scope["headers"]
        }
        try:
            self.opening = opening_parse(self.scope["query_string"], self.headers)
        except AttachRefused as refusal:
            await self.leave(refusal.code, refusal.reason)
            return
        if self.opening.token is not None:
            self.authenticate(self.opening.token)
        else:
            self.spawn(self.expect_auth())

    async def expect_auth(self) -> None:
        """The third way in: the first message. Nothing else is held for the socket until then."""
        await asyncio.sleep(AUTH_SECONDS)
        if not self.is_authenticating:
            raise AttachRefused(NO_AUTH, f"No token within {AUTH_SECONDS:g} s.")

    def authenticate(self, token: str) -> None:
        self.is_authenticating = True
        self.spawn(self.attach(token))

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Keep a task until it is done; all are cancelled with the socket, which closes with the first that fails."""
        task = asyncio.create_task(self.told(work))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def told(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except AttachRefused as refusal:
            await self.leave(refusal.code, refusal.reason)
        except Conflict as error:
            await self.leave(SANDBOX_OVER, error.detail)
        except E2AError as error:
            log.warning("terminal.failed", sandbox=self.sandbox_id, code=error.code, detail=error.detail)
            await self.leave(FAILED, "The sandbox does not answer; reconnect.")
        except TimeoutError:
            await self.leave(TOO_MANY, f"Nothing was read for {STALL_SECONDS:g} s.")
        except OSError:
            self.closing = True  # The client is gone (uvicorn's ClientDisconnected); `disconnect` follows.
        except asyncio.CancelledError:
            raise
        except Exception as error:  # A fault of ours must reach the log and the client.
            log.exception("terminal.broken", sandbox=self.sandbox_id, exc_info=error)
            await self.leave(FAILED, "Something failed here; reconnect.")

    async def disconnect(self, code: int) -> None:
        self.closing = True
        if self.is_writer:
            # What was typed before the client left is typed all the same.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORDS_SECONDS):
                    await self.at_rest.wait()
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
        if self.is_counted:
            left = _open_sockets.pop(self.sandbox_id, 1) - 1
            if left > 0:
                _open_sockets[self.sandbox_id] = left
        if self.sandbox_pk is not None:
            await in_thread(viewer_left, self.sandbox_pk, "terminal", self.who)
        if self.is_writer:
            await in_thread(terminal.writer_release, self.sandbox_id, self.who)
            await self.hint({"type": "terminal.taken", "by": ""})

    @property
    def who(self) -> str:
        """This socket as one who types: the client's name, and what tells its sockets apart."""
        return f"{self.opening.client}/{id(self):x}"

    # -- from the first look at the token to the last byte

    async def attach(self, token: str) -> None:
        origin = self.headers.get("origin")
        grant, sandbox = await in_thread(
            sandbox_grant, sandbox_id=self.sandbox_id, token=token, origin=origin
        )
        if _open_sockets.get(self.sandbox_id, 0) >= SOCKETS_PER_SANDBOX:
            raise AttachRefused(TOO_MANY, f"The sandbox has {SOCKETS_PER_SANDBOX} terminals open already.")
        _open_sockets[self.sandbox_id] = _open_sockets.get(self.sandbox_id, 0) + 1
        self.is_counted = True
        self.client = await self.client_when_ready(sandbox)
        shell, after = await self.shell_of(self.opening)
        await self.first_role()
        size = await in_thread(terminal.size_told, self.sandbox_id)
        ready = {
            "type": "ready",
            "shell": terminal.shell_token(shell),
            "after": after,
            "head": shell.output_bytes,
            "role": self.role(),
            "client": self.opening.client,
        }
        await self.say(ready | ({} if size is None else {"cols": size[0], "rows": size[1]}))
        self.sandbox_pk = grant.sandbox_pk
        self.spawn(self.watch(grant, min(BEAT_SECONDS, sandbox.idle_timeout_seconds / 3)))
        self.spawn(self.hear())
        self.spawn(self.carry_out(shell.id))
        if self.is_writer:
            self.order({"type": "resize", "cols": self.opening.cols, "rows": self.opening.rows})
        await self.follow(grant, shell.id, after)

    async def client_when_ready(self, sandbox: Sandbox) -> AsyncGuestClient:
        """Wait, holding nothing, until it is made; a paused one is resumed."""
        give_up_at, pause = time.monotonic() + READY_SECONDS, 0.02
        while sandbox.state in UNREADY_STATES:
            if time.monotonic() > give_up_at:
                raise AttachRefused(FAILED, f"The sandbox is still {sandbox.state}.")
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.25)
            sandbox = await in_thread(sandbox_row, sandbox.pk)
        return await in_thread(running_client, sandbox)

    async def shell_of(self, opening: Opening) -> tuple[ProcessInfo, int]:
        """The shell that the client has seen, if the guest knows it, also to hear of its end; else the one that runs.
        And where its log is read from."""
        if opening.shell is not None:
            seen = await terminal.shell_get(self.client, opening.shell)
            if seen is not None and opening.after <= seen.output_bytes:
                return seen, opening.after
        shell = await terminal.shell_ensure(self.client, opening.cols, opening.rows)
        if opening.shell is None and opening.after <= shell.output_bytes:
            return shell, opening.after
        if opening.after:
            await self.say({"type": "resync", "after": 0})
        return shell, 0

    async def follow(self, grant: SandboxGrant, process_id: str, after: int) -> None:
        """Send what the shell prints until it ends. A gateway that restarts and a pause are sat out."""
        silent_since = time.monotonic()
        while True:
            try:
                async with await self.client.process_follow(process_id, after=after) as stream:
                    silent_since = time.monotonic()
                    async for frame in stream:
                        match frame:
                            case Output(offset=offset, data=data):
                                await self.push(data)
                                after = offset + len(data)
                            case Gap(dropped=dropped, offset=after):
                                await self.say({"type": "gap", "dropped_bytes": dropped, "next_after": after})
                            case Exit(process=process):
                                signal = {} if process.signal is None else {"signal": process.signal}
                                await self.say({"type": "exit", "exit_code": process.exit_code} | signal)
                                raise AttachRefused(ENDED, "The shell has ended.")
            except (GuestUnreachable, DeadlineExceeded):
                state = await in_thread(standing_check, grant)
                if state == SandboxState.PAUSED:
                    silent_since = time.monotonic()
                elif time.monotonic() > silent_since + SILENT_SECONDS:
                    raise
                await asyncio.sleep(AGAIN_SECONDS)

    async def watch(self, grant: SandboxGrant, touch_seconds: float) -> None:
        """Whether the socket may stay, whether the sandbox is paused, who types; and that the sandbox is used."""
        touched = float("-inf")
        while not self.closing:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CHECK_SECONDS):
                    await self.wake.wait()
            self.wake.clear()
            is_paused = await in_thread(standing_check, grant) == SandboxState.PAUSED
            if is_paused != self.is_paused:
                self.is_paused = is_paused
                await self.say({"type": "status", "state": "paused" if is_paused else "running"})
            if is_paused and not self.at_rest.is_set():
                await in_thread(_resume, grant.sandbox_pk)  # Somebody types.
            await self.look_who_types()
            if time.monotonic() - touched > touch_seconds:
                touched = time.monotonic()
                await in_thread(viewer_attached, grant.sandbox_pk, "terminal", self.who)

    # -- from the client

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        if self.closing:
            return
        if len((text_data or "").encode()) > FRAME_LIMIT or len(bytes_data or b"") > FRAME_LIMIT:
            await self.leave(FRAME_TOO_LARGE, "A frame has at most 64 KiB.")
        elif not self.rate.takes():
            await self.leave(TOO_MANY, f"More than {RATE[0]} frames in {RATE[1]:g} s.")
        else:
            await self.take_in(bytes_data if bytes_data is not None else frame_parse(text_data or ""))

    async def take_in(self, order: bytes | dict[str, Any] | None) -> None:
        kind = order["type"] if isinstance(order, dict) else "input"
        if order is None:
            await self.bad_frame(
                "bad_frame", "A text frame is auth, resize, take or ping, with just its fields."
            )
        elif kind == "ping":
            await self.say({"type": "pong"})
        elif isinstance(order, dict) and kind == "auth":
            if not self.is_authenticating:
                self.authenticate(order["token"])
        elif not self.is_authenticating:
            await self.bad_frame("auth_needed", 'Say who you are first: {"type": "auth", "token": …}.')
        elif not self.order(order):
            await self.complain("too_busy", "Too much input waits already; this is lost.")

    async def bad_frame(self, code: str, detail: str) -> None:
        """A bad frame gets an `error`, ten in all get the door."""
        self.bad_frames += 1
        await self.complain(code, detail)
        if self.bad_frames >= BAD_FRAME_LIMIT:
            await self.leave(BAD_FRAMES, f"{BAD_FRAME_LIMIT} bad frames.")

    def order(self, order: bytes | dict[str, Any]) -> bool:
        """Queue it, typed bytes together with those before them. False when too much waits."""
        if isinstance(order, bytes):
            if self.waiting_bytes + len(order) > WAITING_LIMIT:
                return False
            self.waiting_bytes += len(order)
        if isinstance(order, bytes) and self.orders and isinstance(last := self.orders[-1], bytes):
            self.orders[-1] = last + order
        elif len(self.orders) >= ORDERS_LIMIT:
            return False
        else:
            self.orders.append(order)
        self.at_rest.clear()
        self.ordered.set()
        if self.is_paused:
            self.wake.set()
        return True

    async def carry_out(self, process_id: str) -> None:
        """What the client types and wishes, in its order; off the reading path."""
        while True:
            while not self.orders:
                self.at_rest.set()
                self.ordered.clear()
                await self.ordered.wait()
            order = self.orders.popleft()
            try:
                if isinstance(order, bytes):
                    self.waiting_bytes -= len(order)
                    await self.type(process_id, order)
                elif order["type"] == "take":
                    await self.take()
                elif await self.may_type():
                    await self.client.process_resize(process_id, cols=order["cols"], rows=order["rows"])
                    await in_thread(terminal.size_tell, self.sandbox_id, order["cols"], order["rows"])
            except E2AError as error:
                await self.complain(error.code, error.detail)

    async def type(self, process_id: str, data: bytes) -> None:
        if not await self.may_type():
            await self.complain("read_only", 'Another socket types; {"type": "take"} takes over.')
            return
        give_up_at = time.monotonic() + FULL_SECONDS
        while True:
            try:
                await self.client.process_stdin(process_id, data)
                return
            except GuestError as error:
                if error.code != "stdin_full" or time.monotonic() > give_up_at:
                    raise
            await asyncio.sleep(AGAIN_SECONDS)

    # -- who types. Redis has the truth; one question at a time, so that no old answer overtakes a new one.

    def role(self) -> str:
        return "writer" if self.is_writer else "viewer"

    async def first_role(self) -> None:
        self.wants_writing = self.opening.mode != "view"
        try:
            if self.opening.mode == "write":
                await in_thread(terminal.writer_take, self.sandbox_id, self.who)
                self.is_writer = True
            elif self.wants_writing:
                self.is_writer = await in_thread(terminal.writer_claim, self.sandbox_id, self.who)
        except Unavailable:
            return  # A viewer until Redis is back.
        if self.is_writer:
            await self.hint({"type": "terminal.taken", "by": self.who})

    async def may_type(self) -> bool:
        async with self.roles:
            if self.is_writer and not await in_thread(terminal.writer_holds, self.sandbox_id, self.who):
                await self.become(writer=False)
            return self.is_writer

    async def look_who_types(self) -> None:
        """Hear of a takeover, and take the place of one who left."""
        if self.is_writer or not self.wants_writing:
            await self.may_type()
            return
        async with self.roles:
            with contextlib.suppress(Unavailable):
                await self.become(writer=await in_thread(terminal.writer_claim, self.sandbox_id, self.who))

    async def take(self) -> None:
        async with self.roles:
            await in_thread(terminal.writer_take, self.sandbox_id, self.who)
            self.wants_writing = True
            await self.become(writer=True)
        await self.hint({"type": "terminal.taken", "by": self.who})

    async def become(self, *, writer: bool) -> None:
        if self.is_writer != writer:
            self.is_writer = writer
            await self.say({"type": "role", "role": self.role()})

    # -- hints

    async def hint(self, message: dict[str, Any]) -> None:
        await in_thread(publish, terminal.group_of(self.sandbox_id), message)

    async def hear(self) -> None:
        takers: dict[str, Callable[[dict[str, Any]], Awaitable[None]]] = {
            "terminal.taken": self.terminal_taken,
            "terminal.resized": self.terminal_resized,
        }
        await hear_hints(
            terminal.group_of(self.sandbox_id),
            takers=takers,
            on_listening=self.wake.set,
            is_over=lambda: self.closing,
        )

    async def terminal_taken(self, message: dict[str, Any]) -> None:
        if message["by"] != self.who:
            self.wake.set()

    async def terminal_resized(self, message: dict[str, Any]) -> None:
        if not self.is_writer:
            await self.say({"type": "resize", "cols": message["cols"], "rows": message["rows"]})

    # -- to the client

    async def complain(self, code: str, detail: str) -> None:
        await self.say({"type": "error", "code": code, "detail": detail})

    async def say(self, frame: dict[str, Any]) -> None:
        if not self.closing:
            async with asyncio.timeout(STALL_SECONDS):
                await self.send(text_data=json.dumps(frame))

    async def push(self, data: bytes) -> None:
        """Send, waiting for the reader: it is served at its own pace and nothing is buffered for it."""
        if self.closing:
            raise asyncio.CancelledError
        async with asyncio.timeout(STALL_SECONDS):
            await self.send(bytes_data=data)

    async def leave(self, code: int, reason: str) -> None:
        if not self.closing:
            self.closing = True
            await self.close(code=code, reason=reason[:120])


def _resume(sandbox_pk: int) -> None:
    sandbox_wait_running(sandbox_row(sandbox_pk))

"""`WS /v1/sandboxes/{id}/terminal`: binary frames are the terminal's bytes, text frames say everything else.

From the server: `ready {after, role}`, `role {role}`, `gap {dropped_bytes, next_after}`, `resync {after}`,
`exit {exit_code}`, `error {code, detail}`, `pong`. From the client: `resize {cols, rows}`, `take`, `ping`.
The socket is accepted first and then closed with a code, so that a browser can see why.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any, Final
from urllib.parse import parse_qs

import structlog
from channels.generic.websocket import AsyncWebsocketConsumer
from django.conf import settings

from e2a.core.errors import Conflict, E2AError, GuestError
from e2a.core.threads import in_thread
from sandboxes.guest_client import AsyncGuestClient, Exit, Gap, Output
from sandboxes.models import Sandbox
from sandboxes.terminal import (
    BAD_FRAMES,
    BAD_TOKEN,
    ENDED,
    FAILED,
    FRAME_TOO_LARGE,
    PROCESS_ID,
    SANDBOX_OVER,
    TOO_MANY,
    TerminalRefused,
    terminal_sandbox,
    terminal_spec,
    writer_is,
    writer_take,
)

log = structlog.get_logger(__name__)

FRAME_LIMIT: Final = 64 * 1024
BAD_FRAME_LIMIT: Final = 10
STALL_SECONDS: Final = 300.0
ORDERS_LIMIT: Final = 256
SOCKETS_PER_SANDBOX: Final = 20
"""In one web process."""
LAST_WORDS_SECONDS: Final = 2.0
LARGEST_SIDE: Final = 1000

_open_sockets: dict[str, int] = {}


class TerminalConsumer(AsyncWebsocketConsumer):
    """One viewer of one terminal; at most one of them types."""

    async def connect(self) -> None:
        self.sandbox_id: str = self.scope["url_route"]["kwargs"]["sandbox_id"]
        self.group = f"terminal.{self.sandbox_id}"
        self.closing = False
        self.counted = False
        self.grouped = False
        self.is_writer = False
        self.bad_frames = 0
        self.orders: asyncio.Queue[bytes | dict[str, Any]] = asyncio.Queue(ORDERS_LIMIT)
        await self.accept()
        self.work = asyncio.create_task(self.run())

    async def disconnect(self, code: int) -> None:
        self.closing = True
        if self.is_writer:
            # What was typed before the client left is typed all the same.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORDS_SECONDS):
                    await self.orders.join()
        self.work.cancel()
        if self.counted:
            left = _open_sockets.get(self.sandbox_id, 1) - 1
            _open_sockets.pop(self.sandbox_id, None)
            if left > 0:
                _open_sockets[self.sandbox_id] = left
        if self.grouped:
            await self.channel_layer.group_discard(self.group, self.channel_name)

    async def run(self) -> None:
        """From the first look at the token to the last byte."""
        try:
            await self.attach()
        except TerminalRefused as refusal:
            await self.leave(refusal.code, refusal.reason)
        except Conflict as error:
            await self.leave(SANDBOX_OVER, error.detail)
        except E2AError as error:
            log.warning("terminal.failed", sandbox=self.sandbox_id, code=error.code, detail=error.detail)
            await self.leave(FAILED, "The sandbox does not answer.")
        except TimeoutError:
            await self.leave(TOO_MANY, f"Nothing was read for {STALL_SECONDS:g} s.")
        except asyncio.CancelledError:
            raise
        except Exception as error:  # A fault of ours must reach the log and the client.
            log.exception("terminal.broken", exc_info=error)
            await self.leave(FAILED, "Something failed here.")

    async def attach(self) -> None:
        query = {
            name: values[-1]
            for name, values in parse_qs(self.scope["query_string"].decode("latin-1")).items()
        }
        after, cols, rows = (
            _number(query, name, default) for name, default in (("after", 0), ("cols", 80), ("rows", 24))
        )
        if query.get("mode", "write") not in ("write", "view") or not _is_size(cols, rows):
            raise TerminalRefused(BAD_FRAMES, "`mode` is write or view; cols and rows are 1 to 1000.")
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in self.scope["headers"]
        }
        bearer = headers.get("authorization", "")
        token = query.get("token") or (bearer[7:].strip() if bearer.lower().startswith("bearer ") else "")
        if not token:
            raise TerminalRefused(BAD_TOKEN, "A token is needed, from POST /v1/sandboxes/{id}/token.")
        sandbox = await in_thread(
            terminal_sandbox, sandbox_id=self.sandbox_id, token=token, origin=headers.get("origin")
        )
        if _open_sockets.get(self.sandbox_id, 0) >= SOCKETS_PER_SANDBOX:
            raise TerminalRefused(TOO_MANY, f"The sandbox has {SOCKETS_PER_SANDBOX} terminals open already.")
        _open_sockets[self.sandbox_id] = _open_sockets.get(self.sandbox_id, 0) + 1
        self.counted = True
        assert sandbox.node is not None
        client = AsyncGuestClient(sandbox.public_id, sandbox.node.address, settings.E2A.node_key)
        await self.channel_layer.group_add(self.group, self.channel_name)
        self.grouped = True
        await _started(client, cols, rows)
        try:
            stream = await client.process_follow(PROCESS_ID, after=after)
        except GuestError as error:
            if error.code != "bad_offset":
                raise
            # The client's offset is of a shell that has ended since.
            after = 0
            await self.say({"type": "resync", "after": 0})
            stream = await client.process_follow(PROCESS_ID, after=0)
        if query.get("mode", "write") == "write":
            await self.take(client, (cols, rows))
        await self.say({"type": "ready", "after": after, "role": self.role()})
        typing = asyncio.create_task(self.carry_out(client))
        try:
            async with stream:
                async for frame in stream:
                    match frame:
                        case Output(data=data):
                            if not self.closing:
                                async with asyncio.timeout(STALL_SECONDS):
                                    await self.send(bytes_data=data)
                        case Gap(dropped=dropped, offset=offset):
                            await self.say({"type": "gap", "dropped_bytes": dropped, "next_after": offset})
                        case Exit(process=process):
                            await self.say({"type": "exit", "exit_code": process.exit_code})
                            await self.leave(ENDED, "The shell has ended.")
        except E2AError:
            await self.tell_why(sandbox)
            raise
        finally:
            typing.cancel()

    async def tell_why(self, sandbox: Sandbox) -> None:
        """Raises `TerminalRefused` when the stream broke because the sandbox does not run any more."""
        state = await in_thread(_state_of, sandbox.pk)
        if state in ("stopping", "destroyed"):
            raise TerminalRefused(SANDBOX_OVER, "The sandbox has ended.")
        if state == "paused":
            raise TerminalRefused(FAILED, "The sandbox is paused.")

    def role(self) -> str:
        return "writer" if self.is_writer else "viewer"

    # -- from the client

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        if self.closing:
            return
        if len(text_data or "") > FRAME_LIMIT or len(bytes_data or b"") > FRAME_LIMIT:
            await self.leave(FRAME_TOO_LARGE, "A frame has at most 64 KiB.")
            return
        order = bytes_data if bytes_data is not None else _order(text_data or "")
        if order is None:
            self.bad_frames += 1
            await self.complain("bad_frame", "A text frame is resize, take or ping.")
            if self.bad_frames >= BAD_FRAME_LIMIT:
                await self.leave(BAD_FRAMES, f"{BAD_FRAME_LIMIT} bad frames.")
        elif isinstance(order, dict) and order["type"] == "ping":
            await self.say({"type": "pong"})
        else:
            try:
                self.orders.put_nowait(order)
            except asyncio.QueueFull:
                await self.complain("too_busy", f"{ORDERS_LIMIT} frames wait already.")

    async def carry_out(self, client: AsyncGuestClient) -> None:
        """What the client types and wishes, in its order; off the reading path."""
        while True:
            order = await self.orders.get()
            try:
                if isinstance(order, dict) and order["type"] == "take":
                    await self.take(client, None)
                elif not await self.may_type():
                    await self.complain("read_only", 'Another socket types; {"type": "take"} takes over.')
                elif isinstance(order, bytes):
                    await client.process_stdin(PROCESS_ID, order)
                else:
                    await client.process_resize(PROCESS_ID, cols=order["cols"], rows=order["rows"])
            except E2AError as error:
                await self.complain(error.code, error.detail)
            finally:
                self.orders.task_done()

    async def may_type(self) -> bool:
        if self.is_writer and not await in_thread(writer_is, self.sandbox_id, self.channel_name):
            await self.become(writer=False)
        return self.is_writer

    async def take(self, client: AsyncGuestClient, size: tuple[int, int] | None) -> None:
        await in_thread(writer_take, self.sandbox_id, self.channel_name)
        await self.channel_layer.group_send(self.group, {"type": "terminal.taken", "by": self.channel_name})
        if size is None:
            await self.become(writer=True)
        else:
            self.is_writer = True
            await client.process_resize(PROCESS_ID, cols=size[0], rows=size[1])

    async def terminal_taken(self, message: dict[str, Any]) -> None:
        """Somebody took over; the truth is in Redis, so a lost hint costs only when it is told."""
        if message["by"] != self.channel_name and self.is_writer:
            await self.may_type()

    async def become(self, *, writer: bool) -> None:
        if self.is_writer != writer:
            self.is_writer = writer
            await self.say({"type": "role", "role": self.role()})

    async def complain(self, code: str, detail: str) -> None:
        await self.say({"type": "error", "code": code, "detail": detail})

    async def say(self, frame: dict[str, Any]) -> None:
        if not self.closing:
            async with asyncio.timeout(STALL_SECONDS):
                await self.send(text_data=json.dumps(frame))

    async def leave(self, code: int, reason: str) -> None:
        if not self.closing:
            self.closing = True
            await self.close(code=code, reason=reason[:120])


async def _started(client: AsyncGuestClient, cols: int, rows: int) -> None:
    """The terminal runs: the one that is there, or a new one when that has ended."""
    spec = terminal_spec(cols, rows)
    if (await client.process_start(spec)).state != "running":
        await client.process_forget(PROCESS_ID)
        await client.process_start(spec)


def _state_of(sandbox_pk: int) -> str | None:
    return Sandbox.objects.filter(pk=sandbox_pk).values_list("state", flat=True).first()


def _number(query: dict[str, str], name: str, default: int) -> int:
    raw = query.get(name)
    if raw is None:
        return default
    if not (raw.isascii() and raw.isdigit() and len(raw) <= 18):
        raise TerminalRefused(BAD_FRAMES, f"`{name}` is a whole number.")
    return int(raw)


def _is_size(cols: object, rows: object) -> bool:
    return all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in (cols, rows))


def _order(text: str) -> dict[str, Any] | None:
    """None for what is no frame of ours."""
    try:
        frame = json.loads(text)
    except (ValueError, RecursionError):
        return None
    match frame:
        case {"type": "ping" | "take"}:
            return {"type": frame["type"]}
        case {"type": "resize", "cols": cols, "rows": rows} if _is_size(cols, rows):
            return {"type": "resize", "cols": cols, "rows": rows}
    return None

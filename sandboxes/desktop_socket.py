"""`WS /v1/sandboxes/{id}/desktop`: the sandbox's VNC server, its bytes as binary frames, as noVNC speaks it.

The socket is accepted first and then closed with a code, so that a browser can see why. Each direction waits for its
reader: nothing is held but one frame.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from typing import Any, Final
from urllib.parse import parse_qs

import structlog
from channels.generic.websocket import AsyncWebsocketConsumer

from e2a.core.errors import Conflict, E2AError, GuestError
from e2a.core.ids import new_id
from e2a.core.threads import in_thread
from sandboxes.activity import viewer_attached
from sandboxes.guest_client import AsyncGuestClient, ProcessSpec
from sandboxes.models import UNREADY_STATES, Sandbox
from sandboxes.socket_access import (
    BAD_FRAMES,
    BAD_TOKEN,
    ENDED,
    FAILED,
    FRAME_TOO_LARGE,
    NO_SANDBOX,
    SANDBOX_OVER,
    TOO_MANY,
    AttachRefused,
    SandboxGrant,
    running_client,
    sandbox_grant,
    sandbox_row,
    standing_check,
)
from sandboxes.view_only import ViewOnly, ViewOnlyRefused

log = structlog.get_logger(__name__)

VNC_PORT: Final = 5900
START_COMMAND: Final = "command -v desktop-start >/dev/null || exit 0; exec desktop-start"
"""What a template with a desktop has: exits with 0 once its VNC server greets. A server of one's own is fine too."""
START_SECONDS: Final = 60.0
READY_SECONDS: Final = 30.0
CHECK_SECONDS: Final = 2.0
TOUCH_SECONDS: Final = 30.0
STALL_SECONDS: Final = 300.0
FRAME_LIMIT: Final = 1024 * 1024
QUEUE_LIMIT: Final = 64
SOCKETS_PER_SANDBOX: Final = 20
"""In one web process."""
_PIECE: Final = 64 * 1024

_open_sockets: dict[str, int] = {}


class DesktopConsumer(AsyncWebsocketConsumer):
    """One viewer of one desktop; with `view_only=1` what it types and points at is not passed on."""

    channel_layer_alias = ""

    async def connect(self) -> None:
        self.sandbox_id: str = self.scope["url_route"]["kwargs"]["sandbox_id"]
        self.tasks: set[asyncio.Task[None]] = set()
        self.closing = False
        self.is_counted = False
        self.filter: ViewOnly | None = None
        self.sent: asyncio.Queue[bytes] = asyncio.Queue(QUEUE_LIMIT)
        self.writer: asyncio.StreamWriter | None = None
        offered = self.scope.get("subprotocols", [])
        await self.accept("binary" if "binary" in offered else None)
        self.spawn(self.attach())

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self.told(work))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def told(self, work: Coroutine[Any, Any, None]) -> None:
        """Do it; the socket closes with what it raises."""
        try:
            await work
        except AttachRefused as refusal:
            await self.leave(refusal.code, refusal.reason)
        except ViewOnlyRefused as refusal:
            await self.leave(BAD_FRAMES, f"Who looks on may not send {refusal}.")
        except Conflict as error:
            await self.leave(SANDBOX_OVER, error.detail)
        except E2AError as error:
            log.warning("desktop.failed", sandbox=self.sandbox_id, code=error.code, detail=error.detail)
            await self.leave(FAILED, "The sandbox does not answer; reconnect.")
        except TimeoutError:
            await self.leave(TOO_MANY, f"Nothing was read for {STALL_SECONDS:g} s.")
        except OSError:
            await self.leave(FAILED, "The desktop's connection broke; reconnect.")
        except Exception as error:  # A fault of ours must reach the log and the client.
            log.exception("desktop.broken", sandbox=self.sandbox_id, exc_info=error)
            await self.leave(FAILED, "Something failed here; reconnect.")

    async def disconnect(self, code: int) -> None:
        self.closing = True
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=5)
        if self.writer is not None:
            self.writer.transport.abort()
        if self.is_counted:
            left = _open_sockets.pop(self.sandbox_id, 1) - 1
            if left > 0:
                _open_sockets[self.sandbox_id] = left

    async def attach(self) -> None:
        query = {
            name: values[-1]
            for name, values in parse_qs(self.scope["query_string"].decode("latin-1")).items()
        }
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in self.scope["headers"]
        }
        bearer = headers.get("authorization", "")
        token = query.get("token") or (bearer[7:].strip() if bearer.lower().startswith("bearer ") else "")
        if not token:
            raise AttachRefused(BAD_TOKEN, "A token is needed, from POST /v1/sandboxes/{id}/token.")
        if query.get("view_only", "0") not in ("0", "1"):
            raise AttachRefused(BAD_FRAMES, "`view_only` is 0 or 1.")
        if query.get("view_only") == "1":
            self.filter = ViewOnly()
        grant, sandbox = await in_thread(
            sandbox_grant, sandbox_id=self.sandbox_id, token=token, origin=headers.get("origin")
        )
        if _open_sockets.get(self.sandbox_id, 0) >= SOCKETS_PER_SANDBOX:
            raise AttachRefused(TOO_MANY, f"The sandbox has {SOCKETS_PER_SANDBOX} desktops open already.")
        _open_sockets[self.sandbox_id] = _open_sockets.get(self.sandbox_id, 0) + 1
        self.is_counted = True
        client = await self.client_when_ready(sandbox)
        self.spawn(self.watch(grant))
        reader, self.writer = await self.desktop(client)
        self.spawn(self.carry_in(self.writer))
        while piece := await reader.read(_PIECE):
            async with asyncio.timeout(STALL_SECONDS):
                await self.send(bytes_data=piece)
        raise AttachRefused(ENDED, "The desktop has ended.")

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

    async def desktop(self, client: AsyncGuestClient) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Start it where it is not running, and go in."""
        spec = ProcessSpec(id=new_id("desktop"), command=START_COMMAND, timeout_seconds=START_SECONDS)
        started = await client.run(spec)
        if started.exit_code != 0:
            why = started.stderr.decode(errors="replace").strip()[-80:]
            raise AttachRefused(FAILED, f"The desktop did not start: {why}")
        try:
            return await client.tunnel(VNC_PORT)
        except GuestError as error:
            if error.code != "port_closed":
                raise
            raise AttachRefused(
                NO_SANDBOX, "This sandbox has no desktop; the template cua has one."
            ) from error

    async def watch(self, grant: SandboxGrant) -> None:
        """Whether the socket may stay; and that the sandbox is used."""
        touched = time.monotonic()
        while not self.closing:
            await asyncio.sleep(CHECK_SECONDS)
            await in_thread(standing_check, grant)
            if time.monotonic() - touched > TOUCH_SECONDS:
                touched = time.monotonic()
                await in_thread(viewer_attached, grant.sandbox_pk, "desktop", f"{id(self):x}")

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        if self.closing:
            return
        if bytes_data is None:
            await self.leave(BAD_FRAMES, "Frames are binary.")
        elif len(bytes_data) > FRAME_LIMIT:
            await self.leave(FRAME_TOO_LARGE, "A frame has at most 1 MiB.")
        else:
            try:
                self.sent.put_nowait(bytes_data)
            except asyncio.QueueFull:
                await self.leave(TOO_MANY, f"{QUEUE_LIMIT} frames wait already.")

    async def carry_in(self, writer: asyncio.StreamWriter) -> None:
        while True:
            data = await self.sent.get()
            if self.filter is not None:
                data = self.filter.feed(data)
            writer.write(data)
            async with asyncio.timeout(STALL_SECONDS):
                await writer.drain()

    async def leave(self, code: int, reason: str) -> None:
        if not self.closing:
            self.closing = True
            with contextlib.suppress(RuntimeError):
                await self.close(code=code, reason=reason[:120])

"""The session's WebSocket. It is accepted first and then closed with a code, so that a browser can see why.

Reading and writing are two things: `receive` translates what the client says and never waits for more than a query;
one pump task per socket sends the log from a cursor. Hints wake the pump; what they carry is sent when it is exactly
the next frame, and read from the log otherwise, so a lost or late hint costs latency only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import Coroutine
from typing import Any, Final

import structlog
from channels.generic.websocket import AsyncWebsocketConsumer
from django.db import DatabaseError

from e2a.core.clock import now
from e2a.core.errors import Conflict, E2AError
from e2a.core.ids import new_id
from e2a.core.sockets import FrameRate, hear_hints
from e2a.core.threads import in_thread
from sandboxes.activity import BEAT_SECONDS
from sessions_app import client_frames
from sessions_app import log as event_log
from sessions_app.idling import session_ending
from sessions_app.models import Session, SessionStatus
from sessions_app.services import session_view_left, session_viewed
from sessions_app.socket_access import (
    BAD_FRAMES,
    BAD_TOKEN,
    FRAME_TOO_LARGE,
    NO_AUTH,
    SESSION_OVER,
    TOO_MANY,
    SocketGrant,
    SocketRefused,
    socket_grant,
)

log = structlog.get_logger(__name__)

AUTH_SECONDS: Final = 10.0
CHECK_SECONDS: Final = 3.0
"""How often an idle pump compares its cursor with the log (SECURITY 7.4)."""
END_LOOK_SECONDS: Final = 5.0
"""How often a socket looks when its session ends: the end may be moved at any time."""
STALL_SECONDS: Final = 300.0
"""A reader that takes nothing for so long is closed with 4429."""
FRAME_LIMIT: Final = 1024 * 1024
BAD_FRAME_LIMIT: Final = 10
RATE: Final = (120, 60.0)
"""Client frames per seconds (SECURITY 7.6: 100 a minute and a burst of 20)."""
SOCKETS_PER_SESSION: Final = 20
"""In one web process."""
CLOSE_SECONDS: Final = 5.0
"""What the tasks of a closing socket may take to end; they have nothing to wait for but a query."""
ORDERS_LIMIT: Final = 64
"""Client frames that wait to be carried out; more are refused."""


_open_sockets: dict[int, int] = {}


class SessionConsumer(AsyncWebsocketConsumer):
    """One socket of one session."""

    channel_layer_alias = ""  # See `hear_hints`.
    grant: SocketGrant | None = None
    cursor: int = 0

    async def connect(self) -> None:
        self.session_id: str = self.scope["url_route"]["kwargs"]["session_id"]
        self.hints: deque[dict[str, Any]] = deque(maxlen=64)
        self.wake = asyncio.Event()
        self.replay_from: int | None = None
        self.revoked: SocketRefused | None = None
        self.pump: asyncio.Task[None] | None = None
        self.others: set[asyncio.Task[None]] = set()
        self.bad_frames = 0
        self.rate = FrameRate(*RATE)
        self.closing = False
        self.viewer_id = new_id("view")
        self.must_look = False
        self.orders: asyncio.Queue[client_frames.ClientFrame] = asyncio.Queue(maxsize=ORDERS_LIMIT)
        await self.accept()
        query = _query(self.scope)
        self.headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in self.scope["headers"]
        }
        self.origin = self.headers.get("origin")
        after = query.get("after")
        if after is not None:
            if not (after.isascii() and after.isdigit() and len(after) <= 18):
                await self.refuse(SocketRefused(BAD_FRAMES, "`after` is a whole number."))
                return
            self.replay_from = int(after)
        token = query.get("token")
        bearer = self.headers.get("authorization", "")
        if token is None and bearer.lower().startswith("bearer "):
            token = bearer[7:].strip()
        if token is not None:
            await self.authenticate(token)
        else:
            self.spawn(self.expect_auth())

    async def expect_auth(self) -> None:
        """The third way in: the first message. Nothing else is held for the socket until then."""
        await asyncio.sleep(AUTH_SECONDS)
        if self.grant is None:
            await self.refuse(SocketRefused(NO_AUTH, f"No token within {AUTH_SECONDS:g} s."))

    async def authenticate(self, token: str) -> None:
        try:
            grant = await in_thread(socket_grant, session_id=self.session_id, token=token, origin=self.origin)
        except SocketRefused as refusal:
            await self.refuse(refusal)
            return
        if _open_sockets.get(grant.session_pk, 0) >= SOCKETS_PER_SESSION:
            await self.refuse(
                SocketRefused(TOO_MANY, f"The session has {SOCKETS_PER_SESSION} sockets already.")
            )
            return
        self.grant = grant
        _open_sockets[grant.session_pk] = _open_sockets.get(grant.session_pk, 0) + 1
        self.pump = asyncio.create_task(self.run_pump(grant))
        self.spawn(self.hear_hints(grant))
        self.spawn(self.carry_out(grant))
        self.spawn(self.be_seen(grant))

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Keep a task until it is done; all are cancelled with the socket."""
        task = asyncio.create_task(work)
        self.others.add(task)
        task.add_done_callback(self.others.discard)

    async def disconnect(self, code: int) -> None:
        self.closing = True
        tasks = [*self.others, *([self.pump] if self.pump else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
        if self.grant is not None:
            left = _open_sockets.get(self.grant.session_pk, 1) - 1
            if left > 0:
                _open_sockets[self.grant.session_pk] = left
            else:
                _open_sockets.pop(self.grant.session_pk, None)
            with contextlib.suppress(
                DatabaseError
            ):  # A session that is not told of it finds out within 75 s.
                await in_thread(session_view_left, self.grant.session_pk, self.viewer_id)

    async def refuse(self, refusal: SocketRefused) -> None:
        """Close with the code that says why."""
        if self.closing:
            return
        self.closing = True
        await self.close(code=refusal.code, reason=refusal.reason[:120])

    # -- from the client

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        if self.closing:
            return
        if (
            len(text_data or "") > FRAME_LIMIT
            or len((text_data or "").encode()) > FRAME_LIMIT
            or (bytes_data is not None and len(bytes_data) > FRAME_LIMIT)
        ):
            await self.refuse(SocketRefused(FRAME_TOO_LARGE, "A frame has at most 1 MiB."))
            return
        if not self.rate.takes():
            await self.refuse(SocketRefused(TOO_MANY, f"More than {RATE[0]} frames in {RATE[1]:g} s."))
            return
        try:
            frame = client_frames.parse(text_data)
            await self.handle(frame)
        except client_frames.BadFrame as bad:
            await self.complain(bad)
        except E2AError as error:
            await self.say({"type": "error", "code": error.code, "detail": error.detail, "retry": "terminal"})

    async def complain(self, bad: client_frames.BadFrame) -> None:
        """A bad frame gets an `error`, ten in all get the door."""
        self.bad_frames += 1
        await self.say({"type": "error", "code": bad.code, "detail": bad.detail, "retry": "terminal"})
        if self.bad_frames >= BAD_FRAME_LIMIT:
            await self.refuse(SocketRefused(BAD_FRAMES, f"{BAD_FRAME_LIMIT} bad frames."))

    async def handle(self, frame: client_frames.ClientFrame) -> None:
        if isinstance(frame, client_frames.Ping):
            await self.say({"type": "pong"} | ({} if frame.data is None else {"data": frame.data}))
            return
        if isinstance(frame, client_frames.Auth):
            if self.grant is None:
                if frame.after is not None:
                    self.replay_from = frame.after
                await self.authenticate(frame.token)
            return
        if self.grant is None:
            raise client_frames.BadFrame(
                "auth_needed", 'Say who you are first: {"type": "auth", "token": …}.'
            )
        if isinstance(frame, client_frames.Resume):
            self.replay_from = frame.after
            self.wake.set()
            return
        try:
            self.orders.put_nowait(frame)
        except asyncio.QueueFull:
            raise Conflict(f"{ORDERS_LIMIT} frames wait already.", code="too_busy") from None

    async def carry_out(self, grant: SocketGrant) -> None:
        """What changes something, in the order it was said; off the reading path, so that `ping` is answered."""
        while True:
            frame = await self.orders.get()
            try:
                await in_thread(client_frames.act, frame, grant.session_pk)
            except E2AError as error:
                await self.say(_refusal(error.code, error.detail, frame))
            except (
                Exception
            ) as error:  # A fault of ours must reach the client and the log, not end this task.
                log.exception("socket.act_failed", exc_info=error)
                await self.say(_refusal("internal_error", "Something failed here.", frame))

    async def say(self, frame: dict[str, Any]) -> None:
        if not self.closing:
            await self.send(text_data=json.dumps(frame, ensure_ascii=False))

    # -- its life

    async def be_seen(self, grant: SocketGrant) -> None:
        """For as long as the socket is open its session does not idle."""
        is_first = True
        while not self.closing:
            try:
                await in_thread(session_viewed, grant.session_pk, self.viewer_id)
            except DatabaseError as error:
                log.warning("socket.database", session=grant.session_public_id, error=str(error)[:200])
            if is_first:
                is_first = False
                self.spawn(self.tell_of_end(grant))  # Not before it is seen: an end for idleness is off then.
            await asyncio.sleep(BEAT_SECONDS)

    async def tell_of_end(self, grant: SocketGrant) -> None:
        """One `expiring` each time the session's end comes near; an end that was moved away may come near again."""
        is_told = False
        while not self.closing:
            pause = END_LOOK_SECONDS
            try:
                ending = await in_thread(session_ending, grant.session_pk)
            except DatabaseError as error:
                log.warning("socket.database", session=grant.session_public_id, error=str(error)[:200])
                ending = None
            if ending is not None:
                left = (ending.at - now()).total_seconds()
                is_near = left <= ending.warn_seconds
                if is_near and not is_told:
                    frame = {"seconds_left": max(0, round(left)), "alive_because": ending.alive_because}
                    await self.say({"type": "expiring", **frame})
                is_told = is_near
                if not is_near:
                    pause = min(END_LOOK_SECONDS, left - ending.warn_seconds)
            await asyncio.sleep(max(0.1, pause))

    # -- hints

    async def hear_hints(self, grant: SocketGrant) -> None:
        """Take the session's hints for as long as the socket is open; without them it is served from the log,
        `CHECK_SECONDS` late."""

        def look() -> None:
            self.must_look = True
            self.wake.set()

        takers = {
            "log.hint": self.log_hint,
            "session.over": self.session_over,
            "session.revoked": self.session_revoked,
        }
        group = event_log.group_of(grant.session_public_id)
        await hear_hints(group, takers=takers, on_listening=look, is_over=lambda: self.closing)

    async def log_hint(self, message: dict[str, Any]) -> None:
        self.hints.append(message)
        self.wake.set()

    async def session_over(self, message: dict[str, Any]) -> None:
        self.must_look = True
        self.wake.set()

    async def session_revoked(self, message: dict[str, Any]) -> None:
        self.revoked = SocketRefused(BAD_TOKEN, "The key or token of this session was revoked.")
        self.wake.set()

    # -- to the client

    async def run_pump(self, grant: SocketGrant) -> None:
        """Send the log from the cursor until the session is over or the socket is."""
        try:
            await self.pump_log(grant)
        except SocketRefused as refusal:
            await self.refuse(refusal)
        except TimeoutError:
            await self.refuse(SocketRefused(TOO_MANY, f"Nothing was read for {STALL_SECONDS:g} s."))
        except asyncio.CancelledError:
            raise
        except (
            Exception
        ) as error:  # Its end must close the socket, so that the client comes back and resumes.
            log.exception("socket.pump_failed", session=grant.session_public_id, exc_info=error)
            await self.refuse(SocketRefused(1011, "Something failed here; reconnect and resume."))

    async def pump_log(self, grant: SocketGrant) -> None:
        """Hints that continue at the cursor are sent as they come; the log is asked when one does not, when nothing
        came for `CHECK_SECONDS`, and when the session is said to be over."""
        self.cursor = grant.last_seq
        await self.push({"type": "ready", "session": grant.session, "seq": grant.last_seq})
        self.must_look = True
        while True:
            if self.revoked is not None:
                raise self.revoked
            if self.replay_from is not None:
                after, self.replay_from = self.replay_from, None
                await self.replay(grant, after)
                self.must_look = True
                continue
            frames = self.next_hint()
            if frames is not None:
                for text in frames:
                    await self.push_text(text)
                    self.cursor += 1
                continue
            if self.must_look or self.hints:
                self.must_look = False
                if await self.send_stored(grant):
                    self.must_look = True
                    continue
                await in_thread(_standing_check, grant, self.cursor)
            await self.sleep()

    async def sleep(self) -> None:
        """Until a hint comes, or it is time to look at the log."""
        self.wake.clear()
        if self.hints or self.must_look or self.replay_from is not None or self.revoked is not None:
            return
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                await self.wake.wait()
        except TimeoutError:
            self.must_look = True

    def next_hint(self) -> list[str] | None:
        """The frames of a hint that continue exactly at the cursor; stale hints are dropped."""
        while self.hints:
            hint = self.hints[0]
            if hint["last"] <= self.cursor:
                self.hints.popleft()
                continue
            if hint["first"] != self.cursor + 1 or "frames" not in hint:
                return None
            self.hints.popleft()
            frames: list[str] = hint["frames"]
            return frames
        return None

    async def replay(self, grant: SocketGrant, after: int) -> None:
        """From `after` + 1 to the head, then `caught_up`; a cursor that is too old or ahead gets `resync`."""
        first, head = await in_thread(_bounds, grant.session_pk)
        if after > head or after < first - 1:
            await self.push({"type": "resync", "from": first, "head": head})
            after = first - 1
        self.cursor = after
        while self.cursor < head:
            if not await self.send_stored(grant):
                break
        await self.push({"type": "caught_up", "seq": self.cursor})

    async def send_stored(self, grant: SocketGrant) -> bool:
        """One page from the log; False when there was none. A hint that follows on is better than a query."""
        stored = await in_thread(event_log.read, grant.session_pk, after=self.cursor)
        for frame in stored:
            await self.push(frame.as_json())
            self.cursor = frame.seq
        return bool(stored)

    async def push(self, frame: dict[str, Any]) -> None:
        await self.push_text(json.dumps(frame, ensure_ascii=False))

    async def push_text(self, text: str) -> None:
        """Send, waiting for the reader: it is served at its own pace and nothing is buffered for it."""
        if self.closing:
            raise asyncio.CancelledError
        async with asyncio.timeout(STALL_SECONDS):
            await self.send(text_data=text)


def _refusal(code: str, detail: str, frame: client_frames.ClientFrame) -> dict[str, Any]:
    """An `error` about one client frame; a task's own `id` says which."""
    body = {"type": "error", "code": code, "detail": detail, "retry": "terminal"}
    if isinstance(frame, client_frames.SubmitTask) and frame.client_id is not None:
        body["id"] = frame.client_id
    return body


def _query(scope: dict[str, Any]) -> dict[str, str]:
    from urllib.parse import parse_qs

    return {name: values[-1] for name, values in parse_qs(scope["query_string"].decode("latin-1")).items()}


def _bounds(session_pk: int) -> tuple[int, int]:
    return Session.objects.values_list("first_seq", "last_seq").get(pk=session_pk)


def _standing_check(grant: SocketGrant, cursor: int) -> None:
    """Raises `SocketRefused` when the token was voided, or when the session has ended and all of it was sent."""
    row = Session.objects.filter(pk=grant.session_pk, tenant__suspended_at__isnull=True).exclude(
        created_by__is_active=False
    )
    standing = row.values_list("status", "last_seq", "token_version", "end_reason").first()
    if standing is None or standing[2] != grant.token_version:
        raise SocketRefused(BAD_TOKEN, "The token was revoked.")
    if standing[0] == SessionStatus.ENDED and standing[1] <= cursor:
        raise SocketRefused(SESSION_OVER, f"The session has ended: {standing[3]}.")

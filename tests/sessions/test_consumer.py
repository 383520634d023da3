"""The socket's reader without a server around it: lost and doubled hints, stale tokens, origins (ARCHITECTURE 5)."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from channels.routing import URLRouter
from channels.testing import WebsocketCommunicator
from django.db import transaction

from accounts.models import Tenant, User
from accounts.tokens import session_token_issue
from e2a.core.clock import now
from e2a.core.hints import publish
from e2a.core.origins import origin_allowed
from e2a.routing import websocket_urlpatterns
from sessions_app import consumers, frames, log
from sessions_app.models import Session, SessionStatus
from sessions_app.services import session_token

pytestmark = pytest.mark.django_db(transaction=True)

Frames = list[dict[str, Any]]


@asynccontextmanager
async def socket(
    session: Session, token: str | None = None, query: str = "", origin: str | None = None
) -> AsyncIterator[WebsocketCommunicator]:
    """A socket of that session, accepted; with a valid token unless another is given."""
    if token is None:
        token = (await sync_to_async(session_token)(session))[0]
    path = f"/v1/sessions/{session.public_id}/ws?token={token}{query}"
    headers = [] if origin is None else [(b"origin", origin.encode())]
    communicator = WebsocketCommunicator(URLRouter(websocket_urlpatterns), path, headers=headers)
    accepted, _ = await communicator.connect(timeout=10)
    assert accepted
    try:
        yield communicator
    finally:
        await communicator.disconnect(timeout=10)


async def hear(communicator: WebsocketCommunicator, count: int, *, seconds: float = 8.0) -> Frames:
    """The next `count` frames."""
    async with asyncio.timeout(seconds):
        return [json.loads(await communicator.receive_from(timeout=seconds)) for _ in range(count)]


async def closed(communicator: WebsocketCommunicator, *, seconds: float = 8.0) -> tuple[int, Frames]:
    """The close code, and the frames before it."""
    heard: Frames = []
    async with asyncio.timeout(seconds):
        while True:
            message = await communicator.receive_output(timeout=seconds)
            if message["type"] == "websocket.close":
                return message["code"], heard
            heard.append(json.loads(message["text"]))


@sync_to_async
def write(session: Session, *texts: str) -> None:
    """Frames in the log, in one transaction, with their hint."""
    with transaction.atomic():
        log.append(session, [frames.status("idle", detail=text) for text in texts])


@pytest.fixture
def lose_hints(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on no hint is sent."""
    return lambda: monkeypatch.setattr(log, "hint", lambda *args: None)


# -- hints


async def test_a_lost_hint_costs_seconds_and_no_frame(
    session: Session, lose_hints: Callable[[], None]
) -> None:
    """SECURITY 7.4."""
    async with socket(session) as client:
        assert (await hear(client, 1))[0]["type"] == "ready"
        await write(session, "one")
        assert [f["detail"] for f in await hear(client, 1)] == ["one"]
        lose_hints()
        await write(session, "two", "three")
        started = time.monotonic()
        assert [(f["seq"], f["detail"]) for f in await hear(client, 2)] == [(2, "two"), (3, "three")]
        assert time.monotonic() - started < consumers.CHECK_SECONDS + 2


async def test_a_hint_after_lost_ones_brings_all_in_order(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with socket(session) as client:
        await hear(client, 1)
        with monkeypatch.context() as patch:
            patch.setattr(log, "hint", lambda *args: None)
            await write(session, "one", "two")
        await write(session, "three")
        assert [f["seq"] for f in await hear(client, 3, seconds=2)] == [1, 2, 3]


async def test_doubled_late_and_empty_hints_change_nothing(session: Session) -> None:
    group = log.group_of(session.public_id)
    async with socket(session) as client:
        await hear(client, 1)
        await write(session, "one", "two")
        assert [f["seq"] for f in await hear(client, 2)] == [1, 2]
        stale = {"type": "log.hint", "first": 1, "last": 2, "frames": ['{"seq": 1}', '{"seq": 2}']}
        ahead = {"type": "log.hint", "first": 9, "last": 9, "frames": ['{"seq": 9}']}
        bare = {"type": "log.hint", "first": 3, "last": 3}
        for hint in (stale, ahead, stale, bare):
            await sync_to_async(publish)(group, hint)
        await write(session, "three")
        assert [(f["seq"], f["detail"]) for f in await hear(client, 1)] == [(3, "three")]
        assert await client.receive_nothing(timeout=0.3)


async def test_a_large_batch_is_read_from_the_log(session: Session) -> None:
    """A hint carries at most 64 KiB; the rest is read, a page of 500 at a time."""
    async with socket(session) as client:
        await hear(client, 1)
        await write(session, *["x" * 200] * 1200)
        assert [f["seq"] for f in await hear(client, 1200, seconds=20)] == list(range(1, 1201))


async def test_frames_that_are_written_during_a_replay_come_once(session: Session) -> None:
    await write(session, *[str(n) for n in range(700)])
    async with socket(session, query="&after=0") as client:
        writing = asyncio.create_task(write_slowly(session, 50))
        heard = await hear(client, 752, seconds=20)
        await writing
    assert heard[0]["type"] == "ready"
    stored = [f for f in heard if f["type"] == "status"]
    assert [f["seq"] for f in stored] == list(range(1, 751))
    assert [f["type"] for f in heard].count("caught_up") == 1


async def write_slowly(session: Session, count: int) -> None:
    for number in range(count):
        await write(session, f"later {number}")


# -- cursors


@pytest.mark.parametrize(("after", "resyncs"), [(0, True), (3, True), (4, False), (8, False), (9, True)])
async def test_a_cursor_outside_of_the_log_is_told_to_resync(
    session: Session, after: int, resyncs: bool
) -> None:
    """SECURITY 7.3: frames 1 to 4 are no longer kept."""
    await write(session, *"12345678")
    await sync_to_async(session.events.filter(seq__lt=5).delete)()
    await sync_to_async(Session.objects.filter(pk=session.pk).update)(first_seq=5)
    async with socket(session, query=f"&after={after}") as client:
        assert (await hear(client, 1))[0]["type"] == "ready"
        if resyncs:
            assert await hear(client, 1) == [{"type": "resync", "from": 5, "head": 8}]
        start = 5 if resyncs else after + 1
        heard = await hear(client, 9 - start + 1)
        assert [f["seq"] for f in heard] == [*range(start, 9), 8]
        assert heard[-1]["type"] == "caught_up"


# -- tokens


async def test_an_expired_token_closes_with_4401(session: Session, alice: Any) -> None:
    def issue(version: int, seconds: int) -> str:
        return session_token_issue(
            session_public_id=session.public_id, tenant_public_id=alice.tenant.public_id, version=version,
            expires_at=now() + dt.timedelta(seconds=seconds),
        )  # fmt: skip

    for token, accepted in (
        (issue(1, 60), True),
        (issue(1, -60), False),
        (issue(2, 60), False),
        (issue(0, 60), False),
    ):
        async with socket(session, token) as client:
            if accepted:
                assert (await hear(client, 1))[0]["type"] == "ready"
            else:
                assert await closed(client) == (4401, [])


async def test_an_open_socket_outlives_its_token_but_not_its_tenants_suspension(
    session: Session, alice: Any
) -> None:
    """CONTRACT 5 and SECURITY 2.5: within 5 s."""
    token = session_token_issue(
        session_public_id=session.public_id, tenant_public_id=alice.tenant.public_id, version=1,
        expires_at=now() + dt.timedelta(seconds=1),
    )  # fmt: skip
    async with socket(session, token) as client:
        await hear(client, 1)
        await sync_to_async(Tenant.objects.filter(pk=alice.tenant_id).update)(suspended_at=now())
        assert await closed(client, seconds=5) == (4401, [])
    async with socket(session, token) as client:
        assert await closed(client) == (4401, [])


async def test_a_voided_token_closes_even_when_the_message_is_lost(session: Session) -> None:
    async with socket(session) as client:
        await hear(client, 1)
        await sync_to_async(Session.objects.filter(pk=session.pk).update)(token_version=2)
        assert await closed(client, seconds=5) == (4401, [])


async def test_an_end_whose_message_is_lost_is_noticed(
    session: Session, lose_hints: Callable[[], None]
) -> None:
    async with socket(session) as client:
        await hear(client, 1)
        lose_hints()
        await write(session, "last")
        await sync_to_async(Session.objects.filter(pk=session.pk).update)(status=SessionStatus.ENDED)
        code, heard = await closed(client)
        assert (code, [f["detail"] for f in heard]) == (4410, ["last"])


async def test_a_revoked_key_voids_the_tokens_of_its_ended_sessions_too(
    make_session: Callable[..., Session], alice: Any
) -> None:
    """Their logs can be read for a while: not by whom the key was taken from."""
    from keys.services import key_issue, key_revoke
    from sessions_app.tasks import key_revoked

    @sync_to_async
    def prepare() -> tuple[Session, str, Session, int]:
        issued = key_issue(user=alice)
        over, other = make_session(api_key=issued.row), make_session()
        token = session_token(over)[0]
        Session.objects.filter(pk=over.pk).update(status=SessionStatus.ENDED, ended_at=now())
        key_revoke(key=issued.row, actor=alice)
        return over, token, other, issued.row.pk

    over, token, other, key_pk = await prepare()
    async with socket(over, token) as client:
        assert (await closed(client))[0] == 4410
    await sync_to_async(key_revoked)(key_pk)
    async with socket(over, token) as client:
        assert await closed(client) == (4401, [])
    async with socket(other) as client:
        assert (await hear(client, 1))[0]["type"] == "ready"


async def test_no_auth_in_time_closes_with_4408(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumers, "AUTH_SECONDS", 0.2)
    path = f"/v1/sessions/{session.public_id}/ws"
    client = WebsocketCommunicator(URLRouter(websocket_urlpatterns), path)
    await client.connect()
    assert await closed(client) == (4408, [])


# -- origins


@pytest.mark.usefixtures("in_production")
async def test_a_page_of_an_origin_that_is_not_listed_closes_with_4403(session: Session, alice: Any) -> None:
    await sync_to_async(Tenant.objects.filter(pk=alice.tenant_id).update)(
        allowed_origins=["https://shop.example"]
    )
    for origin, accepted in (
        (None, True), ("https://shop.example", True), ("https://evil.example", False),
        ("https://shop.example.evil.example", False), ("http://shop.example", False), ("null", False),
        ("http://localhost:3000", False), ("", False),
    ):  # fmt: skip
        async with socket(session, origin=origin) as client:
            if accepted:
                assert (await hear(client, 1))[0]["type"] == "ready"
            else:
                assert await closed(client) == (4403, []), origin


@pytest.mark.parametrize(
    ("origin", "in_development", "in_operation"),
    [
        ("http://localhost:5173", True, False),
        ("http://127.0.0.1", True, False),
        ("http://[::1]:80", True, False),
        ("http://app.localhost:8000", True, False),
        ("null", True, False),
        ("https://shop.example", True, True),
        ("https://shop.example:8443", False, False),
        ("https://sub.shop.example", False, False),
        ("https://localhost.evil.example", False, False),
        ("https://evil.example", False, False),
        ("https://evil.example#localhost", False, False),
        ("https://localhost@evil.example", False, False),
        ("http://[", False, False),
        ("", False, False),
    ],
)
def test_which_origins_may_open_sockets(
    origin: str, in_development: bool, in_operation: bool, request: pytest.FixtureRequest
) -> None:
    allowed = ["https://shop.example"]
    assert origin_allowed(origin, allowed) is in_development
    request.getfixturevalue("in_production")
    assert origin_allowed(origin, allowed) is in_operation


def test_the_operators_own_origins_may_open_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from django.conf import settings

    own = dataclasses.replace(
        settings.E2A, production=True, public_url="https://api.example.com/", rt_url="https://rt.example.com",
        embed_origins=("https://www.example.com",),
    )  # fmt: skip
    monkeypatch.setattr(settings, "E2A", own)
    for origin in ("https://api.example.com", "https://rt.example.com", "https://www.example.com"):
        assert origin_allowed(origin, [])
    assert not origin_allowed("http://api.example.com", [])


async def test_disabling_the_maker_closes_the_socket_and_voids_the_token(
    make_session: Callable[..., Session], alice: Any
) -> None:
    """SECURITY 2.5"""
    session = await sync_to_async(make_session)(created_by=alice)
    token = (await sync_to_async(session_token)(session))[0]
    async with socket(session, token) as communicator:
        assert [frame["type"] for frame in await hear(communicator, 1)] == ["ready"]
        await sync_to_async(User.objects.filter(pk=alice.pk).update)(is_active=False)
        assert (await closed(communicator))[0] == 4401
    async with socket(session, token) as again:
        assert await closed(again) == (4401, [])

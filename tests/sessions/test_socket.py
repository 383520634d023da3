"""The WebSocket as a client meets it: ways in, close codes, replay, order, and what frames do (CONTRACT 6)."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
import websockets

from tests.live import LiveStack, wait_for
from tests.sessions import sockets
from tests.sessions.sockets import close_code, hear, hear_until, is_exit, say, shell_session, url_of

pytestmark = [pytest.mark.docker, pytest.mark.timeout(300)]

MIB = 1024 * 1024
Made = dict[str, Any]


@pytest.fixture(scope="module")
def mallory_live(live: LiveStack) -> str:
    """An API key of another tenant's."""
    return live.api_key("mallory@example.com")


@pytest.fixture(scope="module")
def carol(live: LiveStack) -> str:
    """An account token."""
    return live.sign_in("carol@example.com")


@pytest.fixture(scope="module")
def quiet(live: LiveStack, live_key: str) -> Made:
    """A session in which nothing runs, for what only looks at it."""
    session = shell_session(live, live_key)
    asyncio.run(sockets.run_task(session, "echo here"))
    return session


def is_type(kind: str) -> Any:
    return lambda frame: frame["type"] == kind


def ended(live: LiveStack, key: str, session: Made) -> None:
    assert live.request("DELETE", f"/v1/sessions/{session['chat_session_id']}", token=key).status == 200


def connected(session: Made, way: str, token: str | None = None, **kwargs: Any) -> Any:
    """A socket by one of the three ways in; for `message` the caller still says `auth`."""
    token = session["jwt"] if token is None else token
    if way == "query":
        return websockets.connect(f"{session['connect_url']}?token={token}", **kwargs)
    headers = {"Authorization": f"Bearer {token}"} if way == "header" else {}
    return websockets.connect(session["connect_url"], additional_headers=headers, **kwargs)


async def authenticated(session: Made, way: str, socket: Any, token: str | None = None) -> None:
    if way == "message":
        await say(socket, type="auth", token=session["jwt"] if token is None else token)


WAYS = ["query", "header", "message"]


# -- ways in and close codes


@pytest.mark.parametrize("way", WAYS)
async def test_each_of_the_three_ways_in_is_answered_by_ready(quiet: Made, way: str) -> None:
    async with connected(quiet, way) as socket:
        await authenticated(quiet, way, socket)
        ready = await hear(socket)
        assert ready["type"] == "ready"
        assert ready["session"]["chat_session_id"] == quiet["chat_session_id"]
        assert ready["seq"] == ready["session"]["last_seq"] > 0
        assert "ts" not in ready
        assert "jwt" not in json.dumps(ready)
        await say(socket, type="ping", data={"n": [1]})
        assert await hear(socket) == {"type": "pong", "data": {"n": [1]}}
        await say(socket, type="ping")
        assert await hear(socket) == {"type": "pong"}


@pytest.mark.parametrize("way", WAYS)
async def test_a_token_that_is_none_of_a_stream_closes_with_4401(
    live_key: str, carol: str, quiet: Made, way: str
) -> None:
    head, body, signature = quiet["jwt"].split(".")
    other = "A" if signature[5] != "A" else "B"
    changed = f"{head}.{body}.{signature[:5]}{other}{signature[6:]}"
    for token in ("x", "e2a_live_x", live_key, carol, changed, quiet["jwt"] + ".", "x" * 5000):
        async with connected(quiet, way, token) as socket:
            await authenticated(quiet, way, socket, token)
            code, heard = await close_code(socket)
            assert (code, heard) == (4401, []), token[:20]


async def test_a_token_of_a_sibling_session_closes_with_4403(
    live: LiveStack, live_key: str, quiet: Made
) -> None:
    sibling = shell_session(live, live_key)
    async with connected(quiet, "query", sibling["jwt"]) as socket:
        assert await close_code(socket) == (4403, [])
    ended(live, live_key, sibling)


async def test_a_strangers_session_and_none_at_all_close_alike_with_4404(
    live: LiveStack, quiet: Made, mallory_live: str
) -> None:
    theirs = shell_session(live, mallory_live)
    reasons = set()
    missing = quiet["connect_url"].replace(quiet["chat_session_id"], "ses_aaaaaaaaaaaaaaaaaaaaaaaaaa")
    nonsense = quiet["connect_url"].replace(quiet["chat_session_id"], "%00x")
    for url in (quiet["connect_url"], missing, nonsense):
        async with websockets.connect(f"{url}?token={theirs['jwt']}") as socket:
            assert await close_code(socket) == (4404, [])
            reasons.add(socket.close_reason)
    assert len(reasons) == 1
    ended(live, mallory_live, theirs)


async def test_an_ended_session_replays_what_was_asked_for_and_closes_with_4410(
    live: LiveStack, live_key: str
) -> None:
    session = shell_session(live, live_key)
    heard = await sockets.run_task(session, "echo last words")
    ended(live, live_key, session)
    async with websockets.connect(url_of(session)) as socket:
        code, frames = await close_code(socket)
        assert (code, [f["type"] for f in frames]) == (4410, ["ready"])
    async with websockets.connect(url_of(session, after=0)) as socket:
        code, frames = await close_code(socket)
        assert code == 4410
        assert frames[0]["type"] == "ready"
        assert frames[-1] == {"type": "caught_up", "seq": frames[-2]["seq"]}
        sockets.assert_gapless(frames)
        assert frames[-2]["status"] == "ended"
        assert sockets.output_of(frames) == sockets.output_of(heard) == "last words\n"
    async with connected(session, "message") as socket:
        await say(socket, type="auth", token=session["jwt"], after=frames[-2]["seq"] - 1)
        code, rest = await close_code(socket)
        assert (code, [f["type"] for f in rest]) == (4410, ["ready", "status", "caught_up"])


async def test_an_open_socket_hears_the_end_and_closes_with_4410(live: LiveStack, live_key: str) -> None:
    session = shell_session(live, live_key)
    async with websockets.connect(url_of(session)) as socket:
        await hear_until(socket, is_type("ready"))
        await say(socket, type="task", prompt="sleep 100")
        await hear_until(socket, is_type("task_started"))
        await asyncio.to_thread(ended, live, live_key, session)
        code, frames = await close_code(socket)
        assert code == 4410
        assert [f["type"] for f in frames] == ["exit", "status"]
        assert (frames[0]["exit_code"], frames[1]["status"], frames[1]["end_reason"]) == (
            130,
            "ended",
            "user",
        )


async def test_silence_closes_with_4408_after_ten_seconds(quiet: Made) -> None:
    async with websockets.connect(quiet["connect_url"]) as socket:
        started = time.monotonic()
        await say(socket, type="ping")
        assert (await hear(socket))["type"] == "pong"
        await say(socket, type="task", prompt="echo no")
        assert (await hear(socket))["code"] == "auth_needed"
        assert await close_code(socket, seconds=20) == (4408, [])
        assert 9.5 < time.monotonic() - started < 15


@pytest.mark.parametrize("frame", ["x" * (MIB + 1), "é" * (MIB // 2 + 1), b"\0" * (MIB + 1)])
async def test_a_frame_over_one_mib_closes_with_4413(quiet: Made, frame: str | bytes) -> None:
    async with websockets.connect(url_of(quiet)) as socket:
        await hear_until(socket, is_type("ready"))
        await socket.send(frame)
        assert await close_code(socket) == (4413, [])


async def test_a_frame_of_one_mib_is_read(quiet: Made) -> None:
    async with websockets.connect(url_of(quiet)) as socket:
        await hear_until(socket, is_type("ready"))
        empty = json.dumps({"type": "ping", "data": ""})
        await say(socket, type="ping", data="x" * (MIB - len(empty)))
        assert (await hear(socket))["type"] == "pong"


async def test_too_many_frames_in_a_minute_close_with_4429(quiet: Made) -> None:
    async with websockets.connect(url_of(quiet)) as socket:
        await hear_until(socket, is_type("ready"))
        for _ in range(121):
            await say(socket, type="ping")
        code, heard = await close_code(socket)
        assert code == 4429
        assert [f["type"] for f in heard] == ["pong"] * 120


async def test_the_twenty_first_socket_closes_with_4429_and_a_place_that_is_left_is_free(quiet: Made) -> None:
    open_sockets = [await websockets.connect(url_of(quiet)) for _ in range(20)]
    try:
        for socket in open_sockets:
            await hear_until(socket, is_type("ready"))
        async with websockets.connect(url_of(quiet)) as one_more:
            assert await close_code(one_more) == (4429, [])
        await open_sockets.pop().close()
        async with asyncio.timeout(10):
            while True:
                async with websockets.connect(url_of(quiet)) as one_more:
                    try:
                        assert (await hear(one_more))["type"] == "ready"
                        break
                    except websockets.exceptions.ConnectionClosed:
                        assert one_more.close_code == 4429
    finally:
        for socket in open_sockets:
            await socket.close()


BAD: list[tuple[str, str | bytes]] = [
    ("not_text", b"\xff\xfe"),
    ("malformed_json", "{"),
    ("malformed_json", '{"type": "ping", "type": "ping"}'),
    ("malformed_json", '{"type": "ping", "data": NaN}'),
    ("malformed_json", '{"type": "ping", "data": ' + "[" * 60 + "]" * 60 + "}"),
    ("malformed_frame", "[]"),
    ("malformed_frame", '{"type": 5}'),
    ("unknown_type", '{"type": "dance"}'),
    ("missing_field", '{"type": "task"}'),
    ("unknown_field", '{"type": "task", "prompt": "x", "colour": 1}'),
    ("invalid_field", '{"type": "task", "prompt": 5}'),
    ("invalid_field", '{"type": "task", "prompt": "x", "id": ""}'),
    ("malformed_json", '{"type": "task", "prompt": "x", "id": "a\\u0000"}'),
    ("invalid_field", '{"type": "resume", "after": -1}'),
    ("invalid_field", '{"type": "resume", "after": true}'),
    ("invalid_field", '{"type": "stdin", "data": "x", "eof": 1}'),
    ("invalid_field", '{"type": "cancel", "task_id": 5}'),
    ("not_built", '{"type": "approval", "approval_id": "a", "decision": "allow"}'),
]


async def test_bad_frames_are_answered_and_the_socket_stays_open_until_the_tenth(quiet: Made) -> None:
    for start in (0, 9):
        async with websockets.connect(url_of(quiet)) as socket:
            await hear_until(socket, is_type("ready"))
            for code, text in BAD[start : start + 9]:
                await socket.send(text)
                error = await hear(socket)
                assert (error["type"], error["code"], error["retry"]) == ("error", code, "terminal"), text
                assert "seq" not in error
            await say(socket, type="ping")
            assert (await hear(socket))["type"] == "pong"
            await socket.send("{")
            closed_with, heard = await close_code(socket)
            assert (closed_with, [f["code"] for f in heard]) == (4400, ["malformed_json"])


@pytest.mark.parametrize("after", ["x", "-1", "1.5", "9" * 19])
async def test_an_after_that_is_no_number_closes_with_4400(quiet: Made, after: str) -> None:
    async with websockets.connect(f"{url_of(quiet)}&after={after}") as socket:
        assert await close_code(socket) == (4400, [])


# -- replay


async def test_after_replays_from_there_and_says_caught_up(quiet: Made) -> None:
    async with websockets.connect(url_of(quiet, after=0)) as socket:
        whole = await hear_until(socket, is_type("caught_up"))
    head = whole[0]["seq"]
    assert [f["seq"] for f in whole] == [head, *range(1, head + 1), head]
    assert [f["type"] for f in whole[1:5]] == ["status", "task_queued", "status", "task_started"]
    async with websockets.connect(url_of(quiet, after=3)) as socket:
        part = await hear_until(socket, is_type("caught_up"))
        assert part[1:] == whole[4:]
        await say(socket, type="resume", after=head - 1)
        assert await hear_until(socket, is_type("caught_up")) == whole[-2:]
        await say(socket, type="resume", after=head)
        assert await hear(socket) == {"type": "caught_up", "seq": head}


async def test_a_cursor_that_is_ahead_is_told_to_resync_and_gets_all(quiet: Made) -> None:
    async with websockets.connect(url_of(quiet, after=10**6)) as socket:
        heard = await hear_until(socket, is_type("caught_up"))
    head = heard[0]["seq"]
    assert heard[1] == {"type": "resync", "from": 1, "head": head}
    assert [f["seq"] for f in heard[2:-1]] == list(range(1, head + 1))
    assert heard[-1] == {"type": "caught_up", "seq": head}


async def test_two_sockets_see_the_same_frames_in_the_same_order(live: LiveStack, live_key: str) -> None:
    session = shell_session(live, live_key)
    async with websockets.connect(url_of(session)) as one, websockets.connect(url_of(session)) as two:
        await hear_until(one, is_type("ready"))
        await hear_until(two, is_type("ready"))
        await say(one, type="task", prompt="for i in $(seq 1 300); do echo $i; echo e$i >&2; done")
        first, second = await asyncio.gather(hear_until(one, is_exit), hear_until(two, is_exit))
    assert first == second
    sockets.assert_gapless(first, first=first[0]["seq"])
    assert sockets.output_of(first) == "".join(f"{n}\n" for n in range(1, 301))
    assert first == sockets.stored(live, live_key, session)[first[0]["seq"] - 1 :][: len(first)]
    ended(live, live_key, session)


# -- tasks


async def test_a_task_id_is_run_once_over_two_sockets(live: LiveStack, live_key: str) -> None:
    """SECURITY 7.7."""
    session = shell_session(live, live_key)
    async with websockets.connect(url_of(session)) as one, websockets.connect(url_of(session)) as two:
        await hear_until(one, is_type("ready"))
        await hear_until(two, is_type("ready"))
        for _ in range(3):
            await say(one, type="task", prompt="echo ran >> runs; cat runs", id="a")
            await say(two, type="task", prompt="echo ran >> runs; cat runs", id="a")
        done = (await hear_until(one, is_exit))[-1]
        await say(two, type="task", prompt="echo ran >> runs; cat runs", id="a")
        await say(two, type="task", prompt="cat runs")
        frames = await hear_until(two, lambda f: is_exit(f) and f["task_id"] != done["task_id"])
    queued = [f for f in frames if f["type"] == "task_queued"]
    assert [f.get("id") for f in queued] == ["a", None]
    assert sockets.output_of(frames) == "ran\nran\n"
    ended(live, live_key, session)


async def test_ping_is_answered_while_a_task_prints(live: LiveStack, live_key: str) -> None:
    session = shell_session(live, live_key)
    async with websockets.connect(url_of(session)) as socket:
        await hear_until(socket, is_type("ready"))
        await say(socket, type="task", prompt="for i in $(seq 1 60); do echo $i; sleep 0.05; done")
        await hear_until(socket, is_type("stdout"))
        for number in range(5):
            sent = time.monotonic()
            await say(socket, type="ping", data=number)
            before = await hear_until(socket, is_type("pong"))
            assert before[-1]["data"] == number
            assert time.monotonic() - sent < 2
            assert not any(is_exit(f) for f in before)
        await hear_until(socket, is_exit)
    ended(live, live_key, session)


async def test_tasks_wait_in_line_run_in_order_and_the_line_has_an_end(
    live: LiveStack, live_key: str
) -> None:
    session = shell_session(live, live_key)
    async with websockets.connect(url_of(session)) as socket:
        await hear_until(socket, is_type("ready"))
        await say(socket, type="task", prompt="until [ -e go ]; do sleep 0.1; done", id="first")
        await hear_until(socket, is_type("task_started"))
        for number in range(21):
            await say(socket, type="task", prompt=f"echo {number} >> order", id=f"t{number}")
        heard = await hear_until(socket, is_type("error"))
        assert (heard[-1]["code"], heard[-1]["id"]) == ("queue_full", "t20")
        waiting = (
            await hear_until(socket, lambda f: f.get("id") == "t19") if heard[-2].get("id") != "t19" else []
        )
        queued = [f for f in heard + waiting if f["type"] == "task_queued"]
        assert [f["id"] for f in queued] == [f"t{number}" for number in range(20)]
        await say(socket, type="cancel", task_id=queued[7]["task_id"])
        cancelled = await hear_until(socket, is_exit)
        assert (cancelled[-1]["task_id"], cancelled[-1]["exit_code"]) == (queued[7]["task_id"], 130)
        sockets.run_in(live, live_key, session, "touch go")
        frames = await hear_until(
            socket, lambda f: is_exit(f) and f["task_id"] == queued[19]["task_id"], seconds=90
        )
    exits = [f["task_id"] for f in frames if is_exit(f)]
    assert exits[1:] == [f["task_id"] for f in queued if f is not queued[7]]
    printed = sockets.run_in(live, live_key, session, "cat order")["stdout"]
    assert printed == "".join(f"{n}\n" for n in range(20) if n != 7)
    everything = sockets.stored(live, live_key, session)
    assert len([f for f in everything if is_exit(f)]) == 21
    ended(live, live_key, session)


ALIVE = "grep -al 'sleep.100[0-9]' /proc/[0-9]*/cmdline | grep -v self | wc -l"


async def test_cancel_ends_a_task_with_130_and_all_that_it_started(live: LiveStack, live_key: str) -> None:
    """Its group, a child in a session of its own, and one that is deaf to TERM."""
    session = shell_session(live, live_key)
    async with websockets.connect(url_of(session)) as socket:
        await hear_until(socket, is_type("ready"))
        command = (
            "setsid sleep 1001 & (trap '' TERM; sleep 1002; sleep 1003) & "
            "nohup setsid bash -c 'trap \"\" TERM; sleep 1004' & echo up; sleep 1005"
        )
        await say(socket, type="task", prompt=command)
        await hear_until(socket, is_type("stdout"))
        wait_for(
            lambda: int(sockets.run_in(live, live_key, session, ALIVE)["stdout"]) >= 4,
            what="four sleeps",
            seconds=10,
        )
        asked = time.monotonic()
        await say(socket, type="cancel")
        frames = await hear_until(socket, is_exit)
        assert time.monotonic() - asked < 5
        assert (frames[-1]["exit_code"], frames[-1]["reason"]) == (130, "cancelled")
        idle = await hear_until(socket, is_type("status"))
        assert (idle[-1]["status"], idle[-1]["stop_reason"]) == ("idle", "cancelled")
        wait_for(
            lambda: sockets.run_in(live, live_key, session, ALIVE)["stdout"] == "0\n",
            what="no sleep left",
            seconds=5,
        )
        await say(socket, type="cancel")
        assert (await hear(socket))["code"] == "not_found"
        await say(socket, type="cancel", task_id=frames[-1]["task_id"])
        assert (await hear(socket))["code"] == "already_done"
        await say(socket, type="cancel", task_id="tsk_aaaaaaaaaaaaaaaaaaaaaaaaaa")
        assert (await hear(socket))["code"] == "not_found"
        await say(socket, type="task", prompt="echo still here")
        assert sockets.output_of(await hear_until(socket, is_exit)) == "still here\n"
    ended(live, live_key, session)


async def test_a_shell_task_passes_the_commands_own_end(live: LiveStack, live_key: str, quiet: Made) -> None:
    for command, code, signal in (
        ("exit 3", 3, None),
        ("no-such-command", 127, None),
        ("kill -SEGV $$", 139, "SEGV"),
    ):
        last = (await sockets.run_task(quiet, command))[-1]
        assert (last["exit_code"], last.get("signal", "").removeprefix("SIG") or None) == (code, signal)
    both = await sockets.run_task(quiet, "echo out; echo err >&2")
    assert [(f["data"], f["source"]) for f in both if f["type"] == "stderr"] == [("err\n", "tool")]


async def test_stdin_reaches_the_running_command_up_to_its_end(live: LiveStack, live_key: str) -> None:
    session = shell_session(live, live_key)
    async with websockets.connect(url_of(session)) as socket:
        await hear_until(socket, is_type("ready"))
        await say(socket, type="stdin", data="nobody hears")
        assert (await hear(socket))["code"] == "nothing_running"
        await say(socket, type="task", prompt="echo up; tr a-z A-Z; echo done")
        await hear_until(socket, is_type("stdout"))
        await say(socket, type="stdin", data="one ")
        await say(socket, type="stdin", data="töo\n")
        await say(socket, type="stdin", data="three\n", eof=True)
        frames = await hear_until(socket, is_exit)
    assert sockets.output_of(frames) == "ONE TöO\nTHREE\ndone\n"
    assert frames[-1]["exit_code"] == 0
    ended(live, live_key, session)


# -- keys, secrets, restarts


async def test_a_replaced_secret_is_told_to_every_socket_by_names_only(
    live: LiveStack, live_key: str
) -> None:
    sockets.bundle_make(live, live_key, "told", GITHUB_TOKEN="ghp_the_first_value")
    session = shell_session(live, live_key, secrets=["told"])
    async with websockets.connect(url_of(session)) as one, websockets.connect(url_of(session)) as two:
        await hear_until(one, is_type("ready"))
        await hear_until(two, is_type("ready"))
        values = {"GITHUB_TOKEN": "ghp_the_second_value", "EXTRA_TOKEN": "extra-token-value"}
        answer = live.request("PUT", "/v1/tenants/me/secrets/told", {"values": values}, token=live_key)
        assert (answer.status, answer.json()["sessions_updated"]) == (200, 1)
        for socket in (one, two):
            frame = (await hear_until(socket, is_type("secrets_updated")))[-1]
            assert (frame["bundle"], frame["version"]) == ("told", 2)
            assert frame["keys"] == ["EXTRA_TOKEN", "GITHUB_TOKEN"]
            assert "value" not in json.dumps(frame)
    frames = await sockets.run_task(session, "echo ${#GITHUB_TOKEN} $EXTRA_TOKEN")
    assert sockets.output_of(frames) == f"{len('ghp_the_second_value')} [redacted:EXTRA_TOKEN]\n"
    ended(live, live_key, session)


async def test_a_revoked_key_closes_its_sockets_with_4401_and_its_tokens_are_dead(
    live: LiveStack, carol: str
) -> None:
    """SECURITY 3.5: within 5 s; sessions of other keys go on."""
    made, staying = (live.request("POST", "/v1/api-keys", {}, token=carol).json() for _ in range(2))
    session, other = shell_session(live, made["key"]), shell_session(live, staying["key"])
    async with websockets.connect(url_of(session)) as socket, websockets.connect(url_of(other)) as kept:
        await hear_until(socket, is_type("ready"))
        await hear_until(kept, is_type("ready"))
        assert live.request("DELETE", f"/v1/api-keys/{made['key_id']}", token=carol).status == 200
        assert live.request("GET", "/v1/sessions", token=made["key"]).status == 401
        code, _ = await close_code(socket, seconds=5)
        assert code == 4401
        await say(kept, type="ping")
        assert (await hear_until(kept, is_type("pong")))[-1]["type"] == "pong"
    async with websockets.connect(url_of(session, after=0)) as socket:
        assert await close_code(socket) == (4401, [])
    fresh = live.request(
        "POST", f"/v1/sessions/{session['chat_session_id']}/token", token=staying["key"]
    ).json()
    async with websockets.connect(f"{fresh['connect_url']}?token={fresh['jwt']}") as socket:
        assert (await hear(socket))["type"] == "ready"
    ended(live, staying["key"], session)
    ended(live, staying["key"], other)


async def test_a_restart_of_the_server_closes_with_1012_and_nothing_is_lost(
    live: LiveStack, live_key: str
) -> None:
    import signal

    session = shell_session(live, live_key)
    async with websockets.connect(url_of(session)) as socket:
        await hear_until(socket, is_type("ready"))
        await say(socket, type="task", prompt="for i in $(seq 1 30); do echo $i; sleep 0.1; done")
        before = await hear_until(socket, is_type("stdout"))
        live.kill("web", signal.SIGTERM)
        code, rest = await close_code(socket, seconds=10)
        assert code == 1012
    seen = before + rest
    wait_for(lambda: answers(live), what="the next web process", seconds=60, every=0.2)
    async with websockets.connect(url_of(session, after=seen[-1]["seq"])) as socket:
        seen += [f for f in await hear_until(socket, is_exit) if f["type"] not in ("ready", "caught_up")]
    sockets.assert_gapless(seen, first=seen[0]["seq"])
    assert sockets.output_of(seen) == "".join(f"{n}\n" for n in range(1, 31))
    ended(live, live_key, session)


def answers(live: LiveStack) -> bool:
    try:
        return live.request("GET", "/readyz").status == 200
    except OSError:
        return False

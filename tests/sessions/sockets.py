"""A client of the session socket that does what the contract asks of one: keep the last seq, come back with `after`."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

import websockets

from tests.live import LiveStack, wait_for

Frames = list[dict[str, Any]]


def shell_session(live: LiveStack, key: str, **body: Any) -> dict[str, Any]:
    """A new session with the agent `shell`."""
    answer = live.request(
        "POST", "/v1/sessions", {"agent": {"kind": "shell"}, "user_id": "u1", **body}, token=key
    )
    assert answer.status == 201, answer.body
    made = dict(answer.json())
    where = f"/v1/sessions/{made['chat_session_id']}"
    # The pool may be empty just now: a session that is still made has its frames in another order.
    wait_for(lambda: live.request("GET", where, token=key).json()["status"] != "starting", what="its sandbox")
    return made


def model_session(live: LiveStack, key: str, bundle: str, **body: Any) -> dict[str, Any]:
    """A new session with the agent `deictic` and that bundle's key."""
    asked = {
        "agent": {"kind": "deictic"}, "user_id": "u1", "secrets": [bundle],
        "llm": {"vendor": "anthropic", "model": "claude-sonnet-4-5"}, **body,
    }  # fmt: skip
    answer = live.request("POST", "/v1/sessions", asked, token=key)
    assert answer.status == 201, answer.body
    return dict(answer.json())


def bundle_make(live: LiveStack, key: str, name: str, **values: str) -> None:
    """A bundle of that name with those values."""
    answer = live.request("POST", "/v1/tenants/me/secrets", {"name": name, "values": values}, token=key)
    assert answer.status == 201, answer.body


def url_of(session: dict[str, Any], *, after: int | None = None, token: bool = True) -> str:
    query = []
    if token:
        query.append(f"token={session['jwt']}")
    if after is not None:
        query.append(f"after={after}")
    return str(session["connect_url"]) + ("?" + "&".join(query) if query else "")


async def say(socket: Any, **frame: Any) -> None:
    await socket.send(json.dumps(frame))


async def hear(socket: Any, *, seconds: float = 20.0) -> dict[str, Any]:
    return dict(json.loads(await asyncio.wait_for(socket.recv(), seconds)))


async def hear_until(
    socket: Any, until: Callable[[dict[str, Any]], bool], *, seconds: float = 30.0
) -> Frames:
    """All frames up to and including the first that `until` accepts."""
    heard: Frames = []
    async with asyncio.timeout(seconds):
        while True:
            heard.append(dict(json.loads(await socket.recv())))
            if until(heard[-1]):
                return heard


def is_exit(frame: dict[str, Any]) -> bool:
    return bool(frame["type"] == "exit")


async def run_task(session: dict[str, Any], prompt: str, *, seconds: float = 60.0) -> Frames:
    """Submit one task on a fresh socket and hear it out."""
    async with websockets.connect(url_of(session)) as socket:
        await hear_until(socket, lambda frame: frame["type"] == "ready")
        await say(socket, type="task", prompt=prompt)
        return await hear_until(socket, is_exit, seconds=seconds)


async def hear_with_cuts(
    session: dict[str, Any], *, cuts: int, chance: random.Random, seconds: float = 90.0
) -> Frames:
    """All stored frames up to an `exit`, over a socket that is cut `cuts` times at random."""
    stored: Frames = []
    last = 0
    left = cuts
    async with asyncio.timeout(seconds):
        while True:
            try:
                async with websockets.connect(url_of(session, after=last)) as socket:
                    limit = chance.randint(1, 12) if left else None
                    left -= 1 if left else 0
                    count = 0
                    async for raw in socket:
                        frame = json.loads(raw)
                        if "seq" in frame and frame["type"] not in ("ready", "caught_up"):
                            stored.append(frame)
                            last = frame["seq"]
                            if is_exit(frame):
                                return stored
                        count += 1
                        if limit is not None and count >= limit:
                            socket.transport.abort()
                            break
            except (OSError, websockets.exceptions.WebSocketException):
                await asyncio.sleep(0.1)


def output_of(frames: Frames, *, source: str | None = None) -> str:
    """What a person would have read on standard output."""
    texts = [f for f in frames if f["type"] == "stdout" and (source is None or f["source"] == source)]
    return "".join(f["data"] for f in texts)


def kept(frames: Frames) -> Frames:
    """The stored frames without what a `restarted` made void."""
    found: Frames = []
    for frame in frames:
        if "seq" not in frame or frame["type"] in ("ready", "caught_up"):
            continue
        if frame["type"] == "restarted":
            void = [
                f for f in found if f["seq"] > frame["discard_after"] and f.get("task_id") == frame["task_id"]
            ]
            found = [f for f in found if f not in void]
        found.append(frame)
    return found


def assert_gapless(frames: Frames, *, first: int = 1) -> None:
    """Stored frames numbered from `first` on, each once and in order."""
    seqs = [f["seq"] for f in frames if "seq" in f and f["type"] not in ("ready", "caught_up")]
    assert seqs == list(range(first, first + len(seqs)))


async def close_code(socket: Any, *, seconds: float = 10.0) -> tuple[int | None, Frames]:
    """The code that the server closes with, and the frames that came before."""
    heard: Frames = []
    async with asyncio.timeout(seconds):
        try:
            while True:
                heard.append(dict(json.loads(await socket.recv())))
        except websockets.exceptions.ConnectionClosed:
            return socket.close_code, heard


def stored(live: LiveStack, key: str, session: dict[str, Any]) -> Frames:
    """The whole log of a session, over REST."""
    found: Frames = []
    while True:
        path = f"/v1/sessions/{session['chat_session_id']}/events?after={len(found)}"
        page = live.request("GET", path, token=key).json()["events"]
        if not page:
            return found
        found += page


def run_in(live: LiveStack, key: str, session: dict[str, Any], command: str) -> dict[str, Any]:
    """What a command printed, run beside the session's tasks."""
    answer = live.request(
        "POST", f"/v1/sandboxes/{session['sandbox_id']}/exec", {"command": command}, token=key
    )
    assert answer.status == 200, answer.body
    return dict(answer.json())

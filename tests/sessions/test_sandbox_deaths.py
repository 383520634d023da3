"""What a session says when memory ends a command of it, or its sandbox ends under it: a reason, never a broken line."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
import websockets

from tests.live import LiveStack, wait_for
from tests.model_server import call, say, then, together
from tests.sessions import sockets
from tests.sessions.sockets import hear_until, run_task, url_of

pytestmark = [pytest.mark.docker, pytest.mark.timeout(200)]

HOG = "python3 -c 'x = bytearray(900 << 20)'"


@pytest.fixture(scope="module")
def bundle(live: LiveStack, live_key: str) -> str:
    sockets.bundle_make(live, live_key, "deaths", LLM_API_KEY="sk-ant-of-the-deaths")
    return "deaths"


def container_of(session: dict[str, Any]) -> str:
    found = subprocess.run(
        ["docker", "ps", "-q", "--filter", f"label=e2a.sandbox={session['sandbox_id']}"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return found.stdout.strip()


async def test_a_shell_task_out_of_memory_exits_with_137_and_says_so(live: LiveStack, live_key: str) -> None:
    session = sockets.shell_session(live, live_key)
    last = (await run_task(session, HOG))[-1]
    assert (last["type"], last["exit_code"], last["reason"]) == ("exit", 137, "oom")
    assert (await run_task(session, "echo alive"))[-1]["exit_code"] == 0


async def test_the_model_is_told_that_its_command_ran_out_of_memory(
    live: LiveStack, live_key: str, bundle: str
) -> None:
    live.model.requests.clear()
    live.model.play(then(together(say("I try."), call("bash", {"command": HOG})), say("Too large.")))
    frames = await run_task(sockets.model_session(live, live_key, bundle), "go")
    (result,) = [frame for frame in frames if frame["type"] == "tool_result"]
    assert (result["is_error"], result["exit_code"]) == (True, 137)
    told = live.model.requests[1].tool_results[0]["content"]
    assert told.splitlines()[-1] == "[the command ran out of memory and was ended]"
    assert frames[-1]["exit_code"] == 0


@pytest.mark.parametrize("agent", ["shell", "deictic"])
async def test_a_sandbox_that_is_killed_ends_its_session_with_the_reason(
    live: LiveStack, live_key: str, bundle: str, agent: str
) -> None:
    command = "echo begun; sleep 100"
    if agent == "shell":
        session = sockets.shell_session(live, live_key)
    else:
        live.model.requests.clear()
        live.model.play(
            then(together(say("I wait."), call("bash", {"command": command})), say("Never said."))
        )
        session = sockets.model_session(live, live_key, bundle)
    async with websockets.connect(url_of(session)) as socket:
        await sockets.say(socket, type="task", prompt=command)
        await hear_until(socket, lambda frame: frame.get("data") == "begun\n")
        subprocess.run(["docker", "kill", container_of(session)], check=True, capture_output=True)
        code, frames = await sockets.close_code(socket, seconds=60)
        assert (code, socket.close_reason) == (4410, "The session has ended: lost.")
    stored = [frame for frame in frames if frame["type"] != "stdout"]
    assert [frame["type"] for frame in stored] == ["exit", "status"], stored
    assert (stored[0]["exit_code"], stored[0]["reason"]) == (130, "lost")
    assert (stored[1]["status"], stored[1]["end_reason"]) == ("ended", "lost")
    where = f"/v1/sessions/{session['chat_session_id']}"
    assert live.request("GET", where, token=live_key).json()["end_reason"] == "lost"
    way = f"/v1/sandboxes/{session['sandbox_id']}"

    def dead() -> Any:
        shown = live.request("GET", way, token=live_key).json()
        return shown["state"] == "destroyed" and shown["death"]

    death = wait_for(dead, what="destroyed")
    assert (death["reason"], death["exit_code"]) == ("lost", 137)
    assert "begun\n" in death["last_output"]

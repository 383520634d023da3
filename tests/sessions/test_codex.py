"""The agent `codex`: the real program in a real sandbox, with a scripted model behind the broker."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import websockets

from tests.live import LiveStack, wait_for
from tests.model_server import Gate, call, fail, say, together
from tests.sessions import sockets
from tests.sessions.programs import Made, of_type, play, processes, program_session, session_now
from tests.sessions.sockets import hear_until, is_exit, output_of, run_task, url_of

pytestmark = [pytest.mark.docker, pytest.mark.timeout(200)]

KEY = "sk-proj-codex-first"


@pytest.fixture(scope="module")
def bundle(live: LiveStack, live_key: str) -> str:
    sockets.bundle_make(live, live_key, "codex", LLM_API_KEY=KEY, GITHUB_TOKEN="ghp-codex-token")
    return "codex"


@pytest.fixture
def session(live: LiveStack, live_key: str, bundle: str) -> Iterator[Callable[..., Made]]:
    """Makes sessions with that bundle, which end with the test."""
    made: list[Made] = []

    def make(**body: Any) -> Made:
        made.append(program_session(live, live_key, "codex", bundle, **body))
        return made[-1]

    yield make
    for one in made:
        live.request("DELETE", f"/v1/sessions/{one['chat_session_id']}", token=live_key)


def shell(command: str, **kwargs: Any) -> Any:
    return call("exec_command", {"cmd": command}, **kwargs)


def test_it_says_runs_and_goes_on_over_tasks(
    live: LiveStack, live_key: str, session: Callable[..., Made]
) -> None:
    made = session(agent={"cwd": "site/src"})
    model = play(
        live,
        together(say("I will look."), shell("pwd; echo $GITHUB_TOKEN; echo made > here; exit 3")),
        say("Done."),
    )
    frames = asyncio.run(run_task(made, "Look around"))
    assert frames[-1]["exit_code"] == 0, frames
    [used], [result] = of_type(frames, "tool_use"), of_type(frames, "tool_result")
    assert used["name"] == "command_execution"
    assert "echo made" in used["input"]["command"]
    assert (result["tool_use_id"], result["is_error"], result["exit_code"]) == (used["tool_use_id"], True, 3)
    assert output_of(frames, source="tool") == "/workspace/site/src\n[redacted:GITHUB_TOKEN]\n"
    assert output_of(frames, source="assistant") == "I will look.Done."
    assert sockets.run_in(live, live_key, made, "cat site/src/here")["stdout"] == "made\n"
    usage = of_type(frames, "usage")
    assert len(usage) == 2
    assert session_now(live, live_key, made)["usage"]["input_tokens"] == sum(u["input_tokens"] for u in usage)
    assert {(request.path, request.key) for request in model.requests} == {("/v1/responses", KEY)}
    assert KEY not in json.dumps(frames)

    model = play(live, say("As I said."))
    again = asyncio.run(run_task(made, "And now?"))
    assert again[-1]["exit_code"] == 0
    said = json.dumps(model.requests[-1].said)
    assert all(text in said for text in ("Look around", "I will look.", "Done.", "And now?"))
    task = live.request("GET", f"/v1/sessions/{made['chat_session_id']}/tasks", token=live_key).json()[
        "tasks"
    ][0]
    assert task["result"] == "As I said."
    assert KEY not in sockets.run_in(live, live_key, made, "env; grep -r sk-proj ~/.codex")["stdout"]


def test_an_item_is_shown_as_it_comes_and_a_cancel_ends_all(
    live: LiveStack, live_key: str, session: Callable[..., Made]
) -> None:
    made = session()
    gate = Gate()
    play(live, together(say("Before."), shell("echo ran")), say("After.", gate=gate))

    async def run() -> sockets.Frames:
        async with websockets.connect(url_of(made)) as socket:
            await sockets.say(socket, type="task", prompt="Say it")
            heard = await hear_until(socket, lambda frame: frame["type"] == "tool_result")
            assert output_of(heard) == "Before.ran\n"
            await asyncio.to_thread(gate.wait_arrived)
            gate.open()
            assert output_of(await hear_until(socket, is_exit)) == "After."
            play(live, shell("tail -f /dev/null & tail -f /etc/hostname"), say("no"))
            await sockets.say(socket, type="task", prompt="Wait")
            await hear_until(socket, lambda frame: frame["type"] == "tool_use")
            await asyncio.to_thread(
                wait_for, lambda: "hostname" in processes(live, live_key, made, "tail"), what="the command"
            )
            await sockets.say(socket, type="cancel")
            return await hear_until(socket, is_exit)

    frames = asyncio.run(run())
    assert (frames[-1]["exit_code"], frames[-1]["reason"]) == (130, "cancelled")
    assert processes(live, live_key, made, "codex,tail") == ""
    model = play(live, say("Here."))
    assert asyncio.run(run_task(made, "Still there?"))[-1]["exit_code"] == 0
    assert "Say it" in json.dumps(model.requests[-1].said)


def test_a_spent_budget_ends_a_task_and_not_the_session(
    live: LiveStack, live_key: str, session: Callable[..., Made]
) -> None:
    made = session(budget={"max_tokens": 1000})
    play(live, shell("echo one"), say("never"))
    frames = asyncio.run(run_task(made, "Go on"))
    assert (frames[-1]["exit_code"], frames[-1]["reason"]) == (1, "budget")
    assert [frame["code"] for frame in of_type(frames, "error")] == ["budget_spent"]
    assert output_of(frames, source="tool") == "one\n"
    now = session_now(live, live_key, made)
    assert (now["status"], now["stop_reason"]) == ("idle", "budget")


def test_a_refused_key_is_a_typed_error_soon(live: LiveStack, session: Callable[..., Made]) -> None:
    made = session()
    live.model.play(lambda body, headers: fail(401, f"Incorrect API key provided: {KEY}"))
    started = time.monotonic()
    frames = asyncio.run(run_task(made, "Hello"))
    assert time.monotonic() - started < 15
    assert (frames[-1]["exit_code"], frames[-1]["reason"]) == (1, "llm_auth")
    assert of_type(frames, "error")[-1]["code"] == "llm_auth"
    assert KEY not in json.dumps(frames)


def test_a_sandbox_with_a_task_takes_the_vendor_of_its_agent(live: LiveStack, live_key: str) -> None:
    """`POST /v1/sandboxes` names no vendor."""
    model = play(live, say("One call."))
    body = {
        "template": "standard", "agent": "codex", "task": "Say it", "model": "gpt-5",
        "llm_key": "sk-proj-inline-key",
    }  # fmt: skip
    answer = live.request("POST", "/v1/sandboxes", body, token=live_key)
    assert answer.status == 201, answer.body
    made = answer.json()
    where = f"/v1/sessions/{made['chat_session_id']}"

    def done() -> Any:
        task = live.request("GET", f"{where}/tasks/{made['task_id']}", token=live_key).json()
        return task if task["status"] == "done" else None

    task = wait_for(done, what="the task")
    assert (task["exit_code"], task["result"]) == (0, "One call."), task
    assert model.requests[-1].key == "sk-proj-inline-key"
    live.request("DELETE", where, token=live_key)

"""The agent `claude-code`: the real program in a real sandbox, with a scripted model behind the broker."""

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

KEY = "sk-ant-claude-code-first"


@pytest.fixture(scope="module")
def bundle(live: LiveStack, live_key: str) -> str:
    sockets.bundle_make(live, live_key, "claude-code", LLM_API_KEY=KEY, GITHUB_TOKEN="ghp-claude-code-token")
    return "claude-code"


@pytest.fixture
def session(live: LiveStack, live_key: str, bundle: str) -> Iterator[Callable[..., Made]]:
    """Makes sessions with that bundle, which end with the test."""
    made: list[Made] = []

    def make(**body: Any) -> Made:
        made.append(program_session(live, live_key, "claude-code", bundle, **body))
        return made[-1]

    yield make
    for one in made:
        live.request("DELETE", f"/v1/sessions/{one['chat_session_id']}", token=live_key)


def bash(command: str, **kwargs: Any) -> Any:
    return call("Bash", {"command": command, "description": "as asked"}, **kwargs)


def test_it_says_runs_and_goes_on_over_tasks(
    live: LiveStack, live_key: str, session: Callable[..., Made]
) -> None:
    made = session(agent={"cwd": "site/src"})
    model = play(
        live,
        together(say("I will look."), bash("pwd; echo $GITHUB_TOKEN; echo made > here; exit 3")),
        say("Done."),
    )
    frames = asyncio.run(run_task(made, "Look around"))
    assert frames[-1]["exit_code"] == 0, frames
    [used], [result] = of_type(frames, "tool_use"), of_type(frames, "tool_result")
    assert used["name"] == "Bash"
    assert used["input"]["command"].startswith("pwd;")
    assert (result["tool_use_id"], result["is_error"], result["exit_code"]) == (used["tool_use_id"], True, 3)
    assert output_of(frames, source="tool") == "/workspace/site/src\n[redacted:GITHUB_TOKEN]"
    assert output_of(frames, source="assistant") == "I will look.Done."
    assert sockets.run_in(live, live_key, made, "cat site/src/here")["stdout"] == "made\n"
    usage = of_type(frames, "usage")
    assert len(usage) == 2
    assert session_now(live, live_key, made)["usage"]["input_tokens"] == sum(u["input_tokens"] for u in usage)
    assert {request.key for request in model.requests} == {KEY}
    assert KEY not in json.dumps(frames)

    model = play(live, say("As I said."))
    again = asyncio.run(run_task(made, "And now? " + "long " * 50_000))
    assert again[-1]["exit_code"] == 0
    said = json.dumps(model.requests[-1].said)
    assert said.count("long ") >= 50_000
    assert all(text in said for text in ("Look around", "I will look.", "Done.", "And now?"))
    environment = sockets.run_in(live, live_key, made, "env; cat ~/.claude.json; ls -a ~/.claude")["stdout"]
    assert KEY not in environment


def test_words_are_shown_as_they_come_and_a_cancel_ends_all(
    live: LiveStack, live_key: str, session: Callable[..., Made]
) -> None:
    made = session()
    gate = Gate()
    play(
        live,
        say("First half, second half.", gate=gate, pieces=2),
        bash("tail -f /dev/null & tail -f /etc/hostname"),
        say("no"),
    )

    async def run() -> sockets.Frames:
        async with websockets.connect(url_of(made)) as socket:
            await sockets.say(socket, type="task", prompt="Say it")
            heard = await hear_until(socket, lambda frame: frame["type"] == "stdout")
            assert output_of(heard) == "First half, "
            assert not gate.opened.is_set()
            gate.open()
            heard += await hear_until(socket, is_exit)
            assert output_of(heard) == "First half, second half."
            await sockets.say(socket, type="task", prompt="Sleep")
            await hear_until(socket, lambda frame: frame["type"] == "tool_use")
            await asyncio.to_thread(
                wait_for, lambda: "hostname" in processes(live, live_key, made, "tail"), what="the command"
            )
            await sockets.say(socket, type="cancel")
            return await hear_until(socket, is_exit)

    frames = asyncio.run(run())
    assert (frames[-1]["exit_code"], frames[-1]["reason"]) == (130, "cancelled")
    assert processes(live, live_key, made, "claude,tail") == ""
    model = play(live, say("Here."))
    assert asyncio.run(run_task(made, "Still there?"))[-1]["exit_code"] == 0
    assert "Say it" in json.dumps(model.requests[-1].said)


def test_limits_of_turns_and_of_money(live: LiveStack, live_key: str, session: Callable[..., Made]) -> None:
    made = session(agent={"max_turns": 2})
    play(live, *(bash(f"echo {number}") for number in range(4)))
    frames = asyncio.run(run_task(made, "Go on and on"))
    assert (frames[-1]["exit_code"], frames[-1]["reason"]) == (1, "max_turns")
    assert session_now(live, live_key, made)["stop_reason"] == "max_turns"

    where = f"/v1/sessions/{made['chat_session_id']}"
    live.request("PATCH", where, {"budget": {"max_tokens": 1}}, token=live_key)
    model = play(live, say("never"))
    frames = asyncio.run(run_task(made, "More"))
    assert (frames[-1]["exit_code"], frames[-1]["reason"]) == (1, "budget")
    assert model.requests == []

    spent = session_now(live, live_key, made)["usage"]
    limit = spent["input_tokens"] + spent["output_tokens"] + 1
    live.request("PATCH", where, {"budget": {"max_tokens": limit}}, token=live_key)
    play(live, bash("echo one"), say("never"))
    frames = asyncio.run(run_task(made, "Once more"))
    assert (frames[-1]["exit_code"], frames[-1]["reason"]) == (1, "budget")
    assert [frame["code"] for frame in of_type(frames, "error")] == ["budget_spent"]
    assert output_of(frames, source="tool") == "one"
    assert session_now(live, live_key, made)["stop_reason"] == "budget"


def test_a_refused_key_is_a_typed_error_soon(live: LiveStack, session: Callable[..., Made]) -> None:
    made = session()
    live.model.play(lambda body, headers: fail(401, f"invalid x-api-key {KEY}"))
    started = time.monotonic()
    frames = asyncio.run(run_task(made, "Hello"))
    assert time.monotonic() - started < 15
    assert (frames[-1]["exit_code"], frames[-1]["reason"]) == (1, "llm_auth")
    assert of_type(frames, "error")[-1]["code"] == "llm_auth"
    assert of_type(frames, "error")[-1]["retry"] == "terminal"
    assert KEY not in json.dumps(frames)

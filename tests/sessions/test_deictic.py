"""The agent `deictic` on a real sandbox, with a scripted model that speaks the vendor's protocol."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import websockets

from tests.live import LiveStack
from tests.model_server import (
    Gate,
    Misbehaviour,
    Step,
    call,
    cut,
    fail,
    garbage,
    hang,
    midstream_error,
    redirect,
    say,
    then,
    think,
    together,
)
from tests.sessions import sockets
from tests.sessions.sockets import hear_until, is_exit, output_of, run_task, url_of

pytestmark = [pytest.mark.docker, pytest.mark.timeout(200)]

Made = dict[str, Any]
Frames = sockets.Frames
KEY = "sk-ant-deictic-first"


@pytest.fixture(scope="module")
def bundle(live: LiveStack, live_key: str) -> str:
    sockets.bundle_make(live, live_key, "deictic", LLM_API_KEY=KEY)
    return "deictic"


@pytest.fixture
def model_session(live: LiveStack, live_key: str, bundle: str) -> Iterator[Callable[..., Made]]:
    """Makes sessions with that bundle, which end with the test."""
    made: list[Made] = []

    def make(bundle: str = bundle, **body: Any) -> Made:
        made.append(sockets.model_session(live, live_key, bundle, **body))
        return made[-1]

    yield make
    for session in made:
        live.request("DELETE", f"/v1/sessions/{session['chat_session_id']}", token=live_key)


@pytest.fixture
def played(live: LiveStack) -> Callable[..., Any]:
    """`played(step, …)`: from now on the model follows these steps; the model server is answered."""

    def play(*steps: Step) -> Any:
        live.model.requests.clear()
        live.model.play(then(*steps))
        return live.model

    return play


def types(frames: Frames) -> list[str]:
    return [frame["type"] for frame in frames]


def of_type(frames: Frames, kind: str) -> Frames:
    return [frame for frame in frames if frame["type"] == kind]


def bash(command: str, **kwargs: Any) -> Any:
    return call("bash", {"command": command}, **kwargs)


def edit(command: str, path: str, **arguments: Any) -> Any:
    return call("str_replace_based_edit_tool", {"command": command, "path": path, **arguments})


def results(model: Any, number: int) -> list[str]:
    """What the model was told in answer to its calls, in request `number`."""
    return [block["content"] for block in model.requests[number].tool_results]


# -- the conversation and its tools


async def test_a_task_with_a_command_is_told_in_the_order_of_what_happened(
    model_session: Callable[..., Made], played: Callable[..., Any]
) -> None:
    model = played(together(say("I look."), bash("echo out; echo err >&2; exit 3")), say("It failed."))
    frames = await run_task(model_session(), "look")
    model.assert_finished()
    shape = [f["type"] for f in frames if f["type"] not in ("stdout", "stderr")]
    assert shape == [
        "task_queued", "status", "task_started", "usage", "tool_use", "tool_result", "usage", "exit",
    ]  # fmt: skip
    use, result = of_type(frames, "tool_use")[0], of_type(frames, "tool_result")[0]
    assert (use["name"], use["input"]) == ("bash", {"command": "echo out; echo err >&2; exit 3"})
    assert result["tool_use_id"] == use["tool_use_id"]
    assert (result["is_error"], result["exit_code"], result["truncated"]) == (True, 3, False)
    assert output_of(frames, source="assistant") == "I look.It failed."
    assert output_of(frames, source="tool") == "out\n"
    assert [(f["data"], f["source"]) for f in of_type(frames, "stderr")] == [("err\n", "tool")]
    assert frames[-1]["exit_code"] == 0
    told = results(model, 1)[0]
    assert sorted(told.splitlines()) == ["[exit code 3]", "err", "out"]
    assert model.requests[1].tool_results[0]["is_error"] is True


async def test_the_conversation_is_kept_over_tasks(
    model_session: Callable[..., Made], played: Callable[..., Any]
) -> None:
    model = played(together(say("Hello."), bash("echo one")), say("Done."), say("You said hi."))
    session = model_session()
    await run_task(session, "hi")
    await run_task(session, "what did I say?")
    model.assert_finished()
    roles = [message["role"] for message in model.messages]
    assert roles == ["user", "assistant", "user", "assistant", "user"]
    texts = [
        [block.get("text") or block.get("content") or block["name"] for block in message["content"]]
        for message in model.messages
    ]
    assert texts == [["hi"], ["Hello.", "bash"], ["one"], ["Done."], ["what did I say?"]]


async def test_bash_keeps_folder_variables_and_functions_between_calls_and_tasks(
    model_session: Callable[..., Made], played: Callable[..., Any]
) -> None:
    model = played(
        bash(
            "mkdir -p a/b && cd a/b && export SHOWN=1 && plain='two words' && list=(x 'y z') && f() { echo in f; }"
        ),
        bash('pwd; echo "$SHOWN $plain ${list[1]}"; f; unset SHOWN; cd ..'),
        say("one"),
        bash('pwd; echo "[$SHOWN] $plain"; f; exit 4'),
        call("bash", {"restart": True}),
        bash('pwd; echo "[$plain]"; type f'),
        say("two"),
    )
    session = model_session()
    first = await run_task(session, "one")
    assert output_of(first, source="tool") == "/workspace/a/b\n1 two words y z\nin f\n"
    second = await run_task(session, "two")
    model.assert_finished()
    assert output_of(second, source="tool") == "/workspace/a\n[] two words\nin f\n/workspace\n[]\n"
    assert [f.get("exit_code") for f in of_type(second, "tool_result")] == [4, None, 1]


async def test_a_variable_of_a_bundle_follows_the_bundle_and_not_the_shell(
    live: LiveStack, live_key: str, model_session: Callable[..., Made], played: Callable[..., Any]
) -> None:
    sockets.bundle_make(live, live_key, "follows", LLM_API_KEY=KEY, DEPLOY_TOKEN="deploy-token-old")
    session = model_session("follows")
    played(bash("echo ${#DEPLOY_TOKEN}; DEPLOY_TOKEN=mine"), say("ok"))
    assert "16\n" in output_of(await run_task(session, "one"))
    live.request(
        "PATCH",
        "/v1/tenants/me/secrets/follows",
        {"values": {"DEPLOY_TOKEN": "deploy-token-newer"}},
        token=live_key,
    )
    played(bash("echo ${#DEPLOY_TOKEN}"), say("ok"))
    assert "18\n" in output_of(await run_task(session, "two"))


async def test_the_editor_views_creates_replaces_and_inserts(
    live: LiveStack, live_key: str, model_session: Callable[..., Made], played: Callable[..., Any]
) -> None:
    model = played(
        edit("create", "/workspace/src/a.txt", file_text="one\ntwo\nthree\n"),
        edit("view", "/workspace/src/a.txt"),
        edit("view", "/workspace/src/a.txt", view_range=[2, 3]),
        edit("str_replace", "/workspace/src/a.txt", old_str="two", new_str="zwei"),
        edit("insert", "/workspace/src/a.txt", insert_line=1, insert_text="one and a half"),
        edit("view", "/workspace/src"),
        edit("str_replace", "/workspace/src/a.txt", old_str="nothing", new_str="x"),
        edit("str_replace", "/workspace/src/a.txt", old_str="e", new_str="x"),
        edit("view", "/workspace/none.txt"),
        edit("view", "/workspace/src/a.txt", view_range=[9, 12]),
        edit("undo_edit", "/workspace/src/a.txt"),
        call("str_replace_based_edit_tool", {"command": "view"}),
        edit("create", "relative.txt", file_text=""),
        say("Done."),
    )
    session = model_session()
    frames = await run_task(session, "edit")
    model.assert_finished()
    assert frames[-1]["exit_code"] == 0
    told = [results(model, number)[0] for number in range(1, 14)]
    assert told[1] == "     1\tone\n     2\ttwo\n     3\tthree\n     4\t"
    assert told[2] == "     2\ttwo\n     3\tthree"
    assert told[5] == "a.txt"
    assert "No match" in told[6]
    assert "matches" in told[7]
    errors = [f["is_error"] for f in of_type(frames, "tool_result")]
    assert errors == [False] * 6 + [True] * 6 + [False]
    printed = sockets.run_in(
        live, live_key, session, "cat src/a.txt; ls relative.txt; stat -c %u src/a.txt; id -u"
    )
    assert printed["stdout"].splitlines()[:5] == ["one", "one and a half", "zwei", "three", "relative.txt"]
    assert len(set(printed["stdout"].splitlines()[5:])) == 1


async def test_calls_that_make_no_sense_are_answered_and_the_model_goes_on(
    model_session: Callable[..., Made], played: Callable[..., Any]
) -> None:
    broken = bash("echo this will be cut off in its middle")
    identifier = broken.blocks[0]["id"]
    model = played(
        call("launch", {"missiles": 1}),
        bash("  "),
        call("bash", {"command": 5}),
        broken.with_(cut_input_of=identifier, stop_reason="tool_use"),
        together(bash("echo a"), bash("exit 1"), bash("echo b")),
        say("ok"),
    )
    frames = await run_task(model_session(), "nonsense")
    model.assert_finished()
    assert frames[-1]["exit_code"] == 0
    assert [f["is_error"] for f in of_type(frames, "tool_result")] == [True] * 4 + [False, True, False]
    assert results(model, 5) == ["a", "[exit code 1]", "b"]


async def test_the_request_is_the_vendors_own(
    model_session: Callable[..., Made], played: Callable[..., Any]
) -> None:
    model = played(say("ok"), say("ok"))
    await run_task(model_session(agent={"kind": "deictic", "system": "Speak like a pirate."}), "hello")
    await run_task(model_session(llm={"vendor": "anthropic", "model": "claude-haiku-4-5"}), "hello")
    own, usual = (request.body for request in model.requests)
    assert [(tool["type"], tool["name"]) for tool in own["tools"]] == [
        ("bash_20250124", "bash"),
        ("text_editor_20250728", "str_replace_based_edit_tool"),
    ]
    assert [block["text"] for block in own["system"]] == ["Speak like a pirate."]
    assert "/workspace" in usual["system"][0]["text"]
    assert (own["model"], usual["model"]) == ("claude-sonnet-4-5", "claude-haiku-4-5")
    assert own["stream"] is True
    assert model.requests[0].path == "/v1/messages"
    assert model.requests[0].key == KEY
    assert own["messages"][0]["content"][0]["text"] == "hello"


async def test_text_is_streamed_before_the_call_has_ended(
    model_session: Callable[..., Made], played: Callable[..., Any]
) -> None:
    gate = Gate()
    played(say("first part, second part, third part.", gate=gate))
    async with websockets.connect(url_of(model_session())) as socket:
        await hear_until(socket, lambda f: f["type"] == "ready")
        await sockets.say(socket, type="task", prompt="talk")
        early = await hear_until(socket, lambda f: f["type"] == "stdout")
        assert early[-1]["data"] == "first part, "
        assert early[-1]["source"] == "assistant"
        gate.open()
        rest = await hear_until(socket, is_exit)
    assert output_of(early + rest) == "first part, second part, third part."


async def test_thoughts_are_shown_and_come_back_to_the_model_as_they_were(
    model_session: Callable[..., Made], played: Callable[..., Any]
) -> None:
    model = played(together(think("Let me see. "), bash("echo seen")), say("Yes."), say("Again."))
    session = model_session()
    frames = await run_task(session, "think")
    await run_task(session, "again")
    model.assert_finished()
    assert output_of(frames, source="assistant") == "Let me see. Yes."
    for number in (1, 2):
        block = model.requests[number].body["messages"][1]["content"][0]
        assert (block["type"], block["thinking"]) == ("thinking", "Let me see. ")


# -- counting


async def test_usage_is_told_after_each_call_and_added_up(
    live: LiveStack, live_key: str, model_session: Callable[..., Made], played: Callable[..., Any]
) -> None:
    usage = {"input_tokens": 1000, "output_tokens": 100, "cache_read_input_tokens": 500}
    played(bash("true").with_(usage=usage), say("ok").with_(usage=usage))
    session = model_session()
    frames = await run_task(session, "count")
    told = of_type(frames, "usage")
    assert len(told) == 2
    expected = {
        "input_tokens": 1000,
        "output_tokens": 100,
        "cache_read_tokens": 500,
        "model": "claude-sonnet-4-5",
    }
    for frame in told:
        assert {name: frame[name] for name in expected} == expected
        assert float(frame["cost_usd"]) == pytest.approx(0.00465)
        assert not {"message", "stop_reason"} & frame.keys()
    total = live.request("GET", f"/v1/sessions/{session['chat_session_id']}", token=live_key).json()["usage"]
    assert total == {
        "input_tokens": 2000, "output_tokens": 200, "cache_read_tokens": 1000, "cost_usd": pytest.approx(0.0093),
    }  # fmt: skip
    path = f"/v1/sessions/{session['chat_session_id']}/tasks/{frames[-1]['task_id']}"
    task = live.request("GET", path, token=live_key).json()
    assert (task["usage"]["input_tokens"], task["usage"]["output_tokens"]) == (2000, 200)
    assert (task["status"], task["exit_code"], task["result"]) == ("done", 0, "ok")


async def test_a_spent_budget_idles_and_a_raised_one_goes_on(
    live: LiveStack, live_key: str, model_session: Callable[..., Made], played: Callable[..., Any]
) -> None:
    usage = {"input_tokens": 60, "output_tokens": 50}
    model = played(bash("echo spent").with_(usage=usage))
    session = model_session(budget={"max_tokens": 100})
    path = f"/v1/sessions/{session['chat_session_id']}"
    for prompt, requests in (("one", 1), ("two", 1)):
        frames = await run_task(session, prompt)
        assert (frames[-1]["exit_code"], frames[-1]["reason"]) == (1, "budget")
        assert [f["code"] for f in of_type(frames, "error")] == ["budget_spent"]
        assert len(model.requests) == requests
        shown = live.request("GET", path, token=live_key).json()
        assert (shown["status"], shown["stop_reason"]) == ("idle", "budget")
    model = played(say("I go on."))
    answer = live.request("PATCH", path, {"budget": {"max_tokens": 1000}}, token=live_key)
    assert answer.status == 200
    frames = await run_task(session, "three")
    assert (frames[-1]["exit_code"], output_of(frames)) == (0, "I go on.")
    model.assert_finished()
    spent = live.request("PATCH", path, {"budget": {"max_usd": 0}}, token=live_key)
    assert spent.json()["budget"] == {"max_usd": 0}
    assert (await run_task(session, "four"))[-1]["reason"] == "budget"


async def test_max_turns_ends_a_task_and_not_the_session(
    live: LiveStack, live_key: str, model_session: Callable[..., Made], played: Callable[..., Any]
) -> None:
    model = played(bash("echo 1"), bash("echo 2"), say("Now."))
    session = model_session(agent={"kind": "deictic", "max_turns": 2})
    frames = await run_task(session, "count")
    assert output_of(frames, source="tool") == "1\n2\n"
    assert (frames[-1]["exit_code"], frames[-1]["reason"]) == (1, "max_turns")
    shown = live.request("GET", f"/v1/sessions/{session['chat_session_id']}", token=live_key).json()
    assert (shown["status"], shown["stop_reason"]) == ("idle", "max_turns")
    assert (await run_task(session, "go on"))[-1]["exit_code"] == 0
    model.assert_finished()


@pytest.mark.parametrize("reason", ["max_tokens", "refusal"])
async def test_an_answer_that_was_cut_off_or_refused_is_no_success(
    model_session: Callable[..., Made], played: Callable[..., Any], reason: str
) -> None:
    played(say("I would").with_(stop_reason=reason), say("ok"))
    session = model_session()
    frames = await run_task(session, "long")
    assert (frames[-1]["exit_code"], frames[-1]["reason"]) == (1, reason)
    assert (await run_task(session, "next"))[-1]["exit_code"] == 0


# -- a vendor that fails


@pytest.mark.parametrize(
    ("step", "code"),
    [
        (fail(401, "invalid x-api-key"), "llm_auth"),
        (fail(402), "llm_billing"),
        (fail(404, "model: nothing"), "llm_bad_request"),
        (fail(400, "prompt is too long: 300000 tokens"), "llm_context_too_long"),
        (garbage(), "llm_bad_response"),
        (garbage(b"<html>no</html>"), "llm_unreachable"),
        (redirect("https://elsewhere.example.com/v1/messages"), "llm_bad_response"),
    ],
)
async def test_what_no_retry_mends_ends_the_task_at_once(
    model_session: Callable[..., Made], played: Callable[..., Any], step: Step, code: str
) -> None:
    steps = [step] * 5 if code == "llm_unreachable" else [step]
    model = played(*steps, say("Fine."))
    session = model_session()
    frames = await run_task(session, "try")
    errors = of_type(frames, "error")
    assert {error["code"] for error in errors} == {code}
    assert errors[-1]["retry"] == ("exhausted" if len(steps) > 1 else "terminal")
    assert errors[-1]["task_id"] == frames[-1]["task_id"]
    assert KEY not in str(frames)
    assert (frames[-1]["exit_code"], frames[-1]["reason"]) == (1, code)
    assert types(frames).count("exit") == 1
    assert len(model.requests) == len(steps)
    after = await run_task(session, "again")
    assert (after[-1]["exit_code"], output_of(after)) == (0, "Fine.")
    model.assert_finished()


@pytest.mark.parametrize(
    ("step", "code"),
    [
        (fail(429, retry_after=1), "llm_rate_limited"),
        (fail(500), "llm_server_error"),
        (fail(503), "llm_overloaded"),
        (fail(529), "llm_overloaded"),
        (midstream_error(say("Half of it, and then")), "llm_overloaded"),
        (cut(say("Half of it, and then")), "llm_unreachable"),
    ],
)
async def test_what_passes_is_tried_again_and_said_once(
    model_session: Callable[..., Made], played: Callable[..., Any], step: Step, code: str
) -> None:
    model = played(step, say("All of it."))
    started = time.monotonic()
    frames = await run_task(model_session(), "try")
    took = time.monotonic() - started
    model.assert_finished()
    assert [(f["code"], f["retry"]) for f in of_type(frames, "error")] == [(code, "retrying")]
    assert output_of(sockets.kept(frames)) == "All of it."
    assert frames[-1]["exit_code"] == 0
    assert took >= (1.0 if code == "llm_rate_limited" else 0.5)
    assert len(of_type(frames, "usage")) == 1
    half_said = 1 if isinstance(step, Misbehaviour) else 0
    assert types(frames).count("restarted") == half_said
    assert output_of(frames).count("Half") == half_said


async def test_retries_end_and_the_session_stays_usable(
    model_session: Callable[..., Made], played: Callable[..., Any]
) -> None:
    model = played(*[fail(529, "Overloaded")] * 5, say("Back."))
    session = model_session()
    frames = await run_task(session, "try")
    assert [f["retry"] for f in of_type(frames, "error")] == ["retrying"] * 4 + ["exhausted"]
    assert {f["code"] for f in of_type(frames, "error")} == {"llm_overloaded"}
    assert (frames[-1]["exit_code"], frames[-1]["reason"]) == (1, "llm_overloaded")
    assert (await run_task(session, "again"))[-1]["exit_code"] == 0
    # Neighbouring prompts are one message: roles must alternate.
    assert [block["text"] for block in model.messages[0]["content"]] == ["try", "again"]
    model.assert_finished()


# -- cancel


async def cancelled(session: Made, gate: Gate) -> tuple[Frames, float]:
    """A task that is cancelled while the model stands at its gate."""
    async with websockets.connect(url_of(session)) as socket:
        await hear_until(socket, lambda f: f["type"] == "ready")
        await sockets.say(socket, type="task", prompt="talk")
        await asyncio.to_thread(gate.wait_arrived)
        asked = time.monotonic()
        await sockets.say(socket, type="cancel")
        frames = await hear_until(socket, is_exit)
        return frames, time.monotonic() - asked


@pytest.mark.parametrize("silent", [False, True])
async def test_a_cancel_ends_a_model_call_in_its_middle(
    model_session: Callable[..., Made], played: Callable[..., Any], silent: bool
) -> None:
    gate = Gate()
    model = played(hang(gate=gate) if silent else say("never said to its end", gate=gate), say("Yes?"))
    session = model_session()
    frames, took = await cancelled(session, gate)
    assert (frames[-1]["exit_code"], frames[-1]["reason"]) == (130, "cancelled")
    assert took < 5
    assert not of_type(frames, "error")
    assert model.requests[0].hung_up.wait(5)
    after = await run_task(session, "still there?")
    assert (after[-1]["exit_code"], output_of(after)) == (0, "Yes?")
    model.assert_finished()


async def test_a_cancelled_command_is_told_as_interrupted(
    model_session: Callable[..., Made], played: Callable[..., Any]
) -> None:
    model = played(bash("echo begun; sleep 1000"), say("I was stopped."))
    session = model_session()
    async with websockets.connect(url_of(session)) as socket:
        await hear_until(socket, lambda f: f["type"] == "ready")
        await sockets.say(socket, type="task", prompt="wait")
        await hear_until(socket, lambda f: f["type"] == "stdout")
        asked = time.monotonic()
        await sockets.say(socket, type="cancel")
        assert (await hear_until(socket, is_exit))[-1]["exit_code"] == 130
        assert time.monotonic() - asked < 5
    assert (await run_task(session, "and?"))[-1]["exit_code"] == 0
    model.assert_finished()
    last = model.messages[-1]["content"]
    assert [block["type"] for block in last] == ["tool_result", "text"]
    assert last[0]["is_error"] is True


async def test_a_task_that_takes_input_gets_it(
    model_session: Callable[..., Made], played: Callable[..., Any]
) -> None:
    played(bash("echo name?; sleep 1000"), say("ok"))
    async with websockets.connect(url_of(model_session())) as socket:
        await hear_until(socket, lambda f: f["type"] == "ready")
        await sockets.say(socket, type="task", prompt="ask")
        await hear_until(socket, lambda f: f["type"] == "stdout")
        await sockets.say(socket, type="stdin", data="jo\n")
        error = (await hear_until(socket, lambda f: f["type"] == "error"))[-1]
        assert error["code"] == "stdin_refused"  # A model's commands have no input; that must be said.
        await sockets.say(socket, type="cancel")
        await hear_until(socket, is_exit)


# -- keys


async def test_a_replaced_key_is_used_by_the_next_call_of_a_running_task(
    live: LiveStack, live_key: str, model_session: Callable[..., Made], played: Callable[..., Any]
) -> None:
    """CONTRACT 4: no restart and no lost work; SECURITY 4.10."""
    sockets.bundle_make(live, live_key, "hot", LLM_API_KEY="sk-ant-hot-old", GITHUB_TOKEN="ghp_hot_old")
    session = model_session("hot")
    gate = Gate()
    model = played(bash("echo ${GITHUB_TOKEN: -3:1}", gate=gate), say("ok"))
    async with websockets.connect(url_of(session)) as socket:
        await hear_until(socket, lambda f: f["type"] == "ready")
        await sockets.say(socket, type="task", prompt="go")
        await asyncio.to_thread(gate.wait_arrived)
        values = {"LLM_API_KEY": "sk-ant-hot-new", "GITHUB_TOKEN": "ghp_hot_new"}
        answer = live.request("PUT", "/v1/tenants/me/secrets/hot", {"values": values}, token=live_key)
        assert answer.json()["sessions_updated"] == 1
        gate.open()
        frames = await hear_until(socket, is_exit)
    assert frames[-1]["exit_code"] == 0
    assert [request.key for request in model.requests] == ["sk-ant-hot-old", "sk-ant-hot-new"]
    assert output_of(frames, source="tool") == "n\n"
    updated = of_type(frames, "secrets_updated")
    assert [(f["bundle"], f["version"], f["keys"]) for f in updated] == [
        ("hot", 2, ["GITHUB_TOKEN", "LLM_API_KEY"])
    ]


async def test_a_bad_key_is_a_typed_error_and_the_next_put_heals_it(
    live: LiveStack, live_key: str, model_session: Callable[..., Made], played: Callable[..., Any]
) -> None:
    sockets.bundle_make(live, live_key, "heals", LLM_API_KEY="sk-ant-heals-bad")
    session = model_session("heals")
    model = played(say("Healed."))
    model.keys = {"sk-ant-heals-good"}
    try:
        frames = await run_task(session, "go")
        assert [(f["code"], f["retry"]) for f in of_type(frames, "error")] == [("llm_auth", "terminal")]
        assert (frames[-1]["exit_code"], frames[-1]["reason"]) == (1, "llm_auth")
        path = "/v1/tenants/me/secrets/heals"
        live.request("PUT", path, {"values": {"LLM_API_KEY": "sk-ant-heals-good"}}, token=live_key)
        after = await run_task(session, "go")
        assert (after[-1]["exit_code"], output_of(after)) == (0, "Healed.")
    finally:
        model.keys = None


async def test_a_bundle_that_was_deleted_under_a_session_is_a_typed_error(
    live: LiveStack, live_key: str, model_session: Callable[..., Made], played: Callable[..., Any]
) -> None:
    """SECURITY 4.11."""
    sockets.bundle_make(live, live_key, "deleted", LLM_API_KEY="sk-ant-deleted")
    session = model_session("deleted")
    path = "/v1/tenants/me/secrets/deleted"
    assert live.request("DELETE", path, token=live_key).status == 409
    assert live.request("DELETE", f"{path}?force=true", token=live_key).status == 204
    model = played()
    frames = await run_task(session, "go")
    assert [(f["code"], f["retry"]) for f in of_type(frames, "error")] == [("llm_auth", "terminal")]
    assert frames[-1]["exit_code"] == 1
    assert model.requests == []


# -- in one call


async def test_a_sandbox_with_a_task_runs_it(
    live: LiveStack, live_key: str, played: Callable[..., Any]
) -> None:
    """`POST /v1/sandboxes` with `agent`, `task` and `llm_key` (CONTRACT 7)."""
    model = played(bash("echo from a task"), say("Done."))
    body = {
        "template": "standard", "agent": "deictic", "task": "go", "model": "claude-sonnet-4-5",
        "llm_key": "sk-ant-inline-key",
    }  # fmt: skip
    answer = live.request("POST", "/v1/sandboxes", body, token=live_key)
    assert answer.status == 201, answer.body
    made = answer.json()
    assert "sk-ant-inline-key" not in answer.body.decode()
    token = live.request("POST", f"/v1/sessions/{made['chat_session_id']}/token", token=live_key).json()
    async with websockets.connect(f"{token['connect_url']}?token={token['jwt']}&after=0") as socket:
        frames = await hear_until(socket, is_exit)
    assert output_of(frames) == "from a task\nDone."
    assert [request.key for request in model.requests] == ["sk-ant-inline-key"] * 2
    assert live.request("DELETE", f"/v1/sessions/{made['chat_session_id']}", token=live_key).status == 200

"""The model key stays outside a real sandbox, while its programs, the tenant and the operator do what they do."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.live import LiveStack, wait_for
from tests.model_server import Gate, call, say
from tests.sessions import sockets
from tests.sessions.programs import Made, of_type, play, program_session, session_now
from tests.sessions.sockets import output_of, run_task, stored

pytestmark = [pytest.mark.docker, pytest.mark.timeout(200)]

OLD, NEW, BAD = (f"sk-ant-broker-live-{word}-key" for word in ("first", "second", "wrong"))


@pytest.fixture
def session(live: LiveStack, live_key: str) -> Iterator[Made]:
    """A `claude-code` session whose bundle has the old key."""
    if live.request("GET", "/v1/tenants/me/secrets/broker-live", token=live_key).status == 404:
        sockets.bundle_make(live, live_key, "broker-live", LLM_API_KEY=OLD)
    _put(live, live_key, OLD)
    made = program_session(live, live_key, "claude-code", "broker-live")
    yield made
    live.request("DELETE", f"/v1/sessions/{made['chat_session_id']}", token=live_key)
    live.model.keys = None


def _put(live: LiveStack, key: str, value: str) -> Any:
    body = {"values": {"LLM_API_KEY": value}}
    answer = live.request("PUT", "/v1/tenants/me/secrets/broker-live", body, token=key)
    assert answer.status == 200, answer.body
    return answer.json()


def _asked(text: str, *, stream: bool = True) -> str:
    """A call of the model by curl, from inside."""
    body = json.dumps(
        {
            "model": "claude-opus-5-5",
            "max_tokens": 50,
            "stream": stream,
            "messages": [{"role": "user", "content": text}],
        }
    )
    return (
        "curl -sN -w '\\n%{http_code}\\n' -H 'content-type: application/json' -H 'anthropic-version: 2023-06-01' "
        f"-H 'x-api-key: none' -d '{body}' http://127.0.0.1:3128/llm/anthropic/v1/messages"
    )


def _found_inside(live: LiveStack, key: str, session: Made, pattern: str) -> tuple[list[str], list[str]]:
    """Lines of the sandbox's environments and command lines that match, and files.

    The searching programs have the pattern from a descriptor: on their command lines they would find themselves.
    """
    script = (
        f"n='{pattern}'; cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n' "
        "| grep -v '^n=' | grep -E -f <(printf %s \"$n\"); echo --; "
        'grep -rlE -f <(printf %s "$n") /workspace /home /tmp /run /etc /opt /var 2>/dev/null; true'
    )
    lines, _, files = sockets.run_in(live, key, session, script)["stdout"].partition("--\n")
    return lines.splitlines(), files.splitlines()


def test_the_key_is_nowhere_inside_while_a_program_uses_it(
    live: LiveStack, live_key: str, session: Made
) -> None:
    """CONTRACT 4: not in an environment, a file, an argument, or a socket's folder; neither whole nor encoded."""
    gate = Gate()
    play(live, say("thinking of it", gate=gate))
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(asyncio.run(run_task(session, "think"))))
    asking.start()
    gate.wait_arrived(30)
    forms = "|".join((OLD, base64.b64encode(OLD.encode()).decode().rstrip("="), OLD.encode().hex()))
    found, control = (_found_inside(live, live_key, session, text) for text in (forms, "e2a-sandbox"))
    gate.open()
    asking.join(60)
    assert answers, "the task ended"
    assert answers[0][-1]["exit_code"] == 0
    assert found == ([], [])
    assert control[0], "what the program has instead of a key is seen where the key was looked for"
    assert live.model.requests[0].key == OLD
    assert OLD not in json.dumps(stored(live, live_key, session))
    assert OLD not in live.log


def test_a_key_is_replaced_while_the_model_speaks(live: LiveStack, live_key: str, session: Made) -> None:
    """The call in flight ends with the old key, the next has the new one, in the same container; a bad key is a typed
    error, and the next one heals it."""
    live.model.keys = {OLD, NEW}
    gate = Gate()
    play(live, call("Bash", {"command": "echo worked", "description": "as asked"}, gate=gate), say("Done."))
    before = session_now(live, live_key, session)
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(asyncio.run(run_task(session, "work"))))
    asking.start()
    gate.wait_arrived(30)
    assert _put(live, live_key, NEW)["sessions_updated"] == 1
    gate.open()
    asking.join(60)
    (frames,) = answers
    assert frames[-1]["exit_code"] == 0, frames
    assert output_of(frames, source="tool") == "worked"
    assert [request.key for request in live.model.requests] == [OLD, NEW]
    updated = [frame for frame in stored(live, live_key, session) if frame["type"] == "secrets_updated"]
    assert [(one["bundle"], one["keys"]) for one in updated] == [("broker-live", ["LLM_API_KEY"])]
    _put(live, live_key, BAD)
    play(live, say("not reached"))
    failed = asyncio.run(run_task(session, "try"))
    assert failed[-1]["exit_code"] == 1
    assert of_type(failed, "error")[-1]["code"] == "llm_auth"
    _put(live, live_key, NEW)
    play(live, say("Healed."))
    assert output_of(asyncio.run(run_task(session, "again")), source="assistant") == "Healed."
    after = session_now(live, live_key, session)
    assert (after["sandbox_id"], after["status"]) == (before["sandbox_id"], "idle")


@pytest.mark.parametrize("victim", ["broker", "gateway"])
def test_one_of_the_two_is_killed_in_the_middle_and_the_next_call_works(
    live: LiveStack, live_key: str, session: Made, victim: str
) -> None:
    """A call that was cut is seen as cut, what it had cost is kept, and nothing must be started anew."""
    gate = Gate()
    play(live, say("one two three four", gate=gate).with_(usage={"input_tokens": 41}), say("five"))
    where = f"/v1/sandboxes/{session['sandbox_id']}/exec"
    answers: list[Any] = []

    def ask() -> None:
        answers.append(live.request("POST", where, {"command": _asked("count")}, token=live_key))

    asking = threading.Thread(target=ask)
    asking.start()
    gate.wait_arrived(30)
    live.kill(victim)
    gate.open()
    asking.join(60)
    if victim == "broker":  # A command's own stream breaks with the gateway, and may be asked for again.
        assert "text_delta" in answers[0].json()["stdout"]
        assert "message_stop" not in answers[0].json()["stdout"]

    def works() -> bool:
        answer = live.request("POST", where, {"command": _asked("go on", stream=False)}, token=live_key)
        return answer.status == 200 and str(answer.json()["stdout"]).rstrip().endswith("\n200")

    live.model.play([say("five")] * 100)
    wait_for(works, what=f"model calls after the {victim} was killed", every=0.3)
    assert session_now(live, live_key, session)["usage"]["input_tokens"] > 0

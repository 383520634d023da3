"""The scripted model server keeps the vendor's rules, so that a wrong conversation fails a test."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from typing import Any

import httpx2
import pytest

from tests.model_server import Gate, ModelServer, by_prompt, call, fail, say, then, think, together

HEADERS = {"x-api-key": "sk-ant-test", "anthropic-version": "2023-06-01"}
USER = {"role": "user", "content": "Hello"}
TOOL_USE = {"type": "tool_use", "id": "toolu_1", "name": "bash", "input": {}}
CALLED = {"role": "assistant", "content": [TOOL_USE]}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "ok"}


def post(
    models: ModelServer, *, headers: dict[str, str] | None = None, path: str = "/v1/messages", **changes: Any
) -> httpx2.Response:
    body = {"model": "claude-sonnet-5", "max_tokens": 100, "messages": [USER], **changes}
    with httpx2.Client(trust_env=False) as client:
        return client.post(models.url + path, json=body, headers=HEADERS if headers is None else headers)


def test_a_whole_message_without_streaming() -> None:
    with ModelServer(
        then(together(say("Hi."), call("bash", {"command": "ls"}, tool_use_id="toolu_9")))
    ) as models:
        answer = post(models)
    assert answer.status_code == 200
    message = answer.json()
    assert message["content"] == [
        {"type": "text", "text": "Hi."},
        {"type": "tool_use", "id": "toolu_9", "name": "bash", "input": {"command": "ls"}},
    ]
    assert (message["stop_reason"], message["role"], message["type"]) == ("tool_use", "assistant", "message")
    models.assert_finished()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "model: Field required"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "at least one message"),
        ({"messages": [USER, USER]}, "roles must alternate"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "roles must alternate"),
        ({"messages": [USER, {"role": "assistant", "content": "a"}]}, "last message must be from the user"),
        ({"messages": [{"role": "user", "content": ""}]}, "non-whitespace"),
        ({"messages": [{"role": "user", "content": []}]}, "non-empty content"),
        ({"messages": [{"role": "system", "content": "a"}]}, "roles must alternate"),
        ({"messages": [{"role": "user", "content": [TOOL_USE]}]}, "is not for role user"),
        ({"messages": [USER, CALLED, USER]}, "without `tool_result` blocks"),
        ({"messages": [{"role": "user", "content": [RESULT]}]}, "unexpected `tool_use_id`"),
        ({"messages": [USER, CALLED, {"role": "user", "content": [RESULT, RESULT]}]}, "single result"),
        (
            {
                "messages": [
                    USER,
                    CALLED,
                    {"role": "user", "content": [{"type": "text", "text": "a"}, RESULT]},
                ]
            },
            "must come first",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": [TOOL_USE, TOOL_USE]}, USER]},
            "ids must be unique",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": [{**TOOL_USE, "input": "x"}]}, USER]},
            "valid dictionary",
        ),
        ({"tools": [{"name": "a b", "input_schema": {"type": "object"}}]}, "bad tool name"),
        ({"tools": [{"name": "a", "input_schema": {"type": "array"}}]}, "should be 'object'"),
        ({"tools": [{"name": "a"}]}, "input_schema: Field required"),
        ({"tools": [{"name": "bash", "type": "bash_20991231"}]}, "does not match any of the expected tags"),
        ({"tools": [{"name": "shell", "type": "bash_20250124"}]}, "should be 'bash'"),
        ({"tools": [{"name": "bash", "type": "bash_20250124"}] * 2}, "must be unique"),
        ({"system": [{"type": "text", "text": " "}]}, "non-whitespace"),
        ({"tempo": 1}, "tempo: Extra inputs are not permitted"),
        (
            {"system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}] * 5},
            "A maximum of 4 blocks",
        ),
    ],
)
def test_a_malformed_request_gets_the_vendors_400(changes: dict[str, Any], message: str) -> None:
    with ModelServer(then(say("never"))) as models:
        answer = post(models, **changes)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert message in answer.json()["error"]["message"]
    with pytest.raises(AssertionError):
        models.assert_finished()


def test_keys_and_headers_are_checked() -> None:
    with ModelServer(then(say("ok"), say("ok")), keys={"sk-good"}) as models:
        version = {"anthropic-version": "2023-06-01"}
        assert post(models, headers=version).status_code == 401
        assert post(models, headers={**version, "x-api-key": "sk-bad"}).status_code == 401
        assert post(models, headers={"x-api-key": "sk-good"}).status_code == 400
        assert post(models, headers={**version, "x-api-key": "sk-good"}).status_code == 200
        models.keys = {"sk-new"}
        assert post(models, headers={**version, "authorization": "Bearer sk-good"}).status_code == 401
        assert post(models, headers={**version, "authorization": "Bearer sk-new"}).status_code == 200
        assert post(models, path="/v1/other").status_code == 404
    assert [request.key for request in models.requests[-3:-1]] == ["sk-good", "sk-new"]


def test_a_changed_thought_is_refused() -> None:
    with ModelServer(then(together(think("Hm."), say("Hi.")), say("ok"))) as models:
        content = post(models).json()["content"]
        changed = [{**content[0], "thinking": "Ha."}, content[1]]
        for blocks, status in ((changed, 400), (content, 200)):
            messages = [USER, {"role": "assistant", "content": blocks}, USER]
            assert post(models, messages=messages).status_code == status


def test_one_request_too_many_is_refused_and_noticed() -> None:
    with ModelServer(then(say("only"))) as models:
        assert post(models).status_code == 200
        assert post(models).status_code == 400
        with pytest.raises(AssertionError, match="this is request 2"):
            models.assert_finished()


def test_a_script_can_be_a_function_of_the_request_or_of_the_prompt() -> None:
    script = by_prompt({"weather": [call("bash", {"command": "date"}), say("Sunny.")]}, otherwise=[fail(529)])
    with ModelServer(script) as models:
        weather = {"role": "user", "content": "The weather?"}
        first = post(models, messages=[weather]).json()
        result = {**RESULT, "tool_use_id": first["content"][0]["id"]}
        turn = [
            weather,
            {"role": "assistant", "content": first["content"]},
            {"role": "user", "content": [result]},
        ]
        for _ in range(2):  # A retry gets the same step.
            assert post(models, messages=turn).json()["content"][0]["text"] == "Sunny."
        assert post(models).status_code == 529
        assert models.requests[1].tool_results == [result]
        assert models.requests[-1].prompt == "Hello"
        models.play(lambda body, headers: say(f"{body['model']} {headers['x-api-key']}"))
        assert post(models).json()["content"][0]["text"] == "claude-sonnet-5 sk-ant-test"


def test_a_gate_holds_an_answer_until_it_is_opened() -> None:
    gate = Gate()
    with ModelServer(then(say("done", gate=gate))) as models:
        answers: list[httpx2.Response] = []
        thread = threading.Thread(target=lambda: answers.append(post(models)), daemon=True)
        thread.start()
        gate.wait_arrived()
        assert answers == []
        gate.open()
        thread.join(5)
        assert answers[0].status_code == 200


def test_it_speaks_openais_responses_too() -> None:
    headers = {"authorization": "Bearer sk-test"}

    def ask(models: ModelServer, *items: dict[str, Any], stream: bool = True) -> httpx2.Response:
        body = {"model": "gpt-5", "stream": stream, "input": list(items)}
        return httpx2.post(f"{models.url}/v1/responses", json=body, headers=headers, trust_env=False)

    said = {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}
    with ModelServer(then(together(say("Hi."), call("run", {"a": 1})), say("Bye."), fail(429))) as models:
        events = [
            json.loads(line[6:]) for line in ask(models, said).text.splitlines() if line.startswith("data: ")
        ]
        assert "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta") == "Hi."
        answer = events[-1]["response"]
        assert (events[-1]["type"], answer["status"]) == ("response.completed", "completed")
        called = answer["output"][1]
        assert (called["type"], json.loads(called["arguments"])) == ("function_call", {"a": 1})
        assert ask(models, said, called).status_code == 400
        result = {"type": "function_call_output", "call_id": called["call_id"], "output": "1"}
        whole = ask(models, said, called, result, stream=False).json()
        assert whole["output"][0]["content"][0]["text"] == "Bye."
        assert models.requests[-1].tool_results[0]["content"] == "1"
        refusal = ask(models, said)
        assert (refusal.status_code, refusal.json()["error"]["type"]) == (429, "rate_limit_error")
        assert models.requests[-1].prompt == "Hello"


def test_it_runs_by_itself_with_a_demo_script() -> None:
    command = [sys.executable, "-m", "tests.model_server", "--port", "0", "--script", "demo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split(" on ")[1].split(";")[0]
            body = {
                "model": "m",
                "max_tokens": 9,
                "messages": [{"role": "user", "content": "run: uname"}],
                "tools": [{"type": "bash_20250124", "name": "bash"}],
            }
            answer = httpx2.post(f"{url}/v1/messages", json=body, headers=HEADERS, trust_env=False).json()
            assert answer["content"][1]["input"] == {"command": "uname"}
        finally:
            process.terminate()

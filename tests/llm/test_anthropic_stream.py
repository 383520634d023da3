"""The real SDK, over real HTTP, against the scripted model server."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from sessions_app.llm.anthropic_message import BASH_TOOL, EDITOR_TOOL
from sessions_app.llm.base import (
    Message,
    MessageDone,
    ModelError,
    ModelRequest,
    TextDelta,
    ThinkingDelta,
    ToolInputStarted,
    Usage,
)
from tests.llm.conftest import KEY, Opened
from tests.model_server import Gate, ModelServer, call, hang, say, then, think, together


def said(text: str) -> Message:
    return {"role": "user", "content": [{"type": "text", "text": text}]}


def asked(*messages: Message, **changes: Any) -> ModelRequest:
    fields = {"model": "claude-sonnet-5", "system": "Be brief.", **changes}
    return ModelRequest(messages=messages or (said("Hello"),), **fields)


def test_text_arrives_in_pieces_and_the_message_is_whole(open_client: Opened) -> None:
    usage = {
        "input_tokens": 12,
        "output_tokens": 5,
        "cache_read_input_tokens": 900,
        "cache_creation_input_tokens": 40,
    }
    with ModelServer(then(say("Hello, Alice.", pieces=4).with_(usage=usage))) as models:
        events = list(open_client(models).stream(asked()))
    texts = [event.text for event in events if isinstance(event, TextDelta)]
    assert len(texts) == 4
    assert "".join(texts) == "Hello, Alice."
    assert events[-1] == MessageDone(
        content=[{"type": "text", "text": "Hello, Alice."}],
        stop_reason="end_turn",
        usage=Usage(input_tokens=12, output_tokens=5, cache_read_tokens=900, cache_write_tokens=40),
        model="claude-sonnet-5",
    )
    models.assert_finished()


def test_the_request_is_in_the_vendors_form_with_key_tools_and_cache_marks(open_client: Opened) -> None:
    custom = {"name": "weather", "description": "Says it.", "input_schema": {"type": "object"}}
    request = asked(tools=(BASH_TOOL, EDITOR_TOOL, custom), max_tokens=99)
    with ModelServer(then(say("ok")), keys={KEY}) as models:
        list(open_client(models, key=f" {KEY}\n").stream(request))
    (sent,) = models.requests
    assert sent.path == "/v1/messages"
    assert sent.key == KEY
    assert sent.headers["authorization"] == f"Bearer {KEY}"
    assert sent.headers["x-api-key"] == KEY
    assert sent.headers["anthropic-version"] == "2026-10-21"
    cached = {"type": "ephemeral"}
    assert sent.body == {
        "model": "claude-sonnet-5",
        "max_tokens": 99,
        "stream": True,
        "system": [{"type": "text", "text": "Be brief.", "cache_control": cached}],
        "tools": [
            {"type": "bash_20250124", "name": "bash"},
            {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
            custom,
        ],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hello", "cache_control": cached}]}
        ],
    }
    assert request.messages == (said("Hello"),)


def test_without_a_system_prompt_the_tools_bear_the_mark(open_client: Opened) -> None:
    with ModelServer(then(say("ok"))) as models:
        list(open_client(models).stream(asked(system="", tools=(BASH_TOOL,))))
    assert "system" not in models.requests[0].body
    assert models.requests[0].body["tools"] == [{**BASH_TOOL, "cache_control": {"type": "ephemeral"}}]


def test_a_turn_with_thoughts_and_tools_is_replayed_verbatim(open_client: Opened) -> None:
    """The server refuses changed thinking blocks, unanswered calls and wrong roles, as the vendor does."""
    first = together(
        think("The folder first."),
        say("Looking."),
        call("bash", {"command": "ls -l 'ü'"}, tool_use_id="toolu_1"),
        call("bash", {"command": "pwd"}, tool_use_id="toolu_2"),
    )
    with ModelServer(then(first, say("Two files."))) as models:
        client = open_client(models)
        request = asked(tools=(BASH_TOOL,))
        events = list(client.stream(request))
        assert [type(event) for event in events if not isinstance(event, TextDelta | ThinkingDelta)] == [
            ToolInputStarted,
            ToolInputStarted,
            MessageDone,
        ]
        assert (
            "".join(event.text for event in events if isinstance(event, ThinkingDelta)) == "The folder first."
        )
        done = events[-1]
        assert isinstance(done, MessageDone)
        assert done.stop_reason == "tool_use"
        assert done.content == list(first.blocks)
        results: Message = {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "a b"},
                {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no", "is_error": True},
            ],
        }
        again = asked(
            said("Hello"), {"role": "assistant", "content": done.content}, results, tools=(BASH_TOOL,)
        )
        final = list(client.stream(again))[-1]
    assert isinstance(final, MessageDone)
    assert final.content == [{"type": "text", "text": "Two files."}]
    assert models.requests[1].body["messages"][1]["content"] == list(first.blocks)
    models.assert_finished()


def test_a_tool_input_that_was_cut_off_is_named_and_empty(open_client: Opened) -> None:
    reply = together(
        call("bash", {"command": "true"}, tool_use_id="toolu_whole"),
        call("bash", {"command": "echo " + "x" * 100}, tool_use_id="toolu_cut"),
    ).with_(stop_reason="max_tokens", cut_input_of="toolu_cut")
    with ModelServer(then(reply)) as models:
        done = list(open_client(models).stream(asked(tools=(BASH_TOOL,))))[-1]
    assert isinstance(done, MessageDone)
    assert done.stop_reason == "max_tokens"
    assert done.broken_tool_inputs == {"toolu_cut"}
    assert [block["input"] for block in done.content] == [{"command": "true"}, {}]


def test_one_connection_serves_many_calls_and_v1_may_be_named(open_client: Opened) -> None:
    with ModelServer(then(say("one"), say("two"))) as models:
        client = open_client(models, path="/v1")
        for _ in range(2):
            list(client.stream(asked()))
        assert [request.path for request in models.requests] == ["/v1/messages"] * 2


def test_a_model_that_reports_in_thoughts_is_asked_for_them(open_client: Opened) -> None:
    with ModelServer(then(say("a"), say("b"))) as models:
        client = open_client(models)
        list(client.stream(asked(model="claude-sonnet-5-5")))
        list(client.stream(asked(model="claude-haiku-4-5")))
    assert models.requests[0].body["thinking"] == {"type": "adaptive", "display": "summarized"}
    assert "thinking" not in models.requests[1].body


def test_close_from_another_thread_ends_the_stream_at_once(open_client: Opened) -> None:
    gate = Gate()
    with ModelServer(then(say("one two three four", gate=gate))) as models:
        client = open_client(models)
        seen: list[object] = []
        caught: list[ModelError] = []

        def run() -> None:
            try:
                for event in client.stream(asked()):
                    seen.append(event)  # noqa: PERF402
            except ModelError as error:
                caught.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        gate.wait_arrived()
        client.close()
        thread.join(5)
        assert not thread.is_alive()
        assert [error.code for error in caught] == ["llm_closed"]
        assert len(seen) <= 1
        assert models.requests[0].hung_up.wait(5)
        with pytest.raises(ModelError, match="llm_closed"):
            next(iter(client.stream(asked())))
        client.close()


def test_close_ends_a_call_that_was_never_answered(open_client: Opened) -> None:
    with ModelServer(then(hang())) as models:
        client = open_client(models)
        caught: list[ModelError] = []

        def run() -> None:
            try:
                list(client.stream(asked()))
            except ModelError as error:
                caught.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        models.wait_for_requests(1)
        client.close()
        thread.join(5)
        assert not thread.is_alive()
        assert [error.code for error in caught] == ["llm_closed"]


def test_dropping_the_iterator_ends_the_call(open_client: Opened) -> None:
    gate = Gate()
    with ModelServer(then(say("one two three", gate=gate), say("next"))) as models:
        client = open_client(models)
        stream = client.stream(asked())
        assert isinstance(next(stream), TextDelta)
        stream.close()  # type: ignore[attr-defined]
        assert models.requests[0].hung_up.wait(5)
        assert isinstance(list(client.stream(asked()))[-1], MessageDone)


def test_our_own_environment_does_not_reach_the_endpoint(
    open_client: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-operators-own")
    monkeypatch.setenv("ANTHROPIC_AUTH_TOKEN", "operators-token")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "https://elsewhere.example.com")
    monkeypatch.setenv("ANTHROPIC_CUSTOM_HEADERS", "X-Operator: operators-header")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    with ModelServer(then(say("ok"))) as models:
        list(open_client(models).stream(asked()))
    text = repr(models.requests[0])
    assert models.requests[0].key == KEY
    for planted in ("sk-operators-own", "operators-token", "operators-header", "x-operator"):
        assert planted not in text

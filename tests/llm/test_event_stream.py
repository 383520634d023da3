"""The bounded decoder and the message builder, with every way of cutting a stream."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessions_app.llm.anthropic_message import BadMessageError, MessageBuilder
from sessions_app.llm.base import MessageDone
from sessions_app.llm.sse import BadEventStreamError, server_sent_events

STREAM = (
    ": a comment\n\nevent: a\ndata: {}\n\nid: 1\nevent: ü\ndata: one\ndata: two\r\n\r\n\n\n"
    "data:three\nretry: 5\n\nevent: empty\n\ndata: cut off"
).encode()
EVENTS = [("a", "{}"), ("ü", "one\ntwo"), ("message", "three")]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_do_not_depend_on_how_the_bytes_were_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    chunks = [STREAM[start:end] for start, end in itertools.pairwise(edges)]
    assert list(server_sent_events(chunks)) == EVENTS


def test_events_arrive_as_soon_as_they_are_whole() -> None:
    def chunks() -> Any:
        yield b"data: 1\n\n"
        raise AssertionError("read on before the first event was given")

    assert next(server_sent_events(chunks())).data == "1"


@pytest.mark.parametrize("body", [b"data: " + b"x" * 99, b"data: x\n" * 13, b": x\n" * 26, b"\xff" * 101])
def test_an_event_over_the_limit_is_refused(body: bytes) -> None:
    chunks = [body[start : start + 7] for start in range(0, len(body), 7)]
    with pytest.raises(BadEventStreamError):
        list(server_sent_events(chunks, max_event_bytes=100))


def built(*events: dict[str, Any]) -> MessageDone:
    builder = MessageBuilder("claude-x")
    start = {"type": "message_start", "message": {"model": "claude-x", "usage": {"input_tokens": 3}}}
    found = [out for event in (start, *events, {"type": "message_stop"}) for out in builder.feed(event)]
    assert isinstance(found[-1], MessageDone)
    return found[-1]


def block(index: int, content: dict[str, Any], *deltas: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"type": "content_block_start", "index": index, "content_block": content},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def test_blocks_and_fields_nobody_knows_are_kept_verbatim() -> None:
    strange = {"type": "quantum_result", "payload": {"a": [1, None]}, "seal": "x"}
    redacted = {"type": "redacted_thinking", "data": "EqQB"}
    tool = {"type": "tool_use", "id": "t1", "name": "bash", "input": {}, "caller": {"type": "direct"}}
    done = built(
        *block(0, redacted),
        *block(1, strange, {"type": "quantum_delta", "payload": "?"}),
        *block(2, tool, {"type": "input_json_delta", "partial_json": '{"command": "l'},
               {"type": "input_json_delta", "partial_json": 's"}'}),
        {"type": "weather_report"},
        *block(3, {"type": "thinking", "thinking": "", "signature": ""},
               {"type": "thinking_delta", "thinking": "hm"}, {"type": "signature_delta", "signature": "sig"}),
        *block(4, {"type": "text", "text": "", "citations": None}, {"type": "text_delta", "text": "a"},
               {"type": "citations_delta", "citation": {"n": 1}},
               {"type": "citations_delta", "citation": {"n": 2}}),
        {"type": "message_delta", "delta": {"stop_reason": "refusal"}, "usage": {"output_tokens": 9}},
    )  # fmt: skip
    assert done.content == [
        redacted,
        strange,
        {**tool, "input": {"command": "ls"}},
        {"type": "thinking", "thinking": "hm", "signature": "sig"},
        {"type": "text", "text": "a", "citations": [{"n": 1}, {"n": 2}]},
    ]
    assert (done.stop_reason, done.usage.input_tokens, done.usage.output_tokens) == ("refusal", 3, 9)
    assert done.broken_tool_inputs == frozenset()


@pytest.mark.parametrize("raw", ["{", "[]", "1", '"x"', "null", '{"a": NaN}', "[" * 100_000])
def test_a_tool_input_that_is_no_object_is_broken(raw: str) -> None:
    tool = {"type": "tool_use", "id": "t1", "name": "bash", "input": {}}
    done = built(*block(0, tool, {"type": "input_json_delta", "partial_json": raw}))
    assert done.broken_tool_inputs == {"t1"}
    assert done.content == [tool]


def test_lone_surrogates_do_not_get_through() -> None:
    tool = {"type": "tool_use", "id": "t1", "name": "bash", "input": {}}
    raw = '{"command": "\\ud83d\\ude00 \\ud800!"}'
    done = built(*block(0, tool, {"type": "input_json_delta", "partial_json": raw}))
    assert done.content[0]["input"] == {"command": "\U0001f600 �!"}


@pytest.mark.parametrize(
    "events",
    [
        block(0, {"type": "tool_use", "id": "", "name": "bash"}),
        block(0, {"type": "tool_use", "id": "t 1", "name": "bash"}),
        block(0, {"type": "tool_use", "id": "t1", "name": "b a"}),
        block(0, {"type": "tool_use", "id": "t1"}),
        block(0, {"text": "no type"}),
        block(0, {"type": "text", "text": ""}, {"type": "text_delta"}),
        block(0, {"type": "text", "text": ""}, {"type": "text_delta", "text": 5}),
        [*block(0, {"type": "text", "text": ""}), *block(0, {"type": "text", "text": ""})],
        [
            *block(0, {"type": "tool_use", "id": "t1", "name": "a"}),
            *block(1, {"type": "tool_use", "id": "t1", "name": "a"}),
        ],
        [{"type": "content_block_delta", "index": 3, "delta": {"type": "text_delta", "text": "x"}}],
        [{"type": "content_block_start", "index": "0", "content_block": {"type": "text"}}],
        [{"type": "message_start", "message": {}}],
        [{"type": "message_delta"}],
    ],
)
def test_events_that_make_no_message_are_refused(events: list[dict[str, Any]]) -> None:
    with pytest.raises(BadMessageError):
        built(*events)


@pytest.mark.parametrize("count", [-1, True, "5", 1.5, None, 10**12, {}])
def test_counts_that_make_no_sense_are_not_taken(count: object) -> None:
    done = built({"type": "message_delta", "delta": {}, "usage": {"output_tokens": count}})
    assert (done.usage.input_tokens, done.usage.output_tokens) == (3, 0)

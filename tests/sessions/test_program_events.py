"""What the programs claude and codex print, as frames: from streams that the real ones printed, cut anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandboxes.guest_client import Gap, Output
from secrets_vault.services import bundles_attach
from sessions_app.agents.claude_code import ClaudeEvents
from sessions_app.agents.cli import LINE_LIMIT, EventLines, event_of
from sessions_app.agents.codex import CodexEvents
from sessions_app.agents.narration import Narrator, mark_of
from sessions_app.log import TurnLog, append
from sessions_app.models import Event, Session, Task
from sessions_app.task_queue import fence_of
from sessions_app.turns import Turn
from tests.sessions import sockets

pytestmark = pytest.mark.django_db(transaction=True)

STREAMS = Path(__file__).parent / "streams"
SECRET = "ghp-a-token-of-the-tenant"


class Player:
    """Plays a program's output to fresh attempts of one task."""

    def __init__(self, session: Session, task: Task, program: str) -> None:
        self.session, self.task, self.program = session, task, program
        self.attempts = 0

    def attempt(self) -> EventLines:
        self.attempts += 1
        self.task.attempt = self.attempts
        Task.objects.filter(pk=self.task.pk).update(attempt=self.attempts)
        log = TurnLog(self.session, fence_of(self.task))
        self.turn = Turn(self.session, self.task, log, is_resumed=self.attempts > 1)
        narrator = Narrator(self.turn)
        is_claude = self.program == "claude"
        translation = ClaudeEvents(narrator) if is_claude else CodexEvents(narrator, self.task.public_id)
        lines = EventLines(narrator, translation)
        if self.turn.is_resumed:
            lines.resume()
        return lines

    def feed(self, lines: EventLines, output: bytes, *, until: int | None = None, piece: int = 700) -> None:
        end = len(output) if until is None else until
        for start in range(lines.offset, end, piece):
            lines.output(Output("stdout", start, output[start : min(start + piece, end)]))

    def play(self, output: bytes) -> EventLines:
        lines = self.attempt()
        self.feed(lines, output)
        lines.finish()
        self.turn.log.flush()
        return lines

    def frames(self) -> sockets.Frames:
        """What a reader keeps."""
        rows = Event.objects.filter(task=self.task).exclude(type="task_started").order_by("seq")
        found = [
            {"type": kind, "seq": seq, "task_id": self.task.public_id, **data}
            for kind, seq, data in rows.values_list("type", "seq", "data")
        ]
        return [frame for frame in sockets.kept(found) if frame["type"] != "restarted"]


Told = Callable[[str], Player]


@pytest.fixture
def player(make_session: Callable[..., Session]) -> Callable[[str], Player]:
    """`player("claude")`: a running task of that program's agent."""
    from django.db import transaction

    from e2a.core.clock import now
    from sessions_app import frames
    from sessions_app.models import TaskState

    def make(program: str) -> Player:
        session = make_session(agent_kind="claude-code" if program == "claude" else "codex")
        task = Task.objects.create(
            session=session, prompt="do it", state=TaskState.RUNNING, attempt=1, created_at=now()
        )
        with transaction.atomic():
            append(session, [frames.task_started(task.pk, "do it", attempt=1)])
        return Player(session, task, program)

    return make


def recorded(name: str) -> bytes:
    return (STREAMS / f"{name}.jsonl").read_bytes()


def lines_of(*events: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(event).encode() + b"\n" for event in events)


def shape(frames: sockets.Frames) -> list[tuple[Any, ...]]:
    """Frames without what differs from run to run; neighbouring text as one."""
    found: list[tuple[Any, ...]] = []
    for frame in frames:
        if frame["type"] == "stdout":
            key = ("stdout", frame["source"], frame.get("tool_use_id"))
            if found and found[-1][:3] == key:
                found[-1] = (*key, found[-1][3] + frame["data"])
            else:
                found.append((*key, frame["data"]))
        else:
            kept = {k: v for k, v in frame.items() if k not in ("seq", "type", "task_id")}
            found.append((frame["type"], kept))
    return found


# -- claude


def test_claudes_words_tools_and_results(player: Told) -> None:
    told = player("claude")
    lines = told.play(recorded("claude-tool"))
    call = "toolu_000000000000000000000001"
    command = {"command": "echo hi; echo err >&2; exit 3", "description": "x"}
    assert shape(told.frames()) == [
        ("stdout", "assistant", None, "Looking now."),
        ("tool_use", {"tool_use_id": call, "name": "Bash", "input": command}),
        ("stdout", "tool", call, "hi\nerr"),
        ("tool_result", {"tool_use_id": call, "is_error": True, "exit_code": 3, "truncated": False}),
        ("stdout", "assistant", None, "Done it."),
    ]
    outcome = lines.translation.outcome
    assert (outcome.text, outcome.failure, outcome.is_whole) == ("Done it.", None, True)


def test_a_bad_key_is_told_with_its_retries(player: Told) -> None:
    told = player("claude")
    failure = told.play(recorded("claude-bad-key")).translation.outcome.failure
    assert failure is not None
    assert failure.code == "llm_auth"
    assert [(f["type"], f["code"], f["retry"]) for f in told.frames()] == [
        ("error", "llm_auth", "retrying"),
        ("error", "llm_auth", "retrying"),
    ]


def test_an_overload_that_passes_is_no_failure(player: Told) -> None:
    told = player("claude")
    outcome = told.play(recorded("claude-retries")).translation.outcome
    assert (outcome.text, outcome.failure) == ("ok then", None)
    assert [f["code"] for f in told.frames() if f["type"] == "error"] == [
        "llm_overloaded",
        "llm_rate_limited",
    ]


def test_words_of_a_call_that_broke_off_are_taken_back(player: Told) -> None:
    told = player("claude")
    outcome = told.play(recorded("claude-broken-off")).translation.outcome
    assert shape(told.frames()) == [("stdout", "assistant", None, "ok then")]
    assert outcome.text == "ok then"
    everything = Event.objects.filter(task=told.task, type="stdout").values_list("data", flat=True)
    assert "some text th" in "".join(data["data"] for data in everything)


def test_the_end_of_turns_and_a_lost_conversation(player: Told) -> None:
    assert player("claude").play(recorded("claude-max-turns")).translation.outcome.is_out_of_turns
    failure = player("claude").play(recorded("claude-no-conversation")).translation.outcome.failure
    assert failure is not None
    assert failure.code == "agent_failed"
    assert "No conversation found" in failure.detail


def test_what_a_subagent_says_is_the_inside_of_a_call(player: Told) -> None:
    told = player("claude")
    text = {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "inside"}}
    told.play(lines_of({"type": "stream_event", "event": text, "parent_tool_use_id": "toolu_1"}))
    assert told.frames() == []


# -- codex


def test_codexs_words_commands_and_results(player: Told) -> None:
    told = player("codex")
    lines = told.play(recorded("codex-tool"))
    call = f"{told.task.public_id}_item_2"
    command = "/bin/bash -lc 'echo hi; sleep 1; echo err >&2; exit 3'"
    assert shape(told.frames()) == [
        ("stdout", "assistant", None, "Looking now."),
        ("tool_use", {"tool_use_id": call, "name": "command_execution", "input": {"command": command}}),
        ("stdout", "tool", call, "hi\nerr\n"),
        ("tool_result", {"tool_use_id": call, "is_error": True, "exit_code": 3, "truncated": False}),
        ("stdout", "assistant", None, "Done it."),
    ]
    assert lines.translation.outcome.text == "Done it."


def test_codexs_patches_are_shown(player: Told) -> None:
    told = player("codex")
    told.play(recorded("codex-patch"))
    call = f"{told.task.public_id}_item_1"
    changes = [{"path": "/workspace/a.txt", "kind": "add"}]
    assert shape(told.frames())[:3] == [
        ("tool_use", {"tool_use_id": call, "name": "file_change", "input": {"changes": changes}}),
        ("stdout", "tool", call, "add /workspace/a.txt\n"),
        ("tool_result", {"tool_use_id": call, "is_error": False, "truncated": False}),
    ]


def test_a_refusal_of_the_budget_is_told_once_and_without_our_address(player: Told) -> None:
    told = player("codex")
    failure = told.play(recorded("codex-refused")).translation.outcome.failure
    assert failure is not None
    assert failure.code == "budget_spent"
    assert "http" not in failure.detail
    assert told.frames() == []


def test_codexs_retries_are_told(player: Told) -> None:
    told = player("codex")
    outcome = told.play(recorded("codex-retries")).translation.outcome
    assert (outcome.text, outcome.failure) == ("ok then", None)
    assert [(f["code"], f["retry"]) for f in told.frames() if f["type"] == "error"] == [
        ("llm_rate_limited", "retrying")
    ]


def test_a_call_that_was_left_open_has_an_end(player: Told) -> None:
    told = player("codex")
    told.play(recorded("codex-background"))
    kinds = [frame["type"] for frame in told.frames()]
    assert kinds == ["tool_use", "stdout", "tool_result"]


def test_the_thread_outlives_a_task_that_was_cut_off_before_it_said_anything(player: Told) -> None:
    told = player("codex")
    lines = told.attempt()
    told.feed(lines, lines_of({"type": "thread.started", "thread_id": "01a2268c-ec85-7d92-875c"}))
    mark = mark_of(Event.objects.filter(session=told.session))
    assert mark is not None
    assert mark.state["thread"] == "01a2268c-ec85-7d92-875c"


# -- resuming


def cuts_of(output: bytes) -> Iterator[int]:
    """Places to die at: every line's end, and many inside lines."""
    ends = [at + 1 for at, byte in enumerate(output) if byte == 10]
    yield from ends[:-1:3]
    yield from range(1, len(output), max(1, len(output) // 8))


@pytest.mark.parametrize("name", ["claude-tool", "claude-broken-off", "codex-tool"])
def test_a_worker_that_dies_anywhere_is_followed_without_a_gap_or_a_repetition(
    player: Told, name: str
) -> None:
    program = name.partition("-")[0]
    output = recorded(name)
    whole = player(program)
    whole.play(output)
    expected = shape(whole.frames())
    for cut in cuts_of(output):
        told = player(program)
        told.feed(told.attempt(), output, until=cut)
        told.turn.log.flush()
        told.play(output)
        found = json.dumps(shape(told.frames())).replace(told.task.public_id, whole.task.public_id)
        assert found == json.dumps(expected), f"cut at {cut}"


def spoken_with_secret() -> bytes:
    pieces = ["The token is ghp-", "a-token-of", "-the-tenant, and ghp-a-", "tokens are many. ", "Bye"]
    start = {"type": "message_start", "message": {"id": "msg_1"}}
    deltas = [
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": piece}}
        for piece in pieces
    ]
    ends = [{"type": "content_block_stop", "index": 0}, {"type": "message_stop"}]
    return lines_of(*({"type": "stream_event", "event": event} for event in (start, *deltas, *ends)))


def test_a_secret_split_over_deltas_is_redacted_also_by_the_one_who_follows(
    player: Told, bundle: Callable[..., Any], alice: Any
) -> None:
    bundle(alice, "mine", GITHUB_TOKEN=SECRET)
    output = spoken_with_secret()
    expected = "The token is [redacted:GITHUB_TOKEN], and ghp-a-tokens are many. Bye"
    for cut in (0, *range(10, len(output), 100), len(output)):
        told = player("claude")
        bundles_attach(tenant=alice.tenant, names=("mine",), holder=told.session.public_id)
        told.feed(told.attempt(), output, until=cut)
        told.turn.log.flush()
        told.play(output)
        assert sockets.output_of(told.frames()) == expected, f"cut at {cut}"


def test_a_secret_in_a_tools_input_or_output_is_redacted(
    player: Told, bundle: Callable[..., Any], alice: Any
) -> None:
    bundle(alice, "mine", GITHUB_TOKEN=SECRET)
    told = player("claude")
    bundles_attach(tenant=alice.tenant, names=("mine",), holder=told.session.public_id)
    call = {"type": "tool_use", "id": "t1", "name": "Bash", "input": {"command": f"echo {SECRET}"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": SECRET}]}
    told.play(
        lines_of(
            {"type": "assistant", "message": {"id": "m", "content": [call]}},
            {"type": "user", "message": {"content": [result]}},
        )
    )
    stored = json.dumps(list(Event.objects.filter(task=told.task).values_list("data", "private")))
    assert SECRET not in stored
    assert stored.count("[redacted:GITHUB_TOKEN]") == 2


# -- what no program should print


@pytest.mark.parametrize("program", ["claude", "codex"])
def test_nonsense_is_left_out_and_never_the_end(player: Told, program: str) -> None:
    told = player(program)
    odd: list[Any] = [None, 7, "x", [], {}, [[]], {"type": {}}, True, "\ud83d", "\0"]
    events: list[Any] = list(odd)
    for kind in ("assistant", "user", "stream_event", "system", "result", "error", "item.started", "item.updated",
                 "item.completed", "turn.failed", "thread.started", "never.heard.of"):  # fmt: skip
        for value in odd:
            names = ("message", "event", "item", "error", "result", "subtype", "thread_id", "errors")
            events.append({"type": kind, **dict.fromkeys(names, value)})
            inner = {"content": value, "id": value, "delta": value, "text": value, "command": value}
            for item in (
                "text",
                "tool_use",
                "tool_result",
                "command_execution",
                "file_change",
                "mcp_tool_call",
            ):
                block = {"type": item, "tool_use_id": value, "content": value, "input": value, **inner}
                events.append({"type": kind, "message": {"content": [block]}, "event": block, "item": block})
    output = b"\n".join(
        [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"type": NaN}', b"1" * 5000, b'{"a": Infinity}']
        + [json.dumps(event).encode() for event in events]
    )
    told.play(output + b"\n" + lines_of({"type": "assistant", "message": {"content": []}}))
    call = "the end"
    good = {"type": "tool_use", "id": call, "name": "Bash", "input": {}}
    search = {"id": call, "type": "web_search", "query": "q"}
    told.play(
        output
        + b"\n"
        + lines_of(
            {"type": "assistant", "message": {"content": [good]}}, {"type": "item.started", "item": search}
        )
    )
    assert [f for f in told.frames() if f["type"] == "tool_use"][-1]["tool_use_id"].endswith(call)


def test_a_line_that_is_too_long_is_left_out(player: Told) -> None:
    told = player("claude")
    lines = told.attempt()
    offset = 0
    for _ in range(LINE_LIMIT // 1_000_000 + 2):
        lines.output(Output("stdout", offset, b"x" * 1_000_000))
        offset += 1_000_000
    assert len(lines._line) == 0
    lines.output(Output("stdout", offset, b"\n" + recorded("claude-retries")))
    lines.finish()
    assert lines.translation.outcome.text == "ok then"


def test_a_gap_costs_its_line_alone(player: Told) -> None:
    told = player("claude")
    lines = told.attempt()
    output = recorded("claude-tool")
    lines.output(Output("stdout", 0, output[:50]))
    lines.gap(Gap(offset=100, dropped=50))
    lines.output(Output("stdout", 100, output[100:]))
    lines.finish()
    assert lines.translation.outcome.text == "Done it."


def test_stderr_between_lines_shifts_offsets_and_is_kept_for_a_failure(player: Told) -> None:
    told = player("codex")
    first, rest = recorded("codex-tool").split(b"\n", 1)
    lines = told.attempt()
    lines.output(Output("stdout", 0, first[:20]))
    lines.output(Output("stderr", 20, b"warning: x"))
    lines.output(Output("stdout", 30, first[20:] + b"\n" + rest))
    assert lines.stderr == "warning: x"
    assert lines.narrator.state["thread"]
    assert lines.narrator.mark.offset == len(first) + 1 + len(rest) + 10


def test_half_a_surrogate_pair_is_replaced() -> None:
    assert event_of(b'{"a": "\\ud83d", "b": "\\ud83d\\ude00"}') == {"a": "?", "b": "\U0001f600"}

"""A stream's frames are read the same however they arrive, and what no guest of ours sends is refused."""

from __future__ import annotations

import itertools
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2a.core.errors import GuestError
from sandboxes.guest_client.collected import Collected
from sandboxes.guest_client.frames import Exit, Frame, FrameReader, Gap, Output
from sandboxes.guest_client.shapes import ProcessSpec, file_info, process_info
from tests.gateway.doubles import description, exit_frame, frame


def _read(data: bytes, cuts: list[int] = []) -> list[Frame]:  # noqa: B006 - never changed
    reader, found = FrameReader(), []
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for a, b in itertools.pairwise(places):
        found += list(reader.feed(data[a:b]))
    return found


@given(
    payloads=st.lists(st.tuples(st.sampled_from([1, 2, 5]), st.binary(max_size=50)), max_size=8),
    cuts=st.lists(st.integers(0, 1000), max_size=20),
)
def test_frames_are_the_same_however_they_are_cut(payloads: list[tuple[int, bytes]], cuts: list[int]) -> None:
    data = b"".join(frame(kind, at, payload) for at, (kind, payload) in enumerate(payloads))
    data += frame(4, 70, b'{"dropped": 7}') + exit_frame(99, exit_code=3)
    names = {1: "stdout", 2: "stderr"}
    expected: list[Frame] = [
        Output(names[kind], at, payload)  # type: ignore[arg-type]
        for at, (kind, payload) in enumerate(payloads)
        if kind != 5
    ]
    expected += [Gap(70, 7), Exit(99, process_info(description(exit_code=3)))]
    assert _read(data, cuts) == expected


@pytest.mark.parametrize(
    "data",
    [
        frame(6, 0),
        frame(0, 0),
        frame(3, 0, b"not json"),
        frame(3, 0, b"[]"),
        frame(3, 0, b"{}"),
        frame(3, 0, b"[" * 100_000),
        frame(4, 0, b'{"dropped": true}'),
        frame(4, 0, b"{}"),
        struct.pack(">BQI", 1, 0, 1024 * 1024 + 1),
        struct.pack(">BQI", 1, 0, 0xFFFFFFFF),
        exit_frame(0) + frame(1, 0, b"x"),
    ],
)
def test_what_no_guest_sends_is_refused(data: bytes) -> None:
    with pytest.raises(GuestError) as refused:
        _read(data)
    assert refused.value.code in ("bad_frame", "bad_answer")


@pytest.mark.parametrize(
    "change",
    [
        {"state": "done"},
        {"state": None},
        {"exit_code": True},
        {"exit_code": "0"},
        {"oom": 0},
        {"timed_out": None},
        {"started_at": "now"},
        {"output_bytes": 1.5},
        {"id": 7},
        {"pty": None},
    ],
)
def test_a_description_with_a_field_of_another_kind_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(GuestError, match=next(iter(change))):
        process_info(description(**change))


def test_an_unknown_end_is_none_and_never_0() -> None:
    ended = Exit(0, process_info(description(state="unknown", exit_code=None)))
    completed = Collected(10).add(ended)
    assert completed is not None
    assert completed.exit_code is None


def test_output_beyond_the_limit_is_counted_not_kept() -> None:
    collected = Collected(4)
    for piece in (b"abc", b"def", b"ghi"):
        assert collected.add(Output("stdout", 0, piece)) is None
    assert collected.add(Output("stderr", 9, b"1234")) is None
    completed = collected.add(Exit(13, process_info(description(exit_code=1))))
    assert completed is not None
    assert (completed.stdout, completed.stdout_bytes) == (b"abcd", 9)
    assert (completed.stderr, completed.stderr_bytes) == (b"1234", 4)
    assert completed.truncated


def test_a_gap_means_truncated() -> None:
    collected = Collected(4)
    collected.add(Gap(5, 5))
    completed = collected.add(Exit(5, process_info(description())))
    assert completed is not None
    assert completed.truncated


@pytest.mark.parametrize(("mode", "bits"), [("0644", 0o644), ("1777", 0o1777), (420, 0o644)])
def test_modes_are_bits(mode: object, bits: int) -> None:
    answer = {"path": "/a", "name": "a", "type": "file", "size": 1, "mode": mode, "mtime": 1}
    assert file_info(answer).mode == bits


def test_a_spec_names_one_thing_to_run_and_hides_it() -> None:
    with pytest.raises(ValueError, match="command or an argv"):
        ProcessSpec(id="p1")
    with pytest.raises(ValueError, match="command or an argv"):
        ProcessSpec(id="p1", command="x", argv=("x",))
    with pytest.raises(ValueError, match="not a process id"):
        ProcessSpec(id="../p1", command="x")
    assert "hunter2" not in repr(ProcessSpec(id="p1", command="login hunter2"))

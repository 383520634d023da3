"""The event log: gapless, ordered, fenced (ARCHITECTURE 5, SECURITY 7.1)."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from django.db import connection, transaction
from hypothesis import given, settings
from hypothesis import strategies as st

from sessions_app import frames
from sessions_app.frames import Frame
from sessions_app.log import Fence, LeaseLost, TurnLog, append, coalesced, read
from sessions_app.models import Event, Session, Task, TaskState


def _text(data: str, task: Task, **kwargs: Any) -> Frame:
    return frames.text("stdout", data, source="assistant", task=task.pk, **kwargs)


@pytest.mark.django_db
def test_append_numbers_frames_from_one_without_gaps(session: Session) -> None:
    with transaction.atomic():
        append(session, [frames.status("idle"), frames.status("running")])
    with transaction.atomic():
        append(session, [frames.status("idle")])
    assert [frame.seq for frame in read(session.pk, after=0)] == [1, 2, 3]
    assert [frame.seq for frame in read(session.pk, after=2)] == [3]


@pytest.mark.django_db
def test_a_rolled_back_append_leaves_neither_frame_nor_gap(session: Session) -> None:
    with pytest.raises(RuntimeError), transaction.atomic():
        append(session, [frames.status("idle")])
        raise RuntimeError("rolled back")
    with transaction.atomic():
        append(session, [frames.status("running")])
    assert [(frame.seq, frame.data) for frame in read(session.pk, after=0)] == [(1, {"status": "running"})]


@pytest.mark.django_db(transaction=True)
def test_writers_of_one_session_at_once_leave_no_gap_and_no_double(session: Session) -> None:
    """SECURITY 7.1: eight threads, 20 appends each."""
    start = threading.Barrier(8)

    def write() -> None:
        start.wait(10)
        for _ in range(20):
            with transaction.atomic():
                append(session, [frames.status("idle"), frames.status("running")])
        connection.close()

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    seqs = list(Event.objects.filter(session=session).order_by("seq").values_list("seq", flat=True))
    assert seqs == list(range(1, 321))
    session.refresh_from_db()
    assert session.last_seq == 320


@pytest.mark.django_db(transaction=True)
def test_text_flows_in_order_and_is_all_there_after_a_flush(session: Session, running_task: Task) -> None:
    log = TurnLog(session, Fence(running_task.pk, 1))
    for number in range(200):
        log.text(_text(f"{number}\n", running_task))
    last = log.append(frames.error(code="x", detail="y", retry="terminal"))
    stored = read(session.pk, after=0)
    assert "".join(f.data["data"] for f in stored if f.type == "stdout") == "".join(
        f"{n}\n" for n in range(200)
    )
    assert stored[-1].type == "error"
    assert stored[-1].seq == last
    assert [f.seq for f in stored] == list(range(1, last + 1))


@pytest.mark.django_db(transaction=True)
def test_an_attempt_that_was_taken_over_writes_nothing_more(session: Session, running_task: Task) -> None:
    old = TurnLog(session, Fence(running_task.pk, 1))
    old.append(frames.status("running"))
    Task.objects.filter(pk=running_task.pk).update(attempt=2)
    with pytest.raises(LeaseLost):
        old.append(frames.status("idle"))
    new = TurnLog(session, Fence(running_task.pk, 2))
    new.append(frames.status("idle"))
    assert [f.data["status"] for f in read(session.pk, after=0)] == ["running", "idle"]


@pytest.mark.django_db(transaction=True)
def test_a_finished_task_takes_no_more_frames(session: Session, running_task: Task) -> None:
    Task.objects.filter(pk=running_task.pk).update(state=TaskState.DONE)
    log = TurnLog(session, Fence(running_task.pk, 1))
    log.text(_text("late", running_task))
    with pytest.raises(LeaseLost):
        log.flush()
    assert read(session.pk, after=0) == []


@pytest.mark.django_db(transaction=True)
def test_what_goes_with_a_frame_is_written_with_it_or_not_at_all(
    session: Session, running_task: Task
) -> None:
    counted: list[int] = []
    log = TurnLog(session, Fence(running_task.pk, 1))
    log.append(frames.status("running"), also=lambda: counted.append(1))
    Task.objects.filter(pk=running_task.pk).update(attempt=2)
    with pytest.raises(LeaseLost):
        log.append(frames.status("idle"), also=lambda: counted.append(2))
    assert counted == [1]


_PIECES = st.lists(
    st.tuples(
        st.sampled_from(["stdout", "stderr"]), st.sampled_from(["assistant", "tool"]), st.text(max_size=12)
    ),
    max_size=30,
)


@settings(max_examples=100, deadline=None)
@given(_PIECES)
def test_coalescing_changes_no_text_and_no_order(pieces: list[tuple[Any, Any, str]]) -> None:
    made = [
        Frame(stream, {"data": data, "source": source}, 1, {"offset": index})
        for index, (stream, source, data) in enumerate(pieces)
    ]
    merged = coalesced(made)

    def runs(some: list[Frame]) -> list[tuple[str, str, str]]:
        found: list[tuple[str, str, str]] = []
        for frame in some:
            key = (frame.type, frame.data["source"])
            if found and found[-1][:2] == key:
                found[-1] = (*key, found[-1][2] + frame.data["data"])
            else:
                found.append((*key, frame.data["data"]))
        return found

    assert runs(merged) == runs(made)
    if made:
        assert merged[-1].private == made[-1].private

"""The event log: append, read, hint. The log is the truth; hints only say that there is more (ARCHITECTURE 5)."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import structlog
from django.db import close_old_connections, transaction
from django.db.models import F

from e2a.core.clock import now
from e2a.core.errors import DeadlineExceeded, OurError
from e2a.core.hints import publish
from sessions_app.frames import MAX_TEXT, TEXT_TYPES, Frame, StoredFrame
from sessions_app.models import Event, Session, Task, TaskState

log = structlog.get_logger(__name__)

PAGE = 500
HINT_LIMIT = 64 * 1024
"""Bytes of frames carried by a hint; more is read from the log."""
COALESCE_SECONDS = 0.02
"""Text of one task that comes within this time of the last commit shares a frame and a transaction."""
APPEND_DEADLINE = 60.0


class LeaseLost(OurError):
    """The task belongs to another attempt by now, or has ended: whoever raises this must stop writing at once."""

    code = "lease_lost"
    title = "The task was taken over"


@dataclass(frozen=True, slots=True)
class Fence:
    """Only this attempt of this running task may write."""

    task: int
    attempt: int

    def holds(self) -> bool:
        """One query, meant for inside the transaction that appends."""
        return Task.objects.filter(pk=self.task, attempt=self.attempt, state=TaskState.RUNNING).exists()


def group_of(session_public_id: str) -> str:
    """The hint group of a session's readers."""
    return f"log.{session_public_id}"


def append(session: Session, frames: Sequence[Frame]) -> int:
    """Store `frames` inside the caller's transaction; returns the last seq. Hints go out on commit.

    The UPDATE of `last_seq` takes the session's row lock until commit, so seqs are gapless and commit in order. Three
    queries, however many frames.
    """
    assert transaction.get_connection().in_atomic_block, "append() belongs inside a transaction"
    Session.objects.filter(pk=session.pk).update(last_seq=F("last_seq") + len(frames))
    last: int = Session.objects.values_list("last_seq", flat=True).get(pk=session.pk)
    first = last - len(frames) + 1
    moment = now()
    events = [
        Event(
            session_id=session.pk,
            seq=first + index,
            type=frame.type,
            task_id=frame.task,
            ts=moment,
            data=storable(frame.data),
            private=storable(frame.private),
        )
        for index, frame in enumerate(frames)
    ]
    Event.objects.bulk_create(events)
    tasks = _task_ids({frame.task for frame in frames if frame.task is not None})
    stored = [
        StoredFrame(
            event.seq, event.type, moment, None if event.task_id is None else tasks[event.task_id], event.data
        )
        for event in events
    ]
    public_id = session.public_id
    transaction.on_commit(lambda: hint(public_id, stored))
    session.last_seq = last
    return last


def storable(value: Any) -> Any:
    """The same with U+FFFD for NUL, which PostgreSQL takes neither in JSON nor in text; commands print it."""
    if isinstance(value, str):
        return value.replace("\0", "\ufffd")
    if isinstance(value, dict):
        return {storable(key): storable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [storable(item) for item in value]
    return value


_known_tasks: dict[int, str] = {}


def task_known(task: Task) -> None:
    """The public id of a committed task need not be looked up."""
    _remember({task.pk: task.public_id})


def _task_ids(pks: set[int]) -> dict[int, str]:
    """Public ids of tasks; they never change, so a bounded memory of them saves a query per append.

    Remembered on commit only: after a rollback SQLite gives the same key to another task.
    """
    found = {pk: _known_tasks[pk] for pk in pks if pk in _known_tasks}
    if missing := pks - found.keys():
        rows = dict(Task.objects.filter(pk__in=missing).values_list("pk", "public_id"))
        transaction.on_commit(lambda: _remember(rows))
        found |= rows
    return found


def _remember(tasks: dict[int, str]) -> None:
    if len(_known_tasks) > 10_000:
        _known_tasks.clear()
    _known_tasks.update(tasks)


def hint(session_public_id: str, stored: Sequence[StoredFrame]) -> None:
    """Tell the session's readers that there is more; small frames ride along."""
    frames = [json.dumps(frame.as_json(), ensure_ascii=False) for frame in stored]
    message: dict[str, Any] = {"type": "log.hint", "first": stored[0].seq, "last": stored[-1].seq}
    if sum(map(len, frames)) <= HINT_LIMIT:
        message["frames"] = frames
    publish(group_of(session_public_id), message)


def read(session_pk: int, *, after: int, limit: int = PAGE) -> list[StoredFrame]:
    """Up to `limit` frames from `after` + 1 on, in order. One query."""
    events = (
        Event.objects.filter(session_id=session_pk, seq__gt=after)
        .order_by("seq")
        .values_list("seq", "type", "ts", "task__public_id", "data")[:limit]
    )
    return [StoredFrame(*event) for event in events]


@dataclass(slots=True)
class _Entry:
    """One request to the writer."""

    session: Session
    frames: list[Frame]
    fence: Fence
    also: Callable[[], None] | None = None
    done: threading.Event = field(default_factory=threading.Event)
    failure: BaseException | None = None
    last_seq: int = 0


class LogWriter:
    """One thread a process that stores the frames of many turns in few transactions.

    SQLite commits about 1,200 small transactions a second here, so what waits while one commits goes into the next
    together, and neighbouring text of one command becomes one frame.
    """

    def __init__(self) -> None:
        self._entries: deque[_Entry] = deque()
        self._wake = threading.Condition()
        self._urgent = 0
        self._thread: threading.Thread | None = None

    def submit(self, entry: _Entry, *, urgent: bool) -> None:
        """Queue an entry; `urgent` ones do not wait for company."""
        with self._wake:
            self._entries.append(entry)
            self._urgent += urgent
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
                self._thread.start()
            self._wake.notify()

    def _run(self) -> None:
        last_commit = 0.0
        while True:
            with self._wake:
                while not self._entries:
                    self._wake.wait(60)
                left = last_commit + COALESCE_SECONDS - time.monotonic()
                while not self._urgent and left > 0:
                    self._wake.wait(left)
                    left = last_commit + COALESCE_SECONDS - time.monotonic()
                batch = list(self._entries)
                self._entries.clear()
                self._urgent = 0
            try:
                self._store(batch)
            except (
                Exception
            ) as error:  # Whatever it is, the thread must live on and every waiter must hear of it.
                log.warning("log.batch_failed", entries=len(batch), error=repr(error)[:200])
                self._store_singly(batch)
            last_commit = time.monotonic()
            for entry in batch:
                entry.done.set()
            close_old_connections()

    def _store_singly(self, batch: list[_Entry]) -> None:
        """One entry's fault must not fail its neighbours; what fails each (a dead database) is told to each."""
        for entry in batch:
            try:
                self._store([entry])
            except Exception as error:
                entry.failure = error

    def _store(self, batch: list[_Entry]) -> None:
        by_session: dict[int, list[_Entry]] = {}
        for entry in batch:
            by_session.setdefault(entry.session.pk, []).append(entry)
        with transaction.atomic():
            for session_pk in sorted(by_session):  # Always in the same order: two writers cannot deadlock.
                entries = by_session[session_pk]
                allowed = {fence: fence.holds() for fence in {entry.fence for entry in entries}}
                frames: list[Frame] = []
                for entry in entries:
                    if allowed[entry.fence]:
                        frames += entry.frames
                        if entry.also is not None:
                            entry.also()
                    else:
                        entry.failure = LeaseLost()
                if frames:
                    last = append(entries[0].session, coalesced(frames))
                    for entry in entries:
                        entry.last_seq = last


def coalesced(frames: Sequence[Frame]) -> list[Frame]:
    """Neighbouring text of the same stream, source and command as one frame, up to 64 KiB each."""
    merged: list[Frame] = []
    for frame in frames:
        before = merged[-1] if merged else None
        if (
            before is not None
            and frame.type in TEXT_TYPES
            and before.type == frame.type
            and before.task == frame.task
            and before.data.get("source") == frame.data.get("source")
            and before.data.get("tool_use_id") == frame.data.get("tool_use_id")
            and len(before.data["data"]) + len(frame.data["data"]) <= MAX_TEXT // 4
        ):
            data = before.data | {"data": before.data["data"] + frame.data["data"]}
            merged[-1] = replace(before, data=data, private=frame.private or before.private)
        else:
            merged.append(frame)
    return merged


_writer = LogWriter()


class TurnLog:
    """The log as one attempt of one task sees it: text flows on without waiting, everything else is durable on return.

    Every method raises `LeaseLost` once the task is not this attempt's any more, and `DeadlineExceeded` when the
    database did not take a frame within 60 s.
    """

    MAX_PENDING = 1024 * 1024

    def __init__(self, session: Session, fence: Fence) -> None:
        self._session = session
        self._fence = fence
        self._pending: deque[_Entry] = deque()
        self._pending_size = 0

    def text(self, frame: Frame) -> None:
        """Queue text. Blocks only when more than 1 MiB of this turn's text waits for the database."""
        self._collect(wait=self._pending_size > self.MAX_PENDING)
        entry = _Entry(self._session, [frame], self._fence)
        self._pending.append(entry)
        self._pending_size += len(frame.data["data"])
        _writer.submit(entry, urgent=False)

    def append(self, *frames: Frame, also: Callable[[], None] | None = None) -> int:
        """Store frames, after all text before them; returns the last seq once it is committed.

        `also` runs in the same transaction: what must be counted exactly once with these frames.
        """
        entry = _Entry(self._session, list(frames), self._fence, also)
        self._pending.append(entry)
        _writer.submit(entry, urgent=True)
        self._collect(wait=True)
        return entry.last_seq

    def position(self) -> int:
        """The seq of the session's newest frame, after everything queued here is stored."""
        self.flush()
        last: int = Session.objects.values_list("last_seq", flat=True).get(pk=self._session.pk)
        return last

    def flush(self) -> None:
        """Wait until everything queued is committed."""
        if self._pending:
            entry = _Entry(self._session, [], self._fence)
            self._pending.append(entry)
            _writer.submit(entry, urgent=True)
            self._collect(wait=True)

    def _collect(self, *, wait: bool) -> None:
        while self._pending:
            entry = self._pending[0]
            if not entry.done.is_set():
                if not wait:
                    return
                if not entry.done.wait(APPEND_DEADLINE):
                    raise DeadlineExceeded(f"append to the log of {self._session.public_id}", APPEND_DEADLINE)
            self._pending.popleft()
            self._pending_size -= sum(len(f.data["data"]) for f in entry.frames if f.type in TEXT_TYPES)
            if entry.failure is not None:
                raise entry.failure

"""A turn: one attempt of one task, from claim to exit. Leases are renewed and cancels are noticed by one thread."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Final, Protocol

import structlog
from django.db import DatabaseError, close_old_connections

from e2a.core.clock import now, seconds
from e2a.core.errors import E2AError, GuestError, GuestUnreachable
from e2a.core.rows import only
from sandboxes.models import SandboxState
from sandboxes.services import sandbox_touch
from sessions_app import frames
from sessions_app.log import LeaseLost, TurnLog
from sessions_app.models import Session, SessionStatus, StopReason, Task, TaskState
from sessions_app.services import session_touch
from sessions_app.task_queue import LEASE_SECONDS, fence_of, task_claim, task_finish

log = structlog.get_logger(__name__)

LOOK_SECONDS: Final = 0.4
RENEW_SECONDS: Final = 5.0


class TurnCancelled(Exception):
    """Somebody cancelled the task; the turn unwinds and ends with 130."""


class Stoppable(Protocol):
    """Something that a turn waits for and that another thread may cut short: a model stream, a command."""

    def stop(self, *, abandon: bool) -> None:
        """End the wait soon, without blocking. `abandon`: leave what was started running; another worker has it."""
        ...


@dataclass(frozen=True, slots=True)
class TurnResult:
    """How a turn ended."""

    exit_code: int
    text: str = ""
    reason: str = ""
    signal: str | None = None
    stop_reason: StopReason = StopReason.END_TURN


@dataclass(slots=True)
class Turn:
    """What an agent works with: the session, the task, the log, and whether to go on."""

    session: Session
    task: Task
    log: TurnLog
    is_resumed: bool
    cancelled: threading.Event = field(default_factory=threading.Event)
    lost: threading.Event = field(default_factory=threading.Event)
    _waiting: Stoppable | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self) -> None:
        """Raises `TurnCancelled` or `LeaseLost` when the turn should not go on."""
        self.check_lost()
        if self.cancelled.is_set():
            raise TurnCancelled()

    def check_lost(self) -> None:
        """Raises `LeaseLost` when another worker has the task, or the session has ended."""
        if self.lost.is_set():
            raise LeaseLost()

    def pause(self, seconds: float) -> None:
        """Wait; a cancel or a loss ends the wait early and is raised."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.check()
            self.cancelled.wait(min(left, LOOK_SECONDS))
        self.check()

    def waits_for(self, what: Stoppable | None) -> None:
        """Name what the turn is about to wait for, so that a cancel can cut it short; `None` when it is over."""
        with self._lock:
            self._waiting = what
        if what is not None and (self.cancelled.is_set() or self.lost.is_set()):
            what.stop(abandon=self.lost.is_set())

    def interrupt(self, *, lost: bool) -> None:
        """Called by the keeper's thread."""
        (self.lost if lost else self.cancelled).set()
        with self._lock:
            waiting = self._waiting
        if waiting is not None:
            waiting.stop(abandon=lost)


class Agent(Protocol):
    """One kind of agent: runs a turn to its end. May raise `TurnCancelled`, `LeaseLost` and errors of our tree."""

    def run(self, turn: Turn) -> TurnResult: ...


class LeaseKeeper:
    """One thread a process: renews the leases of its turns, and tells them when they are cancelled or taken over."""

    def __init__(self) -> None:
        self._turns: dict[int, Turn] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, turn: Turn) -> None:
        with self._lock:
            self._turns[turn.task.pk] = turn
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="lease-keeper", daemon=True)
                self._thread.start()

    def remove(self, turn: Turn) -> None:
        with self._lock:
            self._turns.pop(turn.task.pk, None)

    def _run(self) -> None:
        renewed = time.monotonic()
        while True:
            time.sleep(LOOK_SECONDS)
            with self._lock:
                turns = dict(self._turns)
            if not turns:
                continue
            try:
                self._look(turns)
                if time.monotonic() - renewed >= RENEW_SECONDS:
                    self._renew(turns)
                    renewed = time.monotonic()
            except DatabaseError as error:
                log.warning("lease_keeper.database", error=str(error)[:200])
            finally:
                close_old_connections()

    def _look(self, turns: dict[int, Turn]) -> None:
        rows = Task.objects.filter(pk__in=turns).values_list("pk", "attempt", "state", "cancel_requested_at")
        seen = {pk: (attempt, state, cancel) for pk, attempt, state, cancel in rows}
        for pk, turn in turns.items():
            attempt, state, cancel = seen.get(pk, (0, TaskState.DONE, None))
            if attempt != turn.task.attempt or state != TaskState.RUNNING:
                turn.interrupt(lost=True)
            elif cancel is not None and not turn.cancelled.is_set():
                turn.interrupt(lost=False)

    def _renew(self, turns: dict[int, Turn]) -> None:
        for pk, turn in turns.items():
            Task.objects.filter(pk=pk, attempt=turn.task.attempt, state=TaskState.RUNNING).update(
                lease_until=now() + seconds(LEASE_SECONDS)
            )
            session_touch(turn.session.pk)
            if turn.session.sandbox_id is not None:
                sandbox_touch(turn.session.sandbox_id)


_keeper = LeaseKeeper()


def session_work(session_pk: int) -> None:
    """Run the session's tasks, one after another, until none is left for us. May be called any number of times."""
    while True:
        session = only(
            Session.objects.select_related("sandbox__node", "sandbox__template", "tenant").filter(
                pk=session_pk
            )
        )
        if session is None or session.status in (SessionStatus.STARTING, SessionStatus.ENDED):
            return
        if session.sandbox is None or session.sandbox.state not in (
            SandboxState.RUNNING,
            SandboxState.PAUSED,
        ):
            return
        task = task_claim(session)
        if task is None:
            return
        turn_run(session, task)


def turn_run(session: Session, task: Task) -> None:
    """Run one claimed task. Ends it with exactly one exit, unless it was taken over or the session ended meanwhile."""
    from sessions_app.agents import agent_for

    turn = Turn(session, task, TurnLog(session, fence_of(task)), is_resumed=task.attempt > 1)
    _keeper.add(turn)
    try:
        result = _result_of(agent_for(session.agent_kind), turn)
        turn.log.flush()
        task_finish(
            session=session,
            task=task,
            exit_code=result.exit_code,
            result=result.text,
            reason=result.reason,
            signal=result.signal,
            stop_reason=result.stop_reason,
        )
    except LeaseLost:
        log.info("turn.lost", task=task.public_id, attempt=task.attempt)
    finally:
        _keeper.remove(turn)


def _result_of(agent: Agent, turn: Turn) -> TurnResult:
    """The agent's result; what it raises becomes an `error` frame and a failed task. Only `LeaseLost` passes."""
    try:
        return agent.run(turn)
    except TurnCancelled:
        return TurnResult(130, reason="cancelled", stop_reason=StopReason.CANCELLED)
    except LeaseLost:
        raise
    except (GuestUnreachable, GuestError) as error:
        log.warning("turn.guest", task=turn.task.public_id, error=str(error))
        turn.check()
        code, detail = error.code, error.detail
    except E2AError as error:
        log.warning("turn.failed", task=turn.task.public_id, error=str(error))
        code, detail = error.code, error.detail
    except (
        Exception
    ):  # A fault of ours must end the task with a truthful error, not hang it until five leases run out.
        log.exception("turn.crashed", task=turn.task.public_id)
        code, detail = "internal_error", "Something failed on our side."
    turn.log.append(frames.error(code=code, detail=detail, retry="terminal", task=turn.task.pk))
    return TurnResult(1, reason=code, stop_reason=StopReason.ERROR)

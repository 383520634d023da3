"""Tasks: submit, cancel, claim under a lease, finish. Each move is one conditional UPDATE with its frames beside it."""

from __future__ import annotations

import os
import socket
import uuid
from typing import Final

import structlog
from django.db import IntegrityError, transaction
from django.db.models import Q

from e2a.core.clock import now, seconds
from e2a.core.enqueue import enqueue
from e2a.core.errors import Conflict, ValidationFailed
from e2a.core.states import advance
from sandboxes.activity import sandbox_touch
from sessions_app import frames
from sessions_app.log import Fence, LeaseLost, append, storable, task_known
from sessions_app.models import (
    TASK_TRANSITIONS,
    Event,
    Session,
    SessionStatus,
    StopReason,
    Task,
    TaskState,
)
from sessions_app.services import session_advance

log = structlog.get_logger(__name__)

LEASE_SECONDS: Final = 20.0
MAX_ATTEMPTS: Final = 5
"""A task that took so many workers with it is given up (SECURITY 8.5: a poison message must not go round for ever)."""
HOST: Final = socket.gethostname()
WORKER: Final = f"{HOST}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
"""Who holds a lease: host, process, and a nonce against a process id that is used again."""


def task_submit(*, session: Session, prompt: str, client_id: str | None = None) -> tuple[Task, bool]:
    """Queue a prompt; returns the task and whether it is new. The same `client_id` again gives the first one's task.

    Raises `Conflict`: `session_ended`, or `queue_full` when the tenant's limit of waiting tasks is reached.
    """
    if client_id is not None:
        known = session.tasks.filter(client_id=client_id).first()
        if known is not None:
            return known, False
    try:
        with transaction.atomic():
            # Taking the session's row lock first makes the count below exact, and the order of tasks that of frames.
            live = Session.objects.filter(pk=session.pk).exclude(status=SessionStatus.ENDED)
            if not live.update(last_active_at=now()):
                raise Conflict("This session has ended.", code="session_ended")
            waiting = session.tasks.filter(state=TaskState.QUEUED).count()
            if waiting >= session.tenant.max_tasks_queued:
                raise Conflict(f"{waiting} tasks wait already; let one finish first.", code="queue_full")
            task = Task.objects.create(session=session, client_id=client_id, prompt=prompt, created_at=now())
            # Before the hint of the append: it has further to go.
            enqueue("sessions_app.tasks.turn_run", session_id=session.pk)
            append(session, [frames.task_queued(task.pk, prompt, client_id=client_id)])
            if session.sandbox_id is not None:
                sandbox_touch(session.sandbox_id)
    except IntegrityError:
        if client_id is None:
            raise
        return session.tasks.get(client_id=client_id), False
    return task, True


def prompt_check(prompt: str) -> None:
    """Raises `ValidationFailed` for an empty prompt or one over 256 KiB."""
    if not prompt.strip():
        raise ValidationFailed.of("prompt", "blank", "The prompt is empty.")
    if len(prompt.encode()) > 256 * 1024:
        raise ValidationFailed.of("prompt", "too_large", "The prompt is over 256 KiB.")


def task_cancel(task: Task) -> Task:
    """Ask for the task's end: a waiting one ends here, a running one is told and ends with 130 within about a second.

    Raises `Conflict` (`already_done`) when it is over.
    """
    with transaction.atomic():
        session = task.session
        queued = Task.objects.filter(pk=task.pk, state=TaskState.QUEUED)
        if queued.update(
            state=TaskState.DONE,
            exit_code=130,
            exit_reason="cancelled",
            ended_at=now(),
            cancel_requested_at=now(),
        ):
            append(session, [frames.exit_frame(task.pk, exit_code=130, reason="cancelled")])
        elif not Task.objects.filter(pk=task.pk, state=TaskState.RUNNING).update(cancel_requested_at=now()):
            raise Conflict("This task is over.", code="already_done")
    task.refresh_from_db()
    return task


def task_claim(session: Session) -> Task | None:
    """Take the session's next piece of work, or `None` when there is none for us.

    A running task whose lease has run out comes first, with the next attempt number; else the oldest waiting one. The
    unique constraint on running tasks and the conditional UPDATE make sure that only one worker gets it.
    """
    moment = now()
    # The running one, of which there is at most one, is before those that are `queued`.
    task = session.tasks.exclude(state=TaskState.DONE).order_by("-state", "pk").first()
    if task is None:
        return None
    task_known(task)
    if task.state == TaskState.RUNNING:
        is_stale = task.lease_until is not None and task.lease_until < moment
        return _take_over(session, task) if is_stale else None
    try:
        with transaction.atomic():
            if not advance(
                Task.objects.filter(pk=task.pk),
                to=TaskState.RUNNING,
                transitions=TASK_TRANSITIONS,
                attempt=1,
                lease_owner=WORKER,
                lease_until=moment + seconds(LEASE_SECONDS),
                started_at=moment,
            ):
                return None
            if not session_advance(session, SessionStatus.RUNNING, stop_reason=""):
                transaction.set_rollback(True)
                return None
            task.attempt, task.state = 1, TaskState.RUNNING
            append(
                session,
                [frames.status(SessionStatus.RUNNING), frames.task_started(task.pk, task.prompt, attempt=1)],
            )
    except IntegrityError:
        return None
    return task


def _take_over(session: Session, task: Task) -> Task | None:
    attempt = task.attempt + 1
    with transaction.atomic():
        taken = Task.objects.filter(
            pk=task.pk, state=TaskState.RUNNING, attempt=task.attempt, lease_until=task.lease_until
        ).update(attempt=attempt, lease_owner=WORKER, lease_until=now() + seconds(LEASE_SECONDS))
        if not taken:
            return None
        task.attempt = attempt
        if attempt <= MAX_ATTEMPTS:
            append(session, [frames.restarted(task.pk, discard_after=discard_point(session, task))])
    log.warning("task.taken_over", task=task.public_id, attempt=attempt)
    if attempt > MAX_ATTEMPTS:
        task_finish(
            session=session,
            task=task,
            exit_code=1,
            reason="too_many_attempts",
            stop_reason=StopReason.ERROR,
            result="",
        )
        return None
    return task


def discard_point(session: Session, task: Task) -> int:
    """The seq after which this task's frames are void for whoever goes on with it.

    deictic's text that no `usage` followed belongs to a call that will be made again. Everything else stands: a
    command, and so a program that is an agent, goes on from the byte where its last frame ended.
    """
    if session.agent_kind == "deictic" and (first_void := last_speech(session, task)) is not None:
        return first_void - 1
    head: int = Session.objects.values_list("last_seq", flat=True).get(pk=session.pk)
    return head


def last_speech(session: Session, task: Task) -> int | None:
    """The seq of the first of the model's texts at the end of the task's frames; `None` when they do not end so.

    The bill of a program that called the model itself may come at any time, so it ends nothing.
    """
    last_kept = (
        Event.objects.filter(session=session, task=task)
        .exclude(type="stdout", data__source="assistant")
        .exclude(type="usage", private__isnull=True)
        .order_by("-seq")
        .values_list("seq", flat=True)
        .first()
    )
    void = Event.objects.filter(session=session, task=task, type="stdout", data__source="assistant")
    if last_kept is not None:
        void = void.filter(seq__gt=last_kept)
    return void.order_by("seq").values_list("seq", flat=True).first()


def task_finish(
    *,
    session: Session,
    task: Task,
    exit_code: int,
    result: str,
    reason: str = "",
    signal: str | None = None,
    stop_reason: StopReason = StopReason.END_TURN,
) -> None:
    """Write the task's one `exit` and make the session idle, if the task is still this attempt's.

    Raises `LeaseLost` when it is not: another worker, or the session's end, wrote the exit.
    """
    with transaction.atomic():
        done = Task.objects.filter(pk=task.pk, attempt=task.attempt, state=TaskState.RUNNING).update(
            state=TaskState.DONE,
            exit_code=exit_code,
            exit_reason=reason,
            result=storable(result[-64 * 1024 :]),
            ended_at=now(),
            lease_until=None,
        )
        if not done:
            raise LeaseLost()
        last = [frames.exit_frame(task.pk, exit_code=exit_code, signal=signal, reason=reason or None)]
        if session_advance(session, SessionStatus.IDLE, stop_reason=stop_reason, last_active_at=now()):
            last.append(frames.status(SessionStatus.IDLE, stop_reason=stop_reason))
        append(session, last)


def fence_of(task: Task) -> Fence:
    """What this attempt's writes must pass."""
    return Fence(task.pk, task.attempt)


def sessions_with_work() -> list[int]:
    """Sessions with a waiting task and none running, or with a running one whose lease has run out."""
    due = Q(tasks__state=TaskState.RUNNING, tasks__lease_until__lt=now())
    waiting = Q(tasks__state=TaskState.QUEUED) & ~Q(
        status__in=[SessionStatus.STARTING, SessionStatus.RUNNING]
    )
    rows = Session.objects.exclude(status=SessionStatus.ENDED).filter(due | waiting)
    return list(rows.values_list("pk", flat=True).distinct()[:500])


def leases_release_dead() -> int:
    """Void the leases of this host's processes that are gone, so that their tasks need not wait for the lease's end.

    Called when a worker starts. Returns how many. Other hosts' leases are left to run out.
    """
    released = 0
    for task in Task.objects.filter(state=TaskState.RUNNING, lease_owner__startswith=f"{HOST}:"):
        pid = int(task.lease_owner.split(":")[1])
        if task.lease_owner == WORKER or (pid != os.getpid() and _is_alive(pid)):
            continue
        released += Task.objects.filter(
            pk=task.pk, attempt=task.attempt, lease_owner=task.lease_owner
        ).update(lease_until=now())
    return released


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

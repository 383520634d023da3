"""Background processes of a sandbox: started, listed, signalled, fed, and followed again by byte offset.

The guest runs them; a `Job` row remembers them, because the guest forgets what ended long ago. A row whose
process the guest does not know any more is `unknown`: how it ended is never guessed.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import structlog
from django.db.models import Q, QuerySet

from e2a.core.clock import now, seconds
from e2a.core.errors import Conflict, E2AError, Gone, GuestError, NotFound
from e2a.core.ids import new_id
from sandboxes.configuration import guest_client
from sandboxes.execution import LOGGED_CHARACTERS, Command, command_text, with_room
from sandboxes.guest_answers import guest_answers
from sandboxes.guest_client import GuestClient, Output, OutputStream, ProcessInfo, ProcessSpec
from sandboxes.models import Job, JobState, Sandbox, SandboxLogEntry, SandboxState
from sandboxes.services import sandbox_ensure_configured, sandbox_used, sandbox_wait_running
from sandboxes.waiting import database_release

log = structlog.get_logger(__name__)

STARTING_SECONDS = 60.0
"""A row this young may not have reached its guest yet."""
A_PASS = 200
_LOOK_SECONDS = 2.0
_OVER = (SandboxState.STOPPING, SandboxState.DESTROYED)


def job_start(
    *, sandbox: Sandbox, command: Command, keep_stdin_open: bool, timeout_seconds: float | None
) -> Job:
    """Start it and return at once. It lives on without its caller, as long as the sandbox and its own time.

    Waits for a sandbox that is being made. Raises what `sandbox_exec` does, and 409 `too_many_processes`. When
    the guest is silent the row stays: the job may run.
    """
    sandbox_wait_running(sandbox)
    sandbox_ensure_configured(sandbox)
    sandbox_used(sandbox)
    job = Job.objects.create(
        public_id=new_id("job"), sandbox=sandbox, command=command_text(sandbox, command), created_at=now()
    )
    spec: ProcessSpec = replace(
        command.spec(),
        id=job.public_id,
        on_full="drop",  # Nobody need read it.
        kill_on_disconnect=False,
        keep_stdin_open=keep_stdin_open,
        timeout_seconds=timeout_seconds,
    )
    database_release()
    with guest_answers(sandbox):
        try:
            info = with_room(lambda: guest_client(sandbox).process_start(spec))
        except GuestError:
            job.delete()
            raise
        if _note(job, info):
            _log_end(guest_client(sandbox), job)
    return job


def jobs_of(sandbox: Sandbox) -> QuerySet[Job]:
    return Job.objects.filter(sandbox=sandbox)


def job_get(sandbox: Sandbox, public_id: str) -> Job:
    """As its guest sees it now. Raises `NotFound`. One query, and one call of the guest while it runs."""
    job = _row(sandbox, public_id)
    jobs_refresh(sandbox, [job])
    return job


def _row(sandbox: Sandbox, public_id: str) -> Job:
    job = jobs_of(sandbox).filter(public_id=public_id).first()
    if job is None:
        raise NotFound("The sandbox has no such job.")
    job.sandbox = sandbox
    return job


def jobs_refresh(sandbox: Sandbox, jobs: list[Job]) -> None:
    """Bring the running ones among them up to date. One call of the guest for all; when it is silent or
    frozen, nothing is concluded."""
    running = [job for job in jobs if job.state == JobState.RUNNING]
    if not running:
        return
    if sandbox.state in _OVER:
        sandbox.refresh_from_db(fields=["death_reason"])
        for job in running:
            _lost(job, reason=sandbox.death_reason)
        return
    if sandbox.state != SandboxState.RUNNING:
        return
    client = guest_client(sandbox, timeout_seconds=_LOOK_SECONDS)
    try:
        known = {info.id: info for info in client.process_list()}
    except E2AError as error:
        log.info("jobs.guest_silent", sandbox=sandbox.public_id, error=error.detail)
        return
    young = now() - seconds(STARTING_SECONDS)
    for job in running:
        if (info := known.get(job.public_id)) is not None:
            if _note(job, info):
                _log_end(client, job)
        elif job.created_at < young:
            _lost(job, reason="forgotten")


def _note(job: Job, info: ProcessInfo) -> bool:
    """Write what the guest says. Whether this call was the one that learnt of the end."""
    job.output_bytes = info.output_bytes
    if info.state == "running":
        return False
    values = {
        "state": JobState(info.state),
        "exit_code": info.exit_code if info.state == "exited" else None,
        "signal": info.signal or "",
        "timed_out": info.timed_out,
        "oom": info.oom,
        "ended_at": None if info.ended_at is None else dt.datetime.fromtimestamp(info.ended_at, dt.UTC),
        "output_bytes": info.output_bytes,
    }
    for name, value in values.items():
        setattr(job, name, value)
    return bool(Job.objects.filter(pk=job.pk, state=JobState.RUNNING).update(**values))


def _lost(job: Job, *, reason: str) -> None:
    """`reason`: what its sandbox died of, or that its guest knows nothing of it."""
    job.state, job.exit_code, job.reason = JobState.UNKNOWN, None, reason
    Job.objects.filter(pk=job.pk, state=JobState.RUNNING).update(
        state=JobState.UNKNOWN, ended_at=None, reason=reason
    )


def _log_end(client: GuestClient, job: Job) -> None:
    """Write the job's line of `GET …/logs`, with the end of what it printed."""
    tail = b""
    try:
        after = max(client.process_get(job.public_id).first_offset, job.output_bytes - 4 * LOGGED_CHARACTERS)
        with client.process_follow(job.public_id, after=after, follow=False) as stream:
            tail = b"".join(frame.data for frame in stream if isinstance(frame, Output))
    except E2AError as error:
        log.info("jobs.tail_missed", job=job.public_id, error=error.detail)
    SandboxLogEntry.objects.create(
        sandbox_id=job.sandbox_id,
        at=job.ended_at or now(),
        process_id=job.public_id,
        command=job.command,
        exit_code=job.exit_code,
        output=tail.decode(errors="replace")[-LOGGED_CHARACTERS:].replace("\0", "�"),
    )


def jobs_settle() -> None:
    """Learn how jobs ended before their guests forget it (they remember the last 32 processes). Safe doubled."""
    rows = Sandbox.objects.filter(
        Q(state__in=_OVER) | Q(state=SandboxState.RUNNING), jobs__state=JobState.RUNNING
    )
    for sandbox in rows.select_related("node").distinct()[:A_PASS]:
        jobs_refresh(sandbox, list(jobs_of(sandbox).filter(state=JobState.RUNNING).order_by("pk")[:A_PASS]))


def job_reached(sandbox: Sandbox, public_id: str) -> tuple[Job, GuestClient]:
    """The row and the way to its guest, once the sandbox runs. Raises `NotFound`, `not_running`."""
    job = _row(sandbox, public_id)
    sandbox_wait_running(sandbox)
    sandbox_used(sandbox)
    return job, guest_client(sandbox)


def job_output(sandbox: Sandbox, public_id: str, *, after: int, follow: bool) -> tuple[Job, OutputStream]:
    """Its output from the byte `after` on: what there is, or with `follow` until it ends.

    Raises `NotFound`, 410 `output_gone` when the guest does not know it any more, 400 `bad_offset` beyond its
    output.
    """
    job, client = job_reached(sandbox, public_id)
    database_release()
    gone = Gone("The job ended long ago; its output is not kept any more.", code="output_gone")
    with guest_answers(sandbox), _when_forgotten(gone):
        return job, client.process_follow(public_id, after=after, follow=follow)


def job_signal(sandbox: Sandbox, public_id: str, *, signal: str) -> Job:
    """To the job and everything that it started. Raises 409 `not_running` when nothing of it is left."""
    job, client = job_reached(sandbox, public_id)
    with guest_answers(sandbox), _when_forgotten(_over()):
        client.process_signal(public_id, signal)
    jobs_refresh(sandbox, [job])
    return job


def job_stdin(sandbox: Sandbox, public_id: str, *, data: bytes, close: bool) -> None:
    """Raises 409 `stdin_closed`, `stdin_full` (1 MiB waits already), `not_running`."""
    _, client = job_reached(sandbox, public_id)
    with guest_answers(sandbox), _when_forgotten(_over()):
        client.process_stdin(public_id, data, close=close)


def job_delete(sandbox: Sandbox, public_id: str) -> None:
    """Kill it with everything that it started, and forget it. Raises `NotFound`."""
    job = _row(sandbox, public_id)
    if sandbox.state not in _OVER:
        _, client = job_reached(sandbox, public_id)
        with guest_answers(sandbox):
            try:
                client.process_forget(public_id)
            except GuestError as error:
                if error.code != "no_such_process":
                    raise
    job.delete()


def _over() -> Conflict:
    return Conflict("The job has ended.", code="not_running")


@contextmanager
def _when_forgotten(instead: E2AError) -> Iterator[None]:
    """Raise `instead` when the guest does not know the process (any more)."""
    try:
        yield
    except GuestError as error:
        if error.code == "no_such_process":
            raise instead from error
        raise

"""What a call had cost, into the ledger and the session's log: before its answer ends, so that no crash loses it."""

from __future__ import annotations

from django.db import transaction

from sessions_app import frames
from sessions_app.broker.admission import Admission
from sessions_app.log import append
from sessions_app.models import Session, SessionStatus, Task, TaskState
from sessions_app.spending import Spent, call_enter


def call_record(
    admission: Admission, *, vendor: str, spent: Spent, status: int, is_whole: bool, duration_ms: int
) -> None:
    """Enter one call. In a session its `usage` frame belongs to the task that runs, which cannot end in between: the
    session's row is locked first, as by the task's end."""
    with transaction.atomic():
        task: Task | None = None
        session: Session | None = None
        if admission.session_pk is not None:
            session = Session.objects.select_for_update().filter(pk=admission.session_pk).first()
        if session is not None:
            task = session.tasks.filter(state=TaskState.RUNNING).first()
        call_enter(
            tenant_pk=admission.tenant_pk,
            session_pk=None if session is None else session.pk,
            task_pk=None if task is None else task.pk,
            sandbox_id=admission.sandbox_id,
            vendor=vendor,
            spent=spent,
            status=status,
            is_whole=is_whole,
            duration_ms=duration_ms,
        )
        if session is not None and session.status != SessionStatus.ENDED:
            append(session, [frames.usage(None if task is None else task.pk, spent.as_frame())])

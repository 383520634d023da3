"""Sessions without a sandbox for what needs none, and the socket's client for what needs all."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any

import pytest

from sessions_app.models import Session, SessionStatus, Task, TaskState


@pytest.fixture
def make_session(alice: Any) -> Callable[..., Session]:
    """A session row of alice's, idle, with nothing behind it."""
    from e2a.core.clock import now

    def make(**values: Any) -> Session:
        moment = now()
        defaults: dict[str, Any] = {
            "tenant": alice.tenant, "user_id": "u1", "agent_kind": "shell", "template_name": "standard",
            "status": SessionStatus.IDLE, "created_at": moment, "last_active_at": moment,
            "expires_at": moment + dt.timedelta(hours=1),
        }  # fmt: skip
        return Session.objects.create(**defaults | values)

    return make


@pytest.fixture
def session(make_session: Callable[..., Session]) -> Session:
    return make_session()


@pytest.fixture
def running_task(session: Session) -> Task:
    """A task that attempt 1 runs."""
    from e2a.core.clock import now

    Session.objects.filter(pk=session.pk).update(status=SessionStatus.RUNNING)
    session.refresh_from_db()
    return Task.objects.create(
        session=session, prompt="true", state=TaskState.RUNNING, attempt=1, created_at=now(),
        lease_until=now() + dt.timedelta(seconds=20),
    )  # fmt: skip

"""Sessions without a sandbox for what needs none, and the socket's client for what needs all."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any

import pytest
from django.conf import settings
from django.db import connections

from sandboxes.models import Node, Template
from sessions_app.models import Session, SessionStatus, Task, TaskState

# Threads share the database here, so it is a file: SQLite's shared memory knows no waiting.
if connections["default"].vendor == "sqlite":
    connections["default"].settings_dict["TEST"]["NAME"] = str(settings.E2A.data_dir / "test.sqlite3")


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


@pytest.fixture
def node_row(db: None) -> Node:
    """A live node that is nothing but a row: sessions are made and stay `starting`."""
    from e2a.core.clock import now

    Template.objects.filter(name="standard").update(image="e2a/standard", image_id="e2a/standard:test")
    return Node.objects.create(
        name="elsewhere", address="unix:/nowhere/gateway.sock", engine="docker", is_engine_up=True,
        capacity=1000, heartbeat_at=now(),
        images={"standard": {"tag": "e2a/standard:test", "id": "e2a/standard:test"}},
    )  # fmt: skip


@pytest.fixture
def bundle() -> Callable[..., Any]:
    """`bundle(user, "name", LLM_API_KEY=…)`: a secret bundle of that user's tenant."""
    from secrets_vault.services import bundle_create

    def make(user: Any, name: str, **values: str) -> Any:
        return bundle_create(tenant=user.tenant, name=name, values=values)

    return make


@pytest.fixture(scope="session")
def live_key(live: Any) -> str:
    """An API key of alice's on the live stack."""
    return str(live.api_key())

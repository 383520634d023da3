"""What a tenant can own, as rows with nothing behind them; and an operator at the desk."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from django.conf import settings
from django.test import Client
from django_otp.plugins.otp_totp.models import TOTPDevice

from accounts.models import User
from e2a.core.clock import now
from sandboxes.models import (
    Job,
    Node,
    PreviewLink,
    Sandbox,
    SandboxLogEntry,
    SandboxMove,
    SandboxState,
    Template,
)
from sandboxes.snapshot_models import Snapshot, SnapshotState, Workspace

PASSWORD = "correct horse battery staple"
SECRET = "planted-secret-value-4711"


@pytest.fixture
def admin_path() -> str:
    return f"/{settings.E2A.admin_path}"


@pytest.fixture
def operator(db: None) -> User:
    return User.objects.create_superuser(email="operator@example.com", password=PASSWORD)


@pytest.fixture
def device(operator: User) -> TOTPDevice:
    """The operator's second factor."""
    return TOTPDevice.objects.create(user=operator, name="authenticator", confirmed=True)


@pytest.fixture
def desk(operator: User) -> Client:
    """The operator, signed in, in development, without a second factor."""
    client = Client(raise_request_exception=False)
    client.force_login(operator)
    return client


@pytest.fixture
def node_row(db: None) -> Node:
    """A live node that is nothing but a row."""
    Template.objects.filter(name="standard").update(image="e2a/standard", image_id="e2a/standard:test")
    return Node.objects.create(
        name="elsewhere",
        address="unix:/nowhere/gateway.sock",
        engine="docker",
        is_engine_up=True,
        capacity=1000,
        heartbeat_at=now(),
        images={"standard": {"tag": "e2a/standard:test", "id": "e2a/standard:test"}},
    )


@pytest.fixture
def things(alice: User, alice_key: str, node_row: Node) -> dict[str, str]:
    """One of everything that alice can own: the values of path parameters, by their names in the schema."""
    from keys.models import ApiKey
    from secrets_vault.services import bundle_create
    from sessions_app.models import Event, Session, SessionStatus, Task

    moment = now()
    bundle = bundle_create(
        tenant=alice.tenant, name="alices", values={"LLM_API_KEY": SECRET, "TOKEN": SECRET + "2"}
    )
    sandbox = Sandbox.objects.create(
        tenant=alice.tenant,
        template=Template.objects.get(name="standard"),
        node=node_row,
        state=SandboxState.RUNNING,
        slot=1,
        metadata={"project": "alices"},
        created_at=moment,
        claimed_at=moment,
        expires_at=moment + dt.timedelta(hours=1),
    )
    SandboxMove.objects.create(sandbox=sandbox, at=moment, from_state="booting", to_state="running")
    job = Job.objects.create(sandbox=sandbox, command=SECRET, created_at=moment)
    preview = PreviewLink.objects.create(
        sandbox=sandbox,
        port=8000,
        token_digest="d",
        made_by=alice.public_id,
        created_at=moment,
        expires_at=moment + dt.timedelta(hours=1),
    )
    SandboxLogEntry.objects.create(
        sandbox=sandbox, at=moment, process_id="p1", command="echo", exit_code=0, output=SECRET
    )
    snapshot = Snapshot.objects.create(
        tenant=alice.tenant,
        sandbox=sandbox,
        sandbox_public_id=sandbox.public_id,
        name="alices",
        template_name="standard",
        state=SnapshotState.READY,
        size_bytes=1000,
        created_at=moment,
    )
    Workspace.objects.create(tenant=alice.tenant, name="alices", created_at=moment)
    session = Session.objects.create(
        tenant=alice.tenant,
        created_by=alice,
        user_id="u1",
        agent_kind="shell",
        template_name="standard",
        status=SessionStatus.IDLE,
        created_at=moment,
        last_active_at=moment,
        expires_at=moment + dt.timedelta(hours=1),
        last_seq=1,
    )
    task = Task.objects.create(session=session, prompt="true", created_at=moment)
    Event.objects.create(
        session=session,
        seq=1,
        type="stdout",
        task=task,
        ts=moment,
        data={"data": "hello"},
        private={"raw": SECRET},
    )
    return {
        "session_id": session.public_id,
        "task_id": task.public_id,
        "sandbox_id": sandbox.public_id,
        "job_id": job.public_id,
        "snapshot_id": snapshot.public_id,
        "preview_id": preview.public_id,
        "key_id": ApiKey.objects.get(user=alice).public_id,
        "name": bundle.name,
    }


@pytest.fixture
def openapi(db: None) -> dict[str, Any]:
    """The served document."""
    answer = Client().get("/v1/openapi.json")
    assert answer.status_code == 200
    document: dict[str, Any] = answer.json()
    return document

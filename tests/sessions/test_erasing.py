"""Erasing a tenant: its secrets at once, then everything else, and nobody else's anything (SECURITY 4.5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.db import transaction

from accounts.models import LoginFlow, Tenant, User
from accounts.services import tenant_erase, tenant_resume, tenant_suspend
from e2a.core.clock import now
from e2a.core.errors import Conflict
from e2a.core.models import AuditEvent
from keys.models import ApiKey
from sandboxes.lifecycle import sandbox_gone
from sandboxes.models import Sandbox, SandboxState
from secrets_vault.crypto import SecretCorrupt
from secrets_vault.models import Bundle, DataKey
from secrets_vault.services import seal, tenant_shred, unseal
from sessions_app import frames, log
from sessions_app.erasing import Erasure, tenant_erase_step
from sessions_app.models import Event, Session, SessionStatus
from sessions_app.tasks import tenants_erase
from tests.fixtures import Api

pytestmark = pytest.mark.django_db(transaction=True)


def asked(user: Any) -> Tenant:
    """An operator suspended the tenant, then had it erased."""
    tenant_suspend(tenant=user.tenant, actor="usr_operator")
    tenant_erase(tenant=user.tenant, actor="usr_operator")
    return Tenant.objects.get(pk=user.tenant_id)


def test_only_what_is_suspended_can_be_erased_and_it_stays_out(alice: Any) -> None:
    with pytest.raises(Conflict) as refused:
        tenant_erase(tenant=alice.tenant, actor="usr_operator")
    assert "Suspend" in refused.value.detail
    asked(alice)
    tenant_erase(tenant=alice.tenant, actor="usr_operator")  # Twice is fine.
    tenant_resume(tenant=alice.tenant, actor="usr_operator")
    assert Tenant.objects.get(pk=alice.tenant_id).suspended_at is not None
    assert AuditEvent.objects.filter(action="tenant.erase_asked").count() == 1


def test_4_5_its_sealed_data_does_not_open_any_more(alice: Any, bundle: Callable[..., Any]) -> None:
    bundle(alice, "one", A_SECRET="planted-value")
    sealed = seal(tenant=alice.tenant, purpose="test", data=b"planted")
    assert unseal(tenant=alice.tenant, purpose="test", data=sealed) == b"planted"
    tenant_shred(tenant=alice.tenant)
    tenant_shred(tenant=alice.tenant)  # Twice is fine.
    assert not DataKey.objects.filter(tenant=alice.tenant_id).exists()
    assert not Bundle.objects.filter(tenant=alice.tenant_id).exists()
    with pytest.raises(SecretCorrupt):
        unseal(tenant=alice.tenant, purpose="test", data=sealed)
    assert AuditEvent.objects.filter(action="vault.shredded").count() == 1


def test_everything_of_it_goes_and_nothing_of_others(
    alice: Any, mallory: Any, make_session: Callable[..., Session], node_row: Any, as_alice: Api,
    as_mallory: Api, bundle: Callable[..., Any],
) -> None:  # fmt: skip
    body = {"agent": {"kind": "shell"}, "user_id": "u"}
    hers = as_alice.post("/v1/sessions", body).json()["chat_session_id"]
    his = as_mallory.post("/v1/sessions", body).json()["chat_session_id"]
    ended = make_session(status=SessionStatus.ENDED, ended_at=now())
    with transaction.atomic():
        log.append(ended, [frames.status("idle", detail=str(number)) for number in range(300)])
    bundle(mallory, "his", A_SECRET="his-own-value")
    tenant = asked(alice)
    # A node has taken her sandbox: it is not gone at once.
    sandbox = Sandbox.objects.get(owner=hers)
    Sandbox.objects.filter(pk=sandbox.pk).update(state=SandboxState.BOOTING, node=node_row, slot=0)
    tenants_erase()
    assert Session.objects.get(public_id=hers).status == SessionStatus.ENDED
    sandbox.refresh_from_db()
    assert sandbox.state == SandboxState.STOPPING
    assert Event.objects.filter(session=ended).count() == 300
    sandbox_gone(sandbox, why="removed")
    tenants_erase()
    assert not Tenant.objects.filter(pk=tenant.pk).exists()
    left: list[Any] = [User, LoginFlow, Session, Sandbox, ApiKey]
    assert [model.objects.filter(**_of(model, alice)).count() for model in left] == [0] * len(left)
    assert not Event.objects.filter(session=ended.pk).exists()
    assert AuditEvent.objects.filter(action="tenant.erased", target=tenant.public_id).count() == 1
    assert Session.objects.get(public_id=his).status != SessionStatus.ENDED
    assert Bundle.objects.filter(tenant=mallory.tenant_id).count() == 1
    assert as_mallory.get("/v1/me").status_code == 200


def _of(model: Any, user: Any) -> dict[str, Any]:
    return {"email_key": user.email_key} if model is LoginFlow else {"tenant": user.tenant_id}


def test_a_step_may_be_the_last_before_a_crash_and_be_repeated(
    alice: Any, make_session: Callable[..., Session]
) -> None:
    for _ in range(3):
        make_session(status=SessionStatus.ENDED, ended_at=now())
    tenant = asked(alice)
    steps = [tenant_erase_step(tenant) for _ in range(2)]
    assert steps == [Erasure.MORE, Erasure.DONE]
    tenants_erase()

"""What an operator can see and do in the admin (SECURITY 1.9, 3.4, 9.12)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.conf import settings
from django.contrib import admin
from django.test import Client
from django_otp.plugins.otp_totp.models import TOTPDevice

from accounts.models import LoginFlow, SignIn, Tenant, User
from accounts.services import user_get_or_create
from e2a.core.models import AuditEvent
from keys.models import ApiKey
from keys.services import key_issue
from tests.accounts.mailbox import mailed_code
from tests.fixtures import Api

pytestmark = pytest.mark.django_db
ADMIN = f"/{settings.E2A.admin_path}"
MODELS: list[type[Any]] = [Tenant, User, LoginFlow, SignIn, AuditEvent, ApiKey]


@pytest.fixture
def operator(db: None) -> User:
    return User.objects.create_superuser(
        email="operator@example.com", password="correct horse battery staple"
    )


@pytest.fixture
def desk(operator: User) -> Client:
    """The operator, signed in with the second factor."""
    from django_otp import DEVICE_ID_SESSION_KEY

    device = TOTPDevice.objects.create(user=operator, confirmed=True)
    client = Client()
    client.force_login(operator)
    session = client.session
    session[DEVICE_ID_SESSION_KEY] = device.persistent_id
    session.save()
    return client


def test_every_page_opens_and_shows_no_digest_nonce_or_key(
    desk: Client, alice: User, ask: Callable[[str], str], signed_in: Callable[[str], dict[str, Any]]
) -> None:
    issued = key_issue(user=alice, name="ci")
    tokens = signed_in("alice@example.com")
    flow = LoginFlow.objects.get(login_id=ask("alice@example.com"))
    planted = [flow.nonce, flow.code_digest, mailed_code(flow.login_id), issued.key, issued.row.digest]
    planted += [tokens["token"], tokens["refresh_token"], issued.row.lookup]
    for model in MODELS:
        path = f"{ADMIN}/{model._meta.app_label}/{model._meta.model_name}/"
        pages = [path] + [f"{path}{row.pk}/change/" for row in model.objects.all()]
        for page in pages:
            answer = desk.get(page)
            assert answer.status_code == 200, page
            assert not [secret for secret in planted if secret in answer.content.decode()], page


def test_no_secret_is_searchable() -> None:
    hidden = {"digest", "code_digest", "nonce", "lookup", "password"}
    for model in MODELS:
        searched = set(admin.site._registry[model].search_fields)
        assert not {name.rpartition("__")[2] for name in searched} & hidden


def act(desk: Client, model: type[Any], action: str, *rows: Any) -> None:
    path = f"{ADMIN}/{model._meta.app_label}/{model._meta.model_name}/"
    answer = desk.post(path, {"action": action, "_selected_action": [row.pk for row in rows]})
    assert answer.status_code == 302, answer.content


def test_the_actions_do_what_the_services_do_and_are_audited(
    desk: Client, operator: User, alice: User, mallory: User, alice_key: str, mallory_key: str
) -> None:
    act(desk, Tenant, "suspend", mallory.tenant)
    assert Api(mallory_key).get("/v1/me").status_code == 401
    act(desk, Tenant, "resume", mallory.tenant)
    assert Api(mallory_key).get("/v1/me").status_code == 200
    act(desk, ApiKey, "revoke", ApiKey.objects.get(user=mallory))
    assert Api(mallory_key).get("/v1/me").status_code == 401
    act(desk, User, "disable", alice)
    assert Api(alice_key).get("/v1/me").status_code == 401
    act(desk, User, "enable", alice)
    assert Api(alice_key).get("/v1/me").status_code == 200
    rows = AuditEvent.objects.filter(actor=operator.public_id).exclude(action="admin.act")
    done = list(rows.order_by("pk").values_list("action", flat=True))
    assert [action for action in done if not action.startswith("user.created")] == [
        "tenant.suspended", "tenant.resumed", "key.revoked", "user.disabled", "user.enabled",
    ]  # fmt: skip


def test_a_change_of_limits_is_audited_with_before_and_after(desk: Client, alice: User) -> None:
    tenant = alice.tenant
    fields = {
        "name": tenant.name, "plan_tier": "pro", "max_live_sandboxes": 50, "max_tasks_queued": 20,
        "allowed_origins": "[]",
    }  # fmt: skip
    assert desk.post(f"{ADMIN}/accounts/tenant/{tenant.pk}/change/", fields).status_code == 302
    row = AuditEvent.objects.get(action="tenant.changed")
    assert row.detail == {"fields": {"plan_tier": ["free", "pro"], "max_live_sandboxes": ["20", "50"]}}


def test_nobody_else_gets_in(alice: User) -> None:
    client = Client()
    client.force_login(alice)
    assert client.get(f"{ADMIN}/accounts/user/").status_code == 302


def test_the_command_makes_an_operator_whose_address_is_found_in_any_case(operator: User) -> None:
    assert user_get_or_create(address="Operator@EXAMPLE.com") == operator
    assert operator.check_password("correct horse battery staple")
    assert User.objects.get_by_natural_key("OPERATOR@example.com") == operator


def test_an_operator_erases_only_what_is_suspended(desk: Client, alice: User) -> None:
    page = f"{ADMIN}/accounts/tenant/"

    def act(action: str) -> str:
        body = {"action": action, "_selected_action": [alice.tenant_id]}
        return desk.post(page, body, follow=True).content.decode()

    assert "Suspend the tenant first." in act("erase")
    assert Tenant.objects.get(pk=alice.tenant_id).erase_asked_at is None
    act("suspend")
    act("erase")
    assert Tenant.objects.get(pk=alice.tenant_id).erase_asked_at is not None
    act("resume")
    assert Tenant.objects.get(pk=alice.tenant_id).suspended_at is not None

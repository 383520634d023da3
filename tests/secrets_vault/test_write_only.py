"""SECURITY 4.3: values go in and no answer, page, log line, audit row or schema holds one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from django.conf import settings
from django.contrib import admin
from django.urls import reverse

from e2a.core.models import AuditEvent
from secrets_vault import services
from secrets_vault.models import Bundle, BundleUse, BundleVersion, DataKey, SecretValue
from tests.secrets_vault.conftest import PLANTED, SECRETS

pytestmark = pytest.mark.django_db


@pytest.fixture
def journey(as_alice: Any, as_mallory: Any) -> list[Any]:
    """Every route with a planted value in it, the refusals too; all answers."""
    planted = {"LLM_API_KEY": PLANTED, "TOKEN": PLANTED}
    injected = {"value": PLANTED, "inject": {"hosts": ["api.example.com"], "header": "A: {value}"}}
    one = f"{SECRETS}/default"
    return [
        as_alice.post(SECRETS, {"name": "default", "values": planted}),
        as_alice.post(SECRETS, {"name": "default", "values": planted}),
        as_alice.post(SECRETS, {"name": "BAD", "values": planted}),
        as_alice.post(SECRETS, {"name": "b", "values": {"PATH": PLANTED}}),
        as_alice.post(SECRETS, {"name": "b", "values": {"LLM_BASE_URL": PLANTED}}),
        as_alice.post(SECRETS, {"name": "b", "values": {"LLM_MODEL": PLANTED + " "}}),
        as_alice.post(SECRETS, {"name": "b", "values": {"LLM_API_KEY": PLANTED + "\n"}}),
        as_alice.post(SECRETS, {"name": "b", "values": {PLANTED: PLANTED}}),
        as_alice.post(SECRETS, {"name": "b", "values": [PLANTED]}),
        as_alice.post(SECRETS, {"name": "b", "values": {"A": {"value": PLANTED, PLANTED: 1}}}),
        as_alice.post(SECRETS, {"name": "b", "values": {"A": {"value": PLANTED, "inject": PLANTED}}}),
        as_alice.post(SECRETS, {"name": "b", "values": {"A": {"value": PLANTED, "inject": {
            "hosts": [PLANTED], "header": PLANTED}}}}),
        as_alice.post(SECRETS, b'{"name": "b", "values": {"A": "' + PLANTED.encode()),
        as_alice.post(SECRETS, {"name": "k", "values": {"A": PLANTED}}, headers={"Idempotency-Key": "k"}),
        as_alice.post(SECRETS, {"name": "k", "values": {"A": PLANTED}}, headers={"Idempotency-Key": "k"}),
        as_alice.put(one, {"values": {**planted, "INJECTED": injected}}),
        as_alice.patch(one, {"values": {"MORE": PLANTED}}),
        as_alice.post(f"{one}/rollback", {"version": 1}),
        as_alice.post(f"{one}/rollback", {"version": 99}),
        as_alice.get(SECRETS),
        as_alice.get(one),
        as_alice.get(f"{one}/versions"),
        as_mallory.put(one, {"values": planted}),
        as_alice.get("/v1/openapi.json"),
    ]  # fmt: skip


def test_4_3_no_answer_holds_a_value_and_every_answer_is_no_store(journey: list[Any]) -> None:
    statuses = {answer.status_code for answer in journey}
    assert statuses >= {200, 201, 400, 404, 409}
    for answer in journey:
        assert answer.status_code < 500
        assert PLANTED not in answer.content.decode(), answer.content
        assert PLANTED not in str(answer.headers)
    for answer in journey[:-1]:
        assert "no-store" in answer["Cache-Control"]


def test_4_3_no_log_line_and_no_audit_row_holds_a_value_but_both_name_it(
    logged: Any, journey: list[Any], hold: Any
) -> None:
    hold("ses_a", "default")
    services.holder_llm("ses_a")
    services.holder_environment("ses_a")
    text = logged.getvalue()
    assert PLANTED not in text
    assert "vault.values_read" in text
    assert "LLM_API_KEY" in text
    rows = list(AuditEvent.objects.filter(action__startswith="secret_bundle."))
    assert [row.action.partition(".")[2] for row in rows] == [
        "create",
        "create",
        "replace",
        "patch",
        "rollback",
    ]
    for row in rows:
        assert PLANTED not in json.dumps(row.detail)
        assert row.actor.startswith("key_")
        assert row.target.startswith("sec_")
    assert rows[2].detail["keys"] == ["INJECTED", "LLM_API_KEY", "TOKEN"]


def test_4_3_every_admin_page_of_the_vault_opens_and_shows_neither_value_nor_ciphertext(
    journey: list[Any], alice: Any, client: Any, hold: Any
) -> None:
    hold("ses_a", "default")
    type(alice).objects.filter(pk=alice.pk).update(is_staff=True, is_superuser=True)
    alice.refresh_from_db()
    client.force_login(alice)
    ciphertexts = [bytes(row.ciphertext) for row in SecretValue.objects.all()]
    ciphertexts += [bytes(row.wrapped) for row in DataKey.objects.all()]
    forbidden = [PLANTED, *(form for c in ciphertexts for form in (c.hex(), repr(c)[2:40]))]
    for model in (Bundle, BundleVersion, BundleUse, DataKey, SecretValue):
        if not admin.site.is_registered(model):
            continue
        name = model._meta.model_name
        pages = [reverse(f"admin:secrets_vault_{name}_changelist")]
        pages += [
            reverse(f"admin:secrets_vault_{name}_change", args=[row.pk])
            for row in model._default_manager.all()
        ]
        for page in pages:
            answer = client.get(page)
            assert answer.status_code == 200, page
            body = answer.content.decode()
            assert not [form for form in forbidden if form in body], page
        assert client.get(reverse(f"admin:secrets_vault_{name}_add")).status_code == 403
        assert client.post(pages[1], {"name": "x"}).status_code == 403
        assert client.post(reverse(f"admin:secrets_vault_{name}_delete", args=[1])).status_code in (302, 403)
        assert model._default_manager.exists()
    assert client.get(f"{reverse('admin:secrets_vault_bundle_changelist')}?q={PLANTED}").status_code == 200


def test_the_bundle_of_the_admin_names_what_it_has(journey: list[Any], alice: Any, client: Any) -> None:
    type(alice).objects.filter(pk=alice.pk).update(is_staff=True, is_superuser=True)
    client.force_login(type(alice).objects.get(pk=alice.pk))
    bundle = Bundle.objects.get(name="default")
    body = client.get(reverse("admin:secrets_vault_bundle_change", args=[bundle.pk])).content.decode()
    assert "LLM_API_KEY, TOKEN" in body


def test_what_other_apps_get_hides_itself(journey: list[Any], hold: Any) -> None:
    hold("ses_a", "default")
    environment, _ = services.holder_environment("ses_a")
    read = services.values_read(holder="ses_a", purpose="test")
    shown = repr((environment, read, services.holder_llm("ses_a"))) + str(environment)
    assert PLANTED not in shown


def test_the_schema_says_that_values_are_written_only(as_alice: Any) -> None:
    schema = as_alice.get("/v1/openapi.json").json()
    paths = {path: set(item) for path, item in schema["paths"].items() if "/secrets" in path}
    base = "/v1/tenants/me/secrets"
    assert paths == {
        base: {"get", "post"},
        f"{base}/{{name}}": {"get", "put", "patch", "delete"},
        f"{base}/{{name}}/versions": {"get"},
        f"{base}/{{name}}/rollback": {"post"},
    }
    components = schema["components"]["schemas"]
    answers = [name for name in components if "Bundle" in name and not name.endswith("Request")]
    assert answers
    for name in answers:
        assert "values" not in components[name].get("properties", {}), name
    values = components["BundleCreateRequest"]["properties"]["values"]
    assert values["writeOnly"] is True
    assert values["maxProperties"] == 50
    assert f'"{settings.E2A.vault_keys.newest.id}"' not in json.dumps(schema)

"""The operators' site (SECURITY 9.12): who gets in, how often one may try, what is audited, what never shown."""

from __future__ import annotations

import datetime as dt
import io
import re
from typing import Any

import pytest
import time_machine
from django.apps import apps
from django.conf import settings
from django.contrib import admin
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Group
from django.core.management import CommandError, call_command
from django.db.models import BinaryField, Model
from django.test import Client
from django_otp.oath import TOTP
from django_otp.plugins.otp_totp.models import TOTPDevice
from unfold.admin import ModelAdmin

from accounts.models import LoginFlow, MailboxState, RefreshToken, SignIn, User
from e2a.core.clock import now
from e2a.core.models import AuditEvent, IdempotencyRecord
from tests.web.conftest import PASSWORD, SECRET

pytestmark = pytest.mark.django_db

OURS = ("core", "accounts", "keys", "secrets_vault", "sandboxes", "sessions_app")
PLANTED = "0123456789abcdef" * 4


def shown(device: TOTPDevice) -> str:
    """What the authenticator shows now."""
    clock = TOTP(device.bin_key)
    clock.time = now().timestamp()
    return f"{clock.token():06d}"


def login(client: Client, path: str, **fields: str) -> Any:
    return client.post(f"{path}/login/?next={path}/", fields)


def is_in(client: Client, path: str) -> bool:
    return client.get(f"{path}/").status_code == 200


@pytest.fixture
def all_rows(things: dict[str, str], alice: User, operator: User, device: TOTPDevice) -> None:
    """At least one row of every model that has a page; every digest of them is `PLANTED`."""
    moment = now()
    LoginFlow.objects.create(
        login_id="lgn_1", email="a@example.com", email_key="a@example.com", nonce=PLANTED[:32], code_key_id="k",
        code_digest=PLANTED, created_at=moment, expires_at=moment,
    )  # fmt: skip
    sign_in = SignIn.objects.create(family=PLANTED[:40], user=alice, token_version=1, created_at=moment)
    RefreshToken.objects.create(sign_in=sign_in, digest=PLANTED, created_at=moment, expires_at=moment)
    MailboxState.objects.create(email_key="a@example.com")
    IdempotencyRecord.objects.create(
        tenant_id=alice.tenant_id,
        scope="POST /v1/sessions",
        key_digest=PLANTED,
        body_digest=PLANTED,
        answer=SECRET.encode(),
    )
    Group.objects.create(name="support")
    LogEntry.objects.create(user=operator, action_flag=2, object_repr="x")
    from secrets_vault.models import Bundle, BundleUse

    BundleUse.objects.create(bundle=Bundle.objects.get(), holder=things["session_id"])
    from sessions_app.models import ModelCall

    ModelCall.objects.create(
        tenant_id=alice.tenant_id, sandbox_id="sbx_1", vendor="anthropic", model="claude-opus-5-5", status=200,
        is_whole=True, ended_at=moment,
    )  # fmt: skip


# ---- Pages


def test_every_model_of_ours_has_a_page_in_one_style() -> None:
    missing = [
        m for label in OURS for m in apps.get_app_config(label).get_models() if m not in admin.site._registry
    ]
    assert missing == []
    assert [a for a in admin.site._registry.values() if not isinstance(a, ModelAdmin)] == []


def test_every_list_page_search_and_change_page_opens_and_shows_no_secret(
    desk: Client, all_rows: None, operator: User, device: TOTPDevice, admin_path: str
) -> None:
    login(desk, admin_path, otp_token=shown(device))
    hidden = [SECRET, PLANTED, PLANTED[:32], PLANTED[:40], device.key, operator.password, PASSWORD]
    for model in admin.site._registry:
        base = f"{admin_path}/{model._meta.app_label}/{model._meta.model_name}/"
        row = model._default_manager.first()
        assert row is not None, f"{model} has no row here"
        for page in (base, f"{base}?q=zzz", f"{base}{row.pk}/change/", f"{base}{row.pk}/history/"):
            answer = desk.get(page)
            assert answer.status_code in ((200, 302) if "?q=" in page else (200,)), page
            text = answer.content.decode()
            assert [secret for secret in hidden if secret in text] == [], page


def test_no_page_has_or_searches_a_field_that_holds_a_secret() -> None:
    words = re.compile(
        r"digest|nonce|cipher|sealed|wrapped$|password|private|lookup|family|^key$|answer$|configured_with"
    )
    for model, page in admin.site._registry.items():
        searched = {name.lstrip("=^@").rpartition("__")[2] for name in page.search_fields}
        assert not [name for name in searched if words.search(name)], model
        fields = {name for name in _field_names(page, model) if isinstance(name, str)}
        assert not [
            name for name in fields if words.search(name) and name not in ("wrapping_key_id", "is_sealed")
        ], model
        binary = {field.name for field in model._meta.get_fields() if isinstance(field, BinaryField)}
        assert not fields & binary, model


def _field_names(page: Any, model: type[Model]) -> list[Any]:
    from django.test import RequestFactory

    request = RequestFactory().get("/")
    request.user = User(is_staff=True, is_superuser=True, is_active=True)
    return [
        *page.list_display,
        *(name for _, options in page.get_fieldsets(request, model()) for name in options["fields"]),
    ]


# ---- Who gets in


def test_in_development_staff_without_a_second_factor_gets_in(desk: Client, admin_path: str) -> None:
    assert is_in(desk, admin_path)


def test_in_production_nobody_does_without_one(desk: Client, in_production: None, admin_path: str) -> None:
    answer = desk.get(f"{admin_path}/")
    assert (answer.status_code, answer["Location"]) == (302, f"{admin_path}/login/?next={admin_path}/")
    answer = login(desk, admin_path, otp_token="")
    assert "manage.py admin_totp" in answer.content.decode()
    assert not is_in(desk, admin_path)


def test_who_has_one_must_show_it_in_development_too(
    desk: Client, device: TOTPDevice, admin_path: str
) -> None:
    assert not is_in(desk, admin_path)
    assert 'name="password"' not in desk.get(f"{admin_path}/login/").content.decode(), (
        "they are signed in already"
    )
    assert login(desk, admin_path, otp_token=shown(device))["Location"] == f"{admin_path}/"
    assert is_in(desk, admin_path)


@pytest.mark.parametrize(
    ("password", "good_code", "gets_in"),
    [(PASSWORD, True, True), (PASSWORD, False, False), ("wrong", True, False), ("", True, False)],
)
def test_password_and_code_are_both_needed(
    in_production: None, device: TOTPDevice, admin_path: str, password: str, good_code: bool, gets_in: bool
) -> None:
    client = Client()
    token = shown(device) if good_code else "000000"
    login(client, admin_path, username="operator@example.com", password=password, otp_token=token)
    assert is_in(client, admin_path) is gets_in


def test_a_code_works_once(device: TOTPDevice, admin_path: str) -> None:
    token = shown(device)
    for gets_in in (True, False):
        client = Client()
        login(client, admin_path, username="operator@example.com", password=PASSWORD, otp_token=token)
        assert is_in(client, admin_path) is gets_in


def test_the_code_of_another_operators_device_is_refused(device: TOTPDevice, admin_path: str) -> None:
    other = User.objects.create_superuser(email="other@example.com", password=PASSWORD)
    TOTPDevice.objects.create(user=other, confirmed=True)
    client = Client()
    login(client, admin_path, username="other@example.com", password=PASSWORD, otp_token=shown(device))
    assert not is_in(client, admin_path)


def test_people_who_are_no_staff_never_get_in(alice: User, admin_path: str) -> None:
    alice.set_password(PASSWORD)
    alice.save()
    client = Client()
    client.force_login(alice)
    assert not is_in(client, admin_path)
    login(client, admin_path, username="alice@example.com", password=PASSWORD)
    assert not is_in(client, admin_path)


def test_the_code_is_asked_for_again_after_fifteen_idle_minutes(
    desk: Client, device: TOTPDevice, in_production: None, admin_path: str
) -> None:
    start = now()
    with time_machine.travel(start, tick=False) as clock:
        login(desk, admin_path, otp_token=shown(device))
        for minutes in (14, 14, 14):
            clock.shift(dt.timedelta(minutes=minutes))
            assert is_in(desk, admin_path), "every page begins the time anew"
        clock.shift(dt.timedelta(minutes=16))
        assert not is_in(desk, admin_path)
        assert not is_in(desk, admin_path)
        login(desk, admin_path, otp_token=shown(device))
        assert is_in(desk, admin_path)


# ---- How often one may try


def test_five_wrong_tries_lock_that_account_for_that_source_only(device: TOTPDevice, admin_path: str) -> None:
    def attempt(address: str, password: str) -> bool:
        client = Client(REMOTE_ADDR=address)
        login(client, admin_path, username="operator@example.com", password=password, otp_token=shown(device))
        return is_in(client, admin_path)

    with time_machine.travel(now(), tick=False) as clock:
        for _ in range(5):
            assert not attempt("192.0.2.66", "guess")
        assert not attempt("192.0.2.66", PASSWORD), "locked, though it is right"
        assert attempt("192.0.2.1", PASSWORD), "the operator, elsewhere"
        clock.shift(dt.timedelta(minutes=15, seconds=1))
        assert attempt("192.0.2.66", PASSWORD)


def test_wrong_codes_count_too(desk: Client, device: TOTPDevice, admin_path: str) -> None:
    for _ in range(5):
        assert "Too many tries" not in login(desk, admin_path, otp_token="000000").content.decode()
    assert "Too many tries" in login(desk, admin_path, otp_token="000000").content.decode()


def test_a_success_sets_the_count_back(operator: User, admin_path: str) -> None:
    for password in (["guess"] * 4 + [PASSWORD]) * 2:
        client = Client()
        login(client, admin_path, username="operator@example.com", password=password)
    assert is_in(client, admin_path)


def test_a_source_that_tries_many_names_is_stopped(operator: User, admin_path: str) -> None:
    for number in range(52):
        login(Client(), admin_path, username=f"somebody-{number}@example.com", password="x")
    client = Client()
    login(client, admin_path, username="operator@example.com", password=PASSWORD)
    assert not is_in(client, admin_path)
    assert AuditEvent.objects.filter(action="admin.sign_in_tried").count() == 50


def test_what_was_typed_is_not_written_down(admin_path: str, operator: User) -> None:
    login(Client(), admin_path, username="my password in the wrong field", password="x")
    row = AuditEvent.objects.get(action="admin.sign_in_tried")
    assert "password" not in f"{row.target}{row.actor}{row.detail}"


# ---- What is written down


def test_every_act_is_audited(desk: Client, operator: User, things: dict[str, str], admin_path: str) -> None:
    from sandboxes.models import Sandbox

    sandbox = Sandbox.objects.get()
    desk.post(
        f"{admin_path}/sandboxes/sandbox/",
        {"action": "destroy_selected", "_selected_action": [sandbox.pk]},
        HTTP_USER_AGENT="desk",
        REMOTE_ADDR="192.0.2.9",
    )
    sandbox.refresh_from_db()
    assert sandbox.state == "stopping"
    row = AuditEvent.objects.get(action="admin.act")
    assert (row.actor, row.address, row.user_agent) == (operator.public_id, "192.0.2.9", "desk")
    assert row.detail == {
        "method": "POST", "path": "/sandboxes/sandbox/", "did": "destroy_selected",
        "rows": [str(sandbox.pk)], "status": 302,
    }  # fmt: skip


def test_a_template_that_is_switched_off_is_audited_with_before_and_after(
    desk: Client, admin_path: str, db: None
) -> None:
    from sandboxes.models import Template

    template = Template.objects.get(name="standard")
    assert desk.post(f"{admin_path}/sandboxes/template/{template.pk}/change/", {}).status_code == 302
    row = AuditEvent.objects.get(action="template.changed")
    assert (row.target, row.detail) == ("standard", {"fields": {"is_enabled": ["True", "False"]}})


def test_reading_is_no_act(desk: Client, admin_path: str) -> None:
    assert is_in(desk, admin_path)
    assert not AuditEvent.objects.filter(action="admin.act").exists()


def test_what_a_stranger_sends_is_no_act(admin_path: str, db: None) -> None:
    Client().post(f"{admin_path}/accounts/tenant/", {"action": "suspend"})
    assert not AuditEvent.objects.filter(action="admin.act").exists()


def test_staff_without_the_right_cannot_end_a_session(
    things: dict[str, str], bob: User, admin_path: str
) -> None:
    from django.contrib.auth.models import Permission

    from sessions_app.models import Session

    User.objects.filter(pk=bob.pk).update(is_staff=True)
    bob.user_permissions.set(Permission.objects.filter(codename="view_session"))
    client = Client()
    client.force_login(User.objects.get(pk=bob.pk))
    session = Session.objects.get()
    page = f"{admin_path}/sessions_app/session/"
    assert client.get(page).status_code == 200
    client.post(page, {"action": "end_selected", "_selected_action": [session.pk]})
    session.refresh_from_db()
    assert session.status == "idle"


# ---- The command


def enrol(address: str, **options: Any) -> str:
    out = io.StringIO()
    call_command("admin_totp", address, stdout=out, **options)
    return out.getvalue()


def test_the_command_shows_a_second_factor_once(operator: User, admin_path: str, in_production: None) -> None:
    text = enrol("Operator@Example.com")
    assert "█" in text or "▄" in text
    url = re.search(r"^otpauth://totp/e2a%3Aoperator%40example\.com\?secret=[A-Z2-7]+&", text, re.M)
    assert url is not None, text
    with pytest.raises(CommandError, match="--replace"):
        enrol("operator@example.com")
    first = TOTPDevice.objects.get()
    enrol("operator@example.com", replace=True)
    second = TOTPDevice.objects.get()
    assert first.key != second.key
    client = Client()
    login(client, admin_path, username="operator@example.com", password=PASSWORD, otp_token=shown(second))
    assert is_in(client, admin_path)


def test_the_command_is_for_operators(alice: User) -> None:
    for address in ("alice@example.com", "nobody@example.com"):
        with pytest.raises(CommandError, match="createsuperuser"):
            enrol(address)
    assert not TOTPDevice.objects.exists()


def test_the_admin_never_answers_a_second_factors_key(
    desk: Client, device: TOTPDevice, admin_path: str
) -> None:
    login(desk, admin_path, otp_token=shown(device))
    assert is_in(desk, admin_path)
    for page in ("config", "qrcode"):
        assert desk.get(f"{admin_path}/otp_totp/totpdevice/{device.pk}/{page}/").status_code in (302, 404)
    assert settings.OTP_TOTP_ISSUER == "e2a"

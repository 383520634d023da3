"""Ids, states, key rings, cursors, JSON: what every app stands on."""

from __future__ import annotations

import base64
import re
from typing import Any

import pytest
from django.db import transaction
from django.test import RequestFactory

from accounts.models import Tenant
from e2a.core.errors import ValidationFailed
from e2a.core.ids import new_id
from e2a.core.keyring import KeyRing, KeyRingError
from e2a.core.log import scrub, scrub_event
from e2a.core.pagination import page
from e2a.core.parsers import strict_json
from e2a.core.states import advance
from sandboxes.models import TRANSITIONS, Sandbox, SandboxState, Template


def test_ids_have_a_prefix_and_26_base32_characters_and_do_not_repeat() -> None:
    made = {new_id("ses") for _ in range(2000)}
    assert len(made) == 2000
    assert all(re.fullmatch(r"ses_[a-z2-7]{26}", one) for one in made)


@pytest.mark.django_db
def test_advance_moves_a_row_once_and_only_where_the_table_allows() -> None:
    from e2a.core.clock import now

    template = Template.objects.create(name="t", vcpu=1, memory_mib=1, disk_mib=1)
    sandbox = Sandbox.objects.create(template=template, created_at=now(), state=SandboxState.BOOTING)
    rows = Sandbox.objects.filter(pk=sandbox.pk)
    assert advance(rows, to=SandboxState.RUNNING, transitions=TRANSITIONS) == 1
    assert advance(rows, to=SandboxState.RUNNING, transitions=TRANSITIONS) == 0
    assert advance(rows, to=SandboxState.PARKED, transitions=TRANSITIONS) == 0
    sandbox.refresh_from_db()
    assert sandbox.state == SandboxState.RUNNING


def _key(letter: bytes = b"") -> str:
    return base64.b64encode(letter * 32 if letter else bytes(range(32))).decode()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no key"),
        ("novalue", "id:base64"),
        ("UP:" + _key(), "id:base64"),
        ("a:!!!", "base64"),
        ("a:" + base64.b64encode(b"short").decode(), "5 bytes"),
        ("a:" + _key(b"x"), "example"),
        (f"a:{_key()},a:{_key()}", "twice"),
    ],
)
def test_a_weak_or_malformed_key_ring_is_refused_with_the_reason(text: str, says: str) -> None:
    with pytest.raises(KeyRingError, match=says):
        KeyRing.parse(text)


def test_a_key_ring_is_newest_first_and_derives_apart_by_purpose() -> None:
    ring = KeyRing.parse(f"b:{_key()},a:{base64.b64encode(bytes(range(32, 64))).decode()}")
    assert ring.newest.id == "b"
    old = ring.find("a")
    assert old is not None
    derived = {ring.newest.derive("x"), ring.newest.derive("y"), old.derive("x")}
    assert len(derived) == 3
    assert all(len(key) == 32 for key in derived)
    assert ring.find("c") is None
    assert "secret" not in repr(ring)


def test_a_process_without_keys_says_so() -> None:
    with pytest.raises(KeyRingError, match="holds no keys"):
        _ = KeyRing(()).newest


@pytest.mark.django_db
def test_pages_are_stable_while_rows_come_and_go() -> None:
    made = [Tenant.objects.create(name=str(n)) for n in range(5)]
    asked = RequestFactory().get("/x", {"limit": "2"})
    first, cursor = page(Tenant.objects.all(), asked)
    assert [row.name for row in first] == ["4", "3"]
    Tenant.objects.create(name="new")
    made[3].delete()
    second, cursor = page(
        Tenant.objects.all(), RequestFactory().get("/x", {"limit": "2", "cursor": cursor or ""})
    )
    assert [row.name for row in second] == ["2", "1"]
    third, cursor = page(
        Tenant.objects.all(), RequestFactory().get("/x", {"limit": "2", "cursor": cursor or ""})
    )
    assert [row.name for row in third] == ["0"]
    assert cursor is None


@pytest.mark.django_db
@pytest.mark.parametrize(
    "query",
    [
        {"limit": "0"},
        {"limit": "101"},
        {"limit": "x"},
        {"limit": "-1"},
        {"limit": "٣"},
        {"cursor": "!"},
        {"cursor": "YQ"},
    ],
)
def test_a_bad_limit_or_cursor_is_refused(query: dict[str, str]) -> None:
    with pytest.raises(ValidationFailed):
        page(Tenant.objects.all(), RequestFactory().get("/x", query))


@pytest.mark.parametrize(
    "raw",
    [
        b"{", b'{"a": NaN}', b'{"a": 1, "a": 2}', b'{"a": "\\u0000"}', b'{"a": "\\ud800"}', b"\xff",
        b'{"a":' + b"[" * 40 + b"]" * 40 + b"}", b"[" * 100_000,
    ],
)  # fmt: skip
def test_json_that_is_not_strict_is_refused(raw: bytes) -> None:
    """SECURITY 9.11"""
    with pytest.raises(ValueError):
        strict_json(raw)


@pytest.mark.parametrize(
    "text",
    [
        "GET /v1/sessions/x/ws?token=eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
        "Authorization: Bearer e2a_live_abcdefghijklmnopqrstuvwxyz0123456789",
        "key e2a_test_abcdefghijklmnopqrstuvwxyz0123456789 used",
        "x-api-key: sk-ant-REALKEY123456",
        "sk-ant-REALKEY123456",
        "https://h/?after=3&access_token=REALKEY123456",
    ],
)
def test_credentials_do_not_pass_the_log(text: str) -> None:
    """SECURITY 2.7"""
    cleaned = scrub(text)
    for part in ("REALKEY", "abcdefghijklmnop", "c2lnbmF0dXJl", "eyJzdWIi"):
        assert part not in cleaned


def test_values_are_scrubbed_by_their_name_too() -> None:
    event: dict[str, Any] = {
        "event": "x",
        "password": "hunter2",
        "nested": {"api_key": "v", "ok": "fine"},
        "n": 3,
    }
    cleaned = scrub_event(None, "info", event)
    assert cleaned["password"] == "[scrubbed]"
    assert cleaned["nested"] == {"api_key": "[scrubbed]", "ok": "fine"}
    assert cleaned["n"] == 3


@pytest.mark.django_db(transaction=True)
def test_work_is_asked_for_after_commit_and_not_after_a_rollback(monkeypatch: pytest.MonkeyPatch) -> None:
    from celery import current_app

    from e2a.core.enqueue import enqueue

    sent: list[Any] = []
    task = current_app.tasks["sessions_app.tasks.turn_run"]
    monkeypatch.setattr(task, "apply_async", lambda **kwargs: sent.append(kwargs["kwargs"]))
    with pytest.raises(RuntimeError), transaction.atomic():
        enqueue("sessions_app.tasks.turn_run", session_id=1)
        raise RuntimeError
    with transaction.atomic():
        enqueue("sessions_app.tasks.turn_run", session_id=2)
        assert sent == []
    assert sent == [{"session_id": 2}]


def test_an_unknown_task_name_fails_at_once() -> None:
    from e2a.core.enqueue import enqueue

    with pytest.raises(KeyError):
        enqueue("sessions_app.tasks.no_such_task", session_id=1)

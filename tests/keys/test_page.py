"""The dashboard page of API keys."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.test import Client

from accounts.models import User
from keys.models import ApiKey
from keys.services import SCOPES, key_issue, key_revoke
from tests.fixtures import Api

pytestmark = pytest.mark.django_db


@pytest.fixture
def browser(alice: User) -> Client:
    client = Client(enforce_csrf_checks=True)
    client.force_login(alice)
    return client


def submit(browser: Client, fields: dict[str, Any], action: str = "/api-keys") -> Any:
    found = re.search(
        r'name="csrfmiddlewaretoken" value="([^"]+)"', browser.get("/api-keys").content.decode()
    )
    assert found is not None
    return browser.post(action, {"csrfmiddlewaretoken": found[1], **fields})


def test_a_key_is_made_shown_once_and_works(browser: Client) -> None:
    page = submit(browser, {"name": "my laptop", "lifetime": "30", "scopes": list(SCOPES)})
    found = re.search(r"e2a_live_[0-9A-Za-z]{36}", page.content.decode())
    assert found is not None
    assert "data-copy" in page.content.decode()
    assert page["Cache-Control"] == "no-store"
    assert Api(found[0]).get("/v1/me").status_code == 200
    again = browser.get("/api-keys").content.decode()
    assert found[0] not in again
    assert "my laptop" in again
    row = ApiKey.objects.get()
    assert row.expires_at is not None
    assert (row.expires_at - row.created_at).days in (29, 30)


def test_a_key_is_revoked_by_its_button(browser: Client, alice: User) -> None:
    issued = key_issue(user=alice)
    answer = submit(browser, {}, f"/api-keys/{issued.row.public_id}/revoke")
    assert (answer.status_code, answer["Location"]) == (302, "/api-keys")
    page = browser.get("/api-keys").content.decode()
    assert "is revoked" in page
    assert "/revoke" not in page
    assert Api(issued.key).get("/v1/me").status_code == 401


def test_a_strangers_key_is_neither_shown_nor_revoked(browser: Client, mallory: User) -> None:
    issued = key_issue(user=mallory, name="mallorys")
    assert "mallorys" not in browser.get("/api-keys").content.decode()
    assert submit(browser, {}, f"/api-keys/{issued.row.public_id}/revoke").status_code == 404
    assert Api(issued.key).get("/v1/me").status_code == 200


def test_9_3_changes_need_the_csrf_token_and_a_post(browser: Client, alice: User) -> None:
    issued = key_issue(user=alice)
    path = f"/api-keys/{issued.row.public_id}/revoke"
    assert browser.post("/api-keys", {"scopes": list(SCOPES)}).status_code == 403
    assert browser.post(path).status_code == 403
    assert browser.get(path).status_code == 405
    assert ApiKey.objects.get().is_live()


def test_a_name_with_markup_is_text(browser: Client, alice: User) -> None:
    key_issue(user=alice, name="<script>alert(1)</script>")
    assert "<script>alert" not in browser.get("/api-keys").content.decode()


def test_the_page_explains_what_is_wrong(browser: Client, alice: User) -> None:
    assert submit(browser, {"name": "x"}).status_code == 400, "no scope was chosen"
    for _ in range(20):
        key_issue(user=alice)
    page = submit(browser, {"scopes": list(SCOPES)})
    assert page.status_code == 429
    assert "20 live API keys" in page.content.decode()


def test_states_are_named(browser: Client, alice: User) -> None:
    key_revoke(key=key_issue(user=alice).row, actor=alice)
    key_issue(user=alice)
    page = browser.get("/api-keys").content.decode()
    assert "badge--revoked" in page
    assert "badge--active" in page

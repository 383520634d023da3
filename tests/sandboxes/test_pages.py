"""The dashboard's pages and the admin."""

from __future__ import annotations

from typing import Any

import pytest
from django.conf import settings
from django.test import Client

from sandboxes.models import Node, Sandbox, SandboxLogEntry
from tests.fixtures import Api
from tests.sandboxes.test_warm_and_cold import made


@pytest.fixture
def browser(alice: Any) -> Client:
    client = Client()
    client.force_login(alice)
    return client


def test_my_sandboxes_are_shown_and_can_be_destroyed(node_row: Node, as_alice: Api, browser: Client) -> None:
    assert "No sandbox lives" in browser.get("/sandboxes").content.decode()
    sandbox = made(as_alice, metadata={"who": "<b>me</b>"})["vm_id"]
    page = browser.get("/sandboxes").content.decode()
    assert sandbox in page
    assert "badge--creating" in page
    part = browser.get(
        "/sandboxes", headers={"HX-Request": "true", "HX-Target": "sandbox-table"}
    ).content.decode()
    assert sandbox in part
    assert "<html" not in part
    detail = browser.get(f"/sandboxes/{sandbox}").content.decode()
    assert "&lt;b&gt;me&lt;/b&gt;" in detail
    answer = browser.post(f"/sandboxes/{sandbox}/destroy", follow=True)
    assert "is being destroyed" in answer.content.decode()
    assert Sandbox.objects.get().death_reason == "user"
    assert sandbox not in browser.get("/sandboxes").content.decode().partition("is being destroyed")[2]
    assert sandbox in browser.get("/sandboxes?all=1").content.decode()
    assert "user" in browser.get(f"/sandboxes/{sandbox}").content.decode()


def test_a_strangers_page_is_missing(node_row: Node, as_alice: Api, mallory: Any) -> None:
    sandbox = made(as_alice)["vm_id"]
    client = Client()
    client.force_login(mallory)
    assert sandbox not in client.get("/sandboxes").content.decode()
    assert client.get(f"/sandboxes/{sandbox}").status_code == 404
    assert client.post(f"/sandboxes/{sandbox}/destroy").status_code == 404
    assert Sandbox.objects.get().state == "creating"


def test_pages_need_a_sign_in_and_get_changes_nothing(node_row: Node, as_alice: Api, browser: Client) -> None:
    sandbox = made(as_alice)["vm_id"]
    assert Client().get("/sandboxes").status_code == 302
    assert browser.get(f"/sandboxes/{sandbox}/destroy").status_code == 405
    assert browser.get("/sandboxes?cursor=!").status_code == 404


def test_the_admin_shows_every_model_and_destroys_by_the_same_service(
    node_row: Node, alice: Any, as_alice: Api, browser: Client
) -> None:
    sandbox = made(as_alice)["vm_id"]
    row = Sandbox.objects.get()
    entry = SandboxLogEntry.objects.create(
        sandbox=row,
        at=row.created_at,
        process_id="p",
        command="echo planted-command",
        output="planted-output",
    )
    type(alice).objects.filter(pk=alice.pk).update(is_staff=True, is_superuser=True)
    base = f"/{settings.E2A.admin_path}/sandboxes"
    shown = ""
    for name, pk in [
        ("node", node_row.pk),
        ("template", row.template_id),
        ("sandbox", row.pk),
        ("sandboxmove", row.moves.first().pk),  # type: ignore[union-attr]  # it has one
        ("sandboxlogentry", entry.pk),
    ]:
        for path in (f"{base}/{name}/", f"{base}/{name}/{pk}/change/"):
            answer = browser.get(path)
            assert answer.status_code == 200, path
            shown += answer.content.decode()
    assert sandbox in shown
    assert "planted" not in shown
    answer = browser.post(
        f"{base}/sandbox/", {"action": "destroy_selected", "_selected_action": [row.pk]}, follow=True
    )
    assert answer.status_code == 200
    row.refresh_from_db()
    assert (row.state, row.death_reason) == ("destroyed", "admin")

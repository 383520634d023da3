"""Pages and problems for what goes wrong, and the two probes (CONTRACT 1, SECURITY 9.11)."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
import redis
from django.db import OperationalError
from django.test import Client

from accounts.models import User
from e2a.core.clock import now
from sandboxes.models import Node, Template
from tests.fixtures import Api

pytestmark = pytest.mark.django_db


@pytest.fixture
def browser(alice: User) -> Client:
    client = Client(raise_request_exception=False)
    client.force_login(alice)
    return client


def test_a_missing_page_is_a_page_of_ours(browser: Client) -> None:
    for path in ("/nothing", "/sessions/ses_none", "/sandboxes/sbx_none", "/secrets/none"):
        answer = browser.get(path)
        assert answer.status_code == 404, path
        text = answer.content.decode()
        assert "There is nothing here." in text, path
        assert "Traceback" not in text


def test_a_missing_route_of_the_api_is_a_problem() -> None:
    for path in ("/v1/nothing", "/v1/", "/v1/sessions/", "/v1/../v1/nothing"):
        answer = Api().get(path)
        assert (answer.status_code, answer["Content-Type"]) == (404, "application/problem+json"), path
        assert answer.json()["request_id"].startswith("req_")


def test_a_failure_of_ours_says_nothing_but_an_id(
    browser: Client, as_alice: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("password=hunter2 at /etc/e2a")

    monkeypatch.setattr("sessions_app.views.sessions_of", broken)
    monkeypatch.setattr("sessions_app.api.sessions_of", broken)
    page = browser.get("/sessions")
    assert page.status_code == 500
    assert "It is our fault" in page.content.decode()
    answer = as_alice.get("/v1/sessions")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert answer.json()["request_id"].startswith("req_")
    for text in (page.content.decode(), answer.content.decode()):
        assert not [word for word in ("hunter2", "RuntimeError", "Traceback", "/etc/e2a") if word in text]


def test_wrong_methods_say_so(browser: Client, as_alice: Api) -> None:
    assert browser.get("/sign-out").status_code == 405
    answer = as_alice.put("/v1/sessions", {})
    assert (answer.status_code, answer.json()["code"]) == (405, "method_not_allowed")
    assert "GET" in answer["Allow"]


def test_healthz_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Client().get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def ready() -> tuple[int, dict[str, str]]:
    answer = Client().get("/readyz")
    return answer.status_code, answer.json()["checks"]


def test_readyz_is_200_with_a_database_a_broker_a_live_node_and_a_built_template(node_row: Node) -> None:
    assert ready() == (200, {"database": "ok", "broker": "ok", "node": "ok", "templates": "ok"})


def test_readyz_says_what_is_missing(node_row: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    Node.objects.update(heartbeat_at=now() - dt.timedelta(seconds=31))
    assert ready()[0] == 503
    assert "heartbeat" in ready()[1]["node"]
    Node.objects.update(heartbeat_at=now(), is_engine_up=False)
    assert "engine" in ready()[1]["node"]
    Node.objects.update(is_engine_up=True)
    Template.objects.update(image_id="")
    assert (ready()[0], ready()[1]["templates"]) == (503, "no template's image is built yet")

    def no_broker(*args: Any, **kwargs: Any) -> Any:
        raise redis.ConnectionError("unix:///secret/path refused")

    monkeypatch.setattr("redis.Redis.ping", no_broker)
    assert (ready()[0], ready()[1]["broker"]) == (503, "does not answer")


def test_readyz_without_a_database_does_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_database(*args: Any, **kwargs: Any) -> Any:
        raise OperationalError("password authentication failed for user e2a")

    monkeypatch.setattr("django.db.backends.base.base.BaseDatabaseWrapper.ensure_connection", no_database)
    status, checks = ready()
    assert status == 503
    assert checks == {"database": "does not answer", "broker": "ok"}

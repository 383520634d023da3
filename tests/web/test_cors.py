"""Which pages of other origins may read answers of `/v1` (SECURITY 9.4)."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client

pytestmark = pytest.mark.django_db

GOOD = "https://good.example"
WITH_PORT = "http://localhost:3000"
REFUSED = [
    "null",
    "https://evil-good.example",
    "https://good.example.evil.example",
    "https://sub.good.example",
    "https://good.example.",
    "https://good.examplex",
    "http://good.example",
    "https://good.example:444",
    "https://good.example:443",
    "https://good.example@evil.example",
    "https://evil.example#https://good.example",
    "http://localhost",
    "http://localhost:3001",
    "https://localhost:3000",
    "//good.example",
    "good.example",
    "file://",
    "*",
    "",
]


@pytest.fixture(autouse=True)
def embedding_origins(settings: Any) -> None:
    """As `E2A_EMBED_ORIGINS` sets it."""
    settings.CORS_ALLOWED_ORIGINS = [GOOD, WITH_PORT]


def allowed(answer: Any) -> str | None:
    value: str | None = answer.headers.get("Access-Control-Allow-Origin")
    return value


def preflight(path: str, origin: str) -> Any:
    return Client().options(
        path,
        headers={
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        },
    )


@pytest.mark.parametrize("origin", [GOOD, WITH_PORT])
def test_a_listed_origin_may_read_answers_and_errors(origin: str, alice_key: str) -> None:
    client, sent = Client(), {"Origin": origin, "Authorization": f"Bearer {alice_key}"}
    for path, status in (
        ("/v1/me", 200),
        ("/v1/sessions/none", 404),
        ("/v1/nothing", 404),
        ("/v1/sessions?limit=x", 400),
    ):
        answer = client.get(path, headers=sent)
        assert (answer.status_code, allowed(answer)) == (status, origin), path
        assert "origin" in answer["Vary"].lower(), path
        assert "x-request-id" in answer["Access-Control-Expose-Headers"]
    refused = client.get("/v1/me", headers={"Origin": origin})
    assert (refused.status_code, allowed(refused)) == (401, origin)


@pytest.mark.parametrize("origin", [GOOD, WITH_PORT])
def test_a_listed_origin_is_let_through_the_preflight(origin: str) -> None:
    answer = preflight("/v1/sessions", origin)
    assert (answer.status_code, allowed(answer)) == (200, origin)
    assert "authorization" in answer["Access-Control-Allow-Headers"]
    assert "origin" in answer["Vary"].lower()


@pytest.mark.parametrize("origin", REFUSED)
def test_every_other_origin_is_refused(origin: str, alice_key: str) -> None:
    answer = Client().get("/v1/me", headers={"Origin": origin, "Authorization": f"Bearer {alice_key}"})
    assert allowed(answer) is None
    assert "origin" in answer["Vary"].lower()
    assert allowed(preflight("/v1/sessions", origin)) is None


def test_credentials_are_never_allowed(alice_key: str) -> None:
    for answer in (
        Client().get("/v1/me", headers={"Origin": GOOD, "Authorization": f"Bearer {alice_key}"}),
        preflight("/v1/sessions", GOOD),
    ):
        assert "Access-Control-Allow-Credentials" not in answer.headers


@pytest.mark.parametrize("path", ["/", "/sign-in", "/sessions", "/healthz", "/v1"])
def test_only_the_api_is_shared(path: str) -> None:
    assert allowed(Client().get(path, headers={"Origin": GOOD})) is None


def test_without_the_setting_nobody_is_let_in(settings: Any, alice_key: str) -> None:
    settings.CORS_ALLOWED_ORIGINS = []
    for origin in (GOOD, "http://testserver", "null"):
        answer = Client().get("/v1/me", headers={"Origin": origin, "Authorization": f"Bearer {alice_key}"})
        assert allowed(answer) is None


def test_the_chat_script_may_be_loaded_from_anywhere() -> None:
    assert allowed(Client().get("/static/e2a/chat.js", headers={"Origin": "https://anybody.example"})) == "*"

"""What every kind of answer carries (SECURITY 9.1, 9.2, 9.10)."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.test import Client

from accounts.models import User
from tests.fixtures import Api

pytestmark = pytest.mark.django_db

STRICT = {
    "default-src": "'self'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data:",
    "connect-src": "'self' ws://localhost:* ws://127.0.0.1:*",
    "object-src": "'none'",
    "base-uri": "'none'",
    "form-action": "'self'",
    "frame-ancestors": "'none'",
}
PAGES = ["/", "/sessions", "/sessions/new", "/sandboxes", "/secrets", "/api-keys"]
OPEN = [
    "/sign-in",
    "/v1/docs",
    "/v1/openapi.json",
    "/healthz",
    "/readyz",
    "/no/such/page",
    "/v1/no/such/route",
    "/v1/me",
]


def policy(answer: Any) -> dict[str, str]:
    """The directives of the answer's one policy."""
    parts = [
        part.strip().partition(" ") for part in answer["Content-Security-Policy"].split(";") if part.strip()
    ]
    return {name: value for name, _, value in parts}


def check_common(answer: Any, path: str) -> None:
    assert answer["X-Content-Type-Options"] == "nosniff", path
    assert answer["Referrer-Policy"] == "same-origin", path
    assert answer["Cross-Origin-Opener-Policy"] == "same-origin", path


def check(answer: Any, path: str) -> None:
    check_common(answer, path)
    assert "camera=()" in answer["Permissions-Policy"], path
    assert answer["X-Frame-Options"] == "DENY", path
    assert policy(answer) == STRICT, path


@pytest.fixture
def browser(alice: User) -> Client:
    client = Client(raise_request_exception=False)
    client.force_login(alice)
    return client


@pytest.mark.parametrize("path", PAGES)
def test_a_page_has_the_strict_policy_and_is_not_kept(browser: Client, path: str) -> None:
    answer = browser.get(path)
    assert answer.status_code == 200
    check(answer, path)
    assert "no-store" in answer["Cache-Control"]


@pytest.mark.parametrize("path", OPEN)
def test_what_anyone_may_ask_for_has_the_same_headers(path: str) -> None:
    check(Client().get(path), path)


def test_failures_have_them_too(browser: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    strict = Client(enforce_csrf_checks=True)
    for status, answer in (
        (403, strict.post("/sign-in", {"email": "a@example.com"})),
        (405, browser.get("/sign-out")),
        (404, browser.get("/sandboxes/sbx_none")),
    ):
        assert answer.status_code == status
        check(answer, str(status))

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("boom")

    monkeypatch.setattr("sessions_app.views.sessions_of", broken)
    answer = browser.get("/sessions")
    assert answer.status_code == 500
    check(answer, "500")


def test_only_the_admin_has_a_wider_policy_and_it_is_as_narrow_as_unfold_lets_it_be(
    desk: Client, admin_path: str
) -> None:
    wider = STRICT | {"script-src": "'self' 'unsafe-eval'", "style-src": "'self' 'unsafe-inline'"}
    for path in (
        f"{admin_path}/",
        f"{admin_path}/accounts/tenant/",
        f"{admin_path}/login/?next=/",
        f"{admin_path}/none",
    ):
        answer = desk.get(path)
        assert policy(answer) == wider, path
        check_common(answer, path)
        assert answer["X-Frame-Options"] == "DENY", path
    for path in (admin_path, f"{admin_path}x/", f"{admin_path}-guide/", "/sign-in"):
        assert policy(desk.get(path)) == STRICT, path


def test_the_admins_pages_are_not_kept(desk: Client, admin_path: str) -> None:
    assert "no-store" in desk.get(f"{admin_path}/accounts/user/")["Cache-Control"]


def test_answers_of_the_api_are_not_kept(as_alice: Api, things: dict[str, str]) -> None:
    for path in (
        "/v1/me",
        "/v1/sessions",
        "/v1/sandboxes",
        "/v1/templates",
        "/v1/tenants/me/secrets",
        "/v1/sessions/none",
    ):
        answer = as_alice.get(path)
        check(answer, path)
        assert "no-store" in answer["Cache-Control"], path
    assert "no-store" in Api("e2a_live_wrong").get("/v1/me")["Cache-Control"]


def test_static_files_say_what_they_are(client: Client) -> None:
    for path, kind in (("/static/e2a/chat.js", "text/javascript"), ("/static/e2a/app.css", "text/css")):
        answer = client.get(path)
        assert answer.status_code == 200
        assert answer["Content-Type"].startswith(kind)
        check_common(answer, path)


def test_in_production_cookies_are_host_only_and_tls_is_remembered() -> None:
    """The settings of production, read in a process of their own."""
    import json
    import os
    import subprocess
    import sys
    import tempfile

    from tests.live import ROOT

    names = (
        "SESSION_COOKIE_NAME", "SESSION_COOKIE_SECURE", "SESSION_COOKIE_HTTPONLY", "SESSION_COOKIE_SAMESITE",
        "CSRF_COOKIE_NAME", "CSRF_COOKIE_SECURE", "SECURE_SSL_REDIRECT", "SECURE_HSTS_SECONDS", "ALLOWED_HOSTS",
        "DEBUG",
    )  # fmt: skip
    program = f"import json; from django.conf import settings as s; print(json.dumps([getattr(s, n) for n in {names}]))"
    key = "a2V5a2V5a2V5a2V5a2V5a2V5a2V5a2V5a2V5a2V5a2U="
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "DJANGO_SETTINGS_MODULE": "e2a.settings", "E2A_ENV": "production", "E2A_DATA_DIR": folder,
            "E2A_PUBLIC_URL": "https://e2a.example.com", "SECRET_KEY": key, "E2A_VAULT_KEYS": f"a:{key}",
            "E2A_SIGNING_KEYS": f"a:{key}", "E2A_NODE_KEY": key,
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    assert dict(zip(names, json.loads(done.stdout), strict=True)) == {
        "SESSION_COOKIE_NAME": "__Host-e2a-session", "SESSION_COOKIE_SECURE": True, "SESSION_COOKIE_HTTPONLY": True,
        "SESSION_COOKIE_SAMESITE": "Lax", "CSRF_COOKIE_NAME": "__Host-e2a-csrf", "CSRF_COOKIE_SECURE": True,
        "SECURE_SSL_REDIRECT": True, "SECURE_HSTS_SECONDS": 31536000,
        "ALLOWED_HOSTS": ["e2a.example.com"], "DEBUG": False,
    }  # fmt: skip


@pytest.mark.parametrize("path", [*PAGES, "/sign-in", "/v1/docs", "/no/such/page"])
def test_pages_have_nothing_that_their_policy_forbids_or_that_is_elsewhere(
    browser: Client, path: str
) -> None:
    html = browser.get(path).content.decode()
    assert not re.search(r"<script(?![^>]*\bsrc=)[^>]*>\s*\S", html), "an inline script"
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=\"", html), "an inline style or handler"
    loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*\b(?:src|href)=\"([^\"]+)\"", html)
    assert [url for url in loaded if not url.startswith("/")] == []

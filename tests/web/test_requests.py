"""What a browser can be made to send: forged posts, cookies at the API, redirects, hosts (SECURITY 9.3, 9.7)."""

from __future__ import annotations

from typing import Any
from urllib.parse import urljoin, urlsplit

import pytest
from django.conf import settings as django_settings
from django.contrib.sessions.models import Session as BrowserSession
from django.core import mail
from django.core.management import call_command
from django.test import Client
from django.urls import URLPattern, URLResolver, get_resolver

from accounts.models import LoginFlow, User
from e2a.core.models import AuditEvent
from tests.fixtures import Api

pytestmark = pytest.mark.django_db

PAGE_POSTS = {
    "/sign-in": {"email": "a@example.com"},
    "/sign-in/code": {"code": "123456"},
    "/sign-out": {},
    "/api-keys": {"name": "x"},
    "/api-keys/{key_id}/revoke": {},
    "/secrets": {"name": "x"},
    "/secrets/{name}/values": {"name": "A", "value": "b"},
    "/secrets/{name}/values/remove": {"name": "TOKEN"},
    "/secrets/{name}/rollback": {"version": "1"},
    "/secrets/{name}/delete": {},
    "/sessions/new": {"agent": "shell"},
    "/sessions/{session_id}/token": {},
    "/sessions/{session_id}/end": {},
    "/sessions/{session_id}/life/extend": {},
    "/sessions/{session_id}/life/pause": {},
    "/sessions/{session_id}/life/resume": {},
    "/sandboxes/{sandbox_id}/destroy": {},
    "/sandboxes/{sandbox_id}/token": {},
    "/sandboxes/{sandbox_id}/extend": {},
    "/sandboxes/{sandbox_id}/egress/allow": {"host": "a.example.com", "port": "443"},
    "/sandboxes/{sandbox_id}/pause": {},
    "/sandboxes/{sandbox_id}/resume": {},
    "/sandboxes/{sandbox_id}/snapshot": {"name": "x"},
    "/snapshots/{snapshot_id}/start": {},
    "/snapshots/{snapshot_id}/delete": {},
    "/workspaces/delete": {"name": "alices"},
    "/sandboxes/{sandbox_id}/preview": {"port": "8000"},
    "/{admin}/login/": {"username": "a@example.com", "password": "x"},
    "/{admin}/logout/": {},
    "/{admin}/accounts/tenant/": {"action": "suspend"},
}
OTHERS_PARAMETERS = {
    "key_id": "key_x",
    "name": "alices",
    "session_id": "ses_x",
    "sandbox_id": "sbx_x",
    "job_id": "job_x",
    "snapshot_id": "snp_x",
    "preview_id": "prv_x",
}


def dump() -> list[str]:
    """Every row of every table but the audit trail and the browser sessions, as text."""
    import io

    out = io.StringIO()
    call_command(
        "dumpdata", exclude=["core.auditevent", "sessions", "contenttypes", "auth.permission"], stdout=out
    )
    return out.getvalue().split("}, {")


@pytest.fixture
def strict(alice: User, settings: Any) -> Client:
    """A signed-in browser that another site makes post, without a CSRF token."""
    settings.EMAIL_BACKEND = "accounts.mail.FolderBackend"  # The development page of mails is there.
    User.objects.filter(pk=alice.pk).update(is_staff=True, is_superuser=True)
    client = Client(enforce_csrf_checks=True)
    client.force_login(User.objects.get(pk=alice.pk))
    return client


def page_routes(patterns: Any = None, prefix: str = "/") -> list[str]:
    """Every path of the dashboard, from the URL configuration itself."""
    found = []
    for entry in get_resolver().url_patterns if patterns is None else patterns:
        path = prefix + str(entry.pattern)
        if isinstance(entry, URLResolver):
            if not path.startswith(("/v1/", f"/{django_settings.E2A.admin_path}/")):
                found += page_routes(entry.url_patterns, path)
        elif isinstance(entry, URLPattern):
            found.append(path.replace("<str:", "{").replace("<slug:", "{").replace(">", "}"))
    return found


def test_9_3_a_post_with_a_cookie_needs_the_csrf_token(strict: Client, things: dict[str, str]) -> None:
    before = dump()
    for path, fields in PAGE_POSTS.items():
        answer = strict.post(path.format(admin=django_settings.E2A.admin_path, **things), fields)
        assert answer.status_code == 403, path
        assert "expired" in answer.content.decode(), path
    assert dump() == before


def test_9_3_the_table_above_has_every_page_that_takes_a_post(alice: User, things: dict[str, str]) -> None:
    for path in page_routes():
        client = Client()
        client.force_login(alice)
        answer = client.post(path.format(**things))
        if answer.status_code != 405 and path not in ("/healthz", "/readyz", "/"):
            assert path in PAGE_POSTS, path


def test_9_3_get_and_head_change_nothing(strict: Client, things: dict[str, str]) -> None:
    before, sessions = dump(), BrowserSession.objects.count()
    audited = AuditEvent.objects.count()
    for path in [*page_routes(), *(path for path in PAGE_POSTS if "{admin}" not in path)]:
        for method in (strict.get, strict.head):
            answer = method(path.format(**things))
            assert answer.status_code in (200, 302, 405, 503), path
    assert dump() == before
    assert AuditEvent.objects.count() == audited
    assert BrowserSession.objects.count() == sessions


def test_9_3_a_cookie_never_authenticates_the_api(
    strict: Client, openapi: dict[str, Any], things: dict[str, str]
) -> None:
    before = dump()
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            if "security" not in operation:
                continue
            answer = strict.generic(
                method.upper(), path.format(**things), b"{}", content_type="application/json"
            )
            assert answer.status_code == 401, f"{method} {path}"
            assert answer.json()["code"] == "invalid_token", f"{method} {path}"
    assert dump() == before


def test_9_3_the_api_sets_and_reads_no_cookie(alice: User, alice_key: str, mallory: User) -> None:
    client = Client()
    client.force_login(mallory)
    answer = client.get("/v1/me", headers={"Authorization": f"Bearer {alice_key}"})
    assert answer.json()["email"] == "alice@example.com"
    assert not answer.cookies
    login = Client(enforce_csrf_checks=True).post(
        "/v1/auth/login", {"email": "a@example.com"}, content_type="application/json"
    )
    assert (login.status_code, len(login.cookies)) == (200, 0)


NEXT = {
    "/sessions": "/sessions",
    "/sandboxes?all=1": "/sandboxes?all=1",
    "//evil.example": "/",
    "///evil.example": "/",
    "/\\evil.example": "/",
    "\\\\evil.example": "/",
    "https:evil.example": "/",
    "https://evil.example": "/",
    "https:///evil.example": "/",
    "/%09/evil.example": "/%09/evil.example",
    "\t//evil.example": "/",
    "/\t/evil.example": "/",
    "/\n/evil.example": "/",
    "%09//evil.example": "/",
    "javascript:alert(1)": "/",
    "data:text/html,x": "/",
    "evil.example": "/",
    "http://testserver/sessions": "/",
    "@evil.example": "/",
    "": "/",
}


@pytest.mark.parametrize(("wanted", "goes_to"), NEXT.items())
def test_9_7_next_leads_to_this_site_only(alice: User, wanted: str, goes_to: str) -> None:
    client = Client()
    client.force_login(alice)
    assert client.get("/sign-in", {"next": wanted})["Location"] == goes_to
    assert client.post("/sign-in", {"next": wanted})["Location"] == goes_to


@pytest.mark.parametrize("wanted", [name for name, target in NEXT.items() if target == "/" and name])
def test_9_7_the_admins_next_does_too(operator: User, admin_path: str, wanted: str) -> None:
    client = Client()
    client.force_login(operator)
    location = client.post(f"{admin_path}/login/", {"next": wanted})["Location"]
    assert urlsplit(urljoin("http://testserver/", location)).netloc == "testserver", location


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "testserver.evil.example",
        "localhost@evil.example",
        "localhost:80:80",
        "a b",
        "testserver\t",
    ],
)
@pytest.mark.parametrize("path", ["/sign-in", "/v1/me", "/v1/openapi.json", "/no/such/page"])
def test_9_7_another_host_is_refused(host: str, path: str) -> None:
    answer = Client().get(path, headers={"Host": host})
    assert answer.status_code == 400
    body = answer.content.decode()
    assert host not in body
    if path.startswith("/v1/"):
        assert answer["Content-Type"] == "application/problem+json"


def test_9_7_no_address_is_taken_from_a_forwarded_host(as_alice: Api, alice: User) -> None:
    client = Client()
    client.force_login(alice)
    page = client.get("/", headers={"X-Forwarded-Host": "evil.example", "Forwarded": "host=evil.example"})
    assert "evil.example" not in page.content.decode()


def test_9_7_a_mail_never_names_the_host_of_its_request(client: Client) -> None:
    from accounts.tasks import login_code_send

    client.post(
        "/v1/auth/login",
        {"email": "n@example.com"},
        content_type="application/json",
        headers={"Host": "localhost:81"},
    )
    login_code_send(flow_id=LoginFlow.objects.latest("pk").pk)
    newest = mail.outbox[-1]
    assert newest.to == ["n@example.com"]
    assert "localhost:81" not in str(newest.message())

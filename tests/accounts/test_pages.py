"""The sign-in pages, without a script (CONTRACT 1, SECURITY 1.10, 1.13, 9.3, 9.7)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import time_machine
from django.test import Client

from accounts.mail import mail_send
from accounts.models import LoginFlow, SignIn, User
from accounts.services import tenant_suspend
from accounts.views import safe_next
from e2a.core.clock import now
from tests.accounts.mailbox import mailed_code, wrong

pytestmark = pytest.mark.django_db


@pytest.fixture
def browser() -> Client:
    """Strict about CSRF, as a browser meets it."""
    return Client(enforce_csrf_checks=True)


def submit(browser: Client, page: str, fields: dict[str, str], action: str | None = None) -> Any:
    """Load the page and send its form, with the CSRF token that stands in it."""
    html = browser.get(page).content.decode()
    found = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', html)
    assert found is not None, html
    return browser.post(action or page, {"csrfmiddlewaretoken": found[1], **fields})


def sign_in(browser: Client, email: str, next_page: str = "") -> Any:
    answer = submit(browser, "/sign-in", {"email": email, "next": next_page})
    assert (answer.status_code, answer["Location"]) == (302, "/sign-in/code")
    return submit(browser, "/sign-in/code", {"code": mailed_code(LoginFlow.objects.latest("pk").login_id)})


def test_a_person_signs_in_by_code_and_lands_where_they_wanted(browser: Client) -> None:
    assert browser.get("/api-keys")["Location"] == "/sign-in?next=/api-keys"
    answer = sign_in(browser, "new@example.com", "/api-keys")
    assert (answer.status_code, answer["Location"]) == (302, "/api-keys")
    page = browser.get("/api-keys")
    assert page.status_code == 200
    assert "new@example.com" in page.content.decode()


def test_the_page_takes_only_the_code_of_its_own_flow_1_10(browser: Client) -> None:
    other = Client()
    submit(other, "/sign-in", {"email": "a@example.com"})
    others_code = mailed_code(LoginFlow.objects.latest("pk").login_id)
    submit(browser, "/sign-in", {"email": "a@example.com"})
    answer = submit(browser, "/sign-in/code", {"code": others_code})
    assert answer.status_code == 401
    assert "not valid" in answer.content.decode()
    assert "sessionid" not in answer.cookies


def test_signing_in_rotates_the_session_id_1_13(browser: Client) -> None:
    submit(browser, "/sign-in", {"email": "a@example.com"})
    before = browser.cookies["e2a-session"].value
    submit(browser, "/sign-in/code", {"code": mailed_code(LoginFlow.objects.latest("pk").login_id)})
    after = browser.cookies["e2a-session"].value
    assert before != after
    stolen = Client()
    stolen.cookies["e2a-session"] = before
    assert stolen.get("/api-keys").status_code == 302


def test_9_3_each_step_needs_its_csrf_token(browser: Client, alice: User) -> None:
    assert browser.post("/sign-in", {"email": "a@example.com"}).status_code == 403
    assert browser.post("/sign-in/code", {"code": "123456"}).status_code == 403
    browser.force_login(alice)
    assert browser.post("/sign-out").status_code == 403
    assert not LoginFlow.objects.exists()


def test_sign_out_ends_the_session_and_its_sign_in(browser: Client) -> None:
    sign_in(browser, "a@example.com")
    assert browser.get("/sign-out").status_code == 405, "GET changes nothing"
    assert browser.get("/api-keys").status_code == 200
    answer = submit(browser, "/api-keys", {}, action="/sign-out")
    assert (answer.status_code, answer["Location"]) == (302, "/sign-in")
    assert browser.get("/api-keys").status_code == 302
    assert SignIn.objects.get().end_reason == "logout"


def test_a_suspended_tenant_is_signed_out_of_its_pages(browser: Client) -> None:
    sign_in(browser, "a@example.com")
    tenant_suspend(tenant=User.objects.get().tenant, actor="test")
    assert browser.get("/api-keys").status_code == 302


def test_another_code_within_a_minute_is_not_sent_but_the_first_still_works(browser: Client) -> None:
    submit(browser, "/sign-in", {"email": "a@example.com"})
    code = mailed_code(LoginFlow.objects.latest("pk").login_id)
    answer = submit(browser, "/sign-in/code", {"email": "a@example.com"}, action="/sign-in")
    assert answer["Location"] == "/sign-in/code"
    assert "on its way" in browser.get("/sign-in/code").content.decode()
    assert LoginFlow.objects.count() == 1
    assert submit(browser, "/sign-in/code", {"code": code}).status_code == 302


def test_1_2_another_code_kills_the_first_of_the_same_page(browser: Client) -> None:
    with time_machine.travel(now(), tick=False) as clock:
        submit(browser, "/sign-in", {"email": "a@example.com"})
        first = mailed_code(LoginFlow.objects.latest("pk").login_id)
        clock.shift(61)
        submit(browser, "/sign-in/code", {"email": "a@example.com"}, action="/sign-in")
        assert [flow.close_reason for flow in LoginFlow.objects.order_by("pk")] == ["replaced", ""]
        second = mailed_code(LoginFlow.objects.latest("pk").login_id)
        assert first == second or submit(browser, "/sign-in/code", {"code": first}).status_code == 401
        assert submit(browser, "/sign-in/code", {"code": second}).status_code == 302


def test_1_6_a_browser_that_signed_in_before_has_two_codes_kept_for_it(browser: Client) -> None:
    sign_in(browser, "a@example.com")
    submit(browser, "/api-keys", {}, action="/sign-out")
    stranger = Client()
    for _ in range(4):
        assert (
            stranger.post("/v1/auth/login", {"email": "a@example.com"}, "application/json").status_code == 200
        )
    assert stranger.post("/v1/auth/login", {"email": "a@example.com"}, "application/json").status_code == 429
    assert sign_in(browser, "a@example.com").status_code == 302
    page = submit(stranger, "/sign-in", {"email": "a@example.com"})
    assert page.status_code == 429
    assert int(page["Retry-After"]) > 0


def test_a_wrong_code_says_so_and_the_page_stays(browser: Client) -> None:
    submit(browser, "/sign-in", {"email": "a@example.com"})
    code = mailed_code(LoginFlow.objects.latest("pk").login_id)
    page = submit(browser, "/sign-in/code", {"code": wrong(code)})
    assert page.status_code == 401
    assert page["Cache-Control"] == "no-store"
    assert submit(browser, "/sign-in/code", {"code": f" {code[:3]} {code[3:]} "}).status_code == 302


def test_a_bad_address_is_explained_on_the_page(browser: Client) -> None:
    page = submit(browser, "/sign-in", {"email": "no address"})
    assert page.status_code == 200
    assert "not a mail address" in page.content.decode()


def test_the_code_page_without_a_flow_leads_to_the_first_step(browser: Client) -> None:
    assert browser.get("/sign-in/code")["Location"] == "/sign-in"


@pytest.mark.parametrize(
    "target",
    [
        "//evil.example", "/\\evil.example", "\\\\evil.example", "https:evil.example", "https://evil.example",
        "%09//evil.example", "\t//evil.example", "/\t/evil.example", "javascript:alert(1)",
        "///evil.example", "",
        "evil.example", " //evil.example", "/\n/evil.example", "http:///evil.example", "/\x00", None,
    ],
)  # fmt: skip
def test_9_7_next_is_a_path_of_this_site_or_the_start_page(target: str | None) -> None:
    assert safe_next(target) == "/"


def test_9_7_a_path_of_this_site_is_kept(browser: Client) -> None:
    assert safe_next("/sessions/ses_x?tab=files#end") == "/sessions/ses_x?tab=files#end"
    assert sign_in(browser, "a@example.com", "//evil.example")["Location"] == "/"


@pytest.fixture
def mail_folder(settings: Any, tmp_path: Path) -> Path:
    settings.EMAIL_BACKEND = "accounts.mail.FolderBackend"
    settings.EMAIL_FILE_PATH = str(tmp_path / "mail")
    return tmp_path / "mail"


def test_in_development_the_mail_page_and_the_console_show_the_code(
    mail_folder: Path, browser: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(browser, "/sign-in", {"email": "a@example.com"})
    assert "/dev-mail" in browser.get("/sign-in/code").content.decode()
    from accounts.tasks import login_code_send

    login_code_send(LoginFlow.objects.get().pk)
    page = Client().get("/dev-mail").content.decode()
    found = re.search(r"^    (\d{6})$", page, re.MULTILINE)
    assert found is not None, page
    assert found[1] in capsys.readouterr().out
    files = list(mail_folder.iterdir())
    assert len(files) == 1
    assert files[0].suffix == ".eml"
    assert files[0].stat().st_mode & 0o777 == 0o600
    assert re.findall(r"\b\d{6}\b", files[0].read_text()) == [found[1]], "a program can find the code too"
    assert submit(browser, "/sign-in/code", {"code": found[1]}).status_code == 302


def test_the_mail_page_shows_markup_as_text(mail_folder: Path) -> None:
    mail_send(to="a@example.com", subject="<script>alert(1)</script>", text="<img src=x onerror=alert(1)>")
    page = Client().get("/dev-mail").content.decode()
    assert "<script>alert" not in page
    assert "<img src=x" not in page


def test_in_production_there_is_no_mail_page_and_nothing_on_the_console(
    mail_folder: Path, in_production: None, capsys: pytest.CaptureFixture[str]
) -> None:
    mail_send(to="a@example.com", subject="s", text="t")
    assert Client().get("/dev-mail", secure=True).status_code == 404
    assert capsys.readouterr().out == ""
    assert len(list(mail_folder.iterdir())) == 1


def test_there_is_no_mail_page_when_mail_goes_elsewhere() -> None:
    assert Client().get("/dev-mail").status_code == 404

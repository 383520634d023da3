"""The operators' site works in a browser under its own policy, from the command line's second factor to an action."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from django_otp.oath import totp
from playwright.sync_api import Browser, expect

from tests.browser.dashboard import OVERFLOW, dashboard
from tests.live import ROOT, LiveStack

pytestmark = [pytest.mark.browser, pytest.mark.docker]

EMAIL, PASSWORD = "operator@example.com", "correct horse battery staple"


def manage(live: LiveStack, *arguments: str) -> str:
    """A command on the live installation."""
    done = subprocess.run(
        [sys.executable, "manage.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"E2A_DATA_DIR": str(live.data_dir), "DJANGO_SUPERUSER_PASSWORD": PASSWORD},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_operator_signs_in_with_both_factors_and_ends_a_session(
    browser: Browser, live: LiveStack, tmp_path: Path
) -> None:
    manage(live, "createsuperuser", "--noinput", "--email", EMAIL)
    shown = re.search(r"^otpauth://\S+", manage(live, "admin_totp", EMAIL, "--replace"), re.MULTILINE)
    assert shown is not None
    secret = base64.b32decode(parse_qs(urlsplit(shown[0]).query)["secret"][0])
    token = live.sign_in("watched@example.com")
    made = live.request("POST", "/v1/sessions", {"agent": {"kind": "shell"}, "user_id": "u1"}, token=token)
    session = made.json()["chat_session_id"]

    folder = Path(os.environ.get("TEST_PICTURES") or tmp_path)
    with dashboard(browser, live) as person:
        page = person.page
        person.open("/admin/sessions_app/session/")
        page.screenshot(path=folder / "admin-login.png")
        page.get_by_label("Mail address").or_(page.get_by_label("Email")).fill(EMAIL)
        page.get_by_label("Password").fill(PASSWORD)
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_text("A valid code of your authenticator is needed")).to_be_visible()
        page.get_by_label("Password").fill(PASSWORD)
        page.get_by_label("Code of your authenticator").fill(f"{totp(secret):06d}")
        page.get_by_role("button", name="Sign in").click()

        row = page.get_by_role("row").filter(has_text=session)
        expect(row).to_contain_text("Idle")
        page.screenshot(path=folder / "admin-list.png")
        assert page.evaluate(OVERFLOW) <= 0
        row.get_by_role("checkbox").check()
        page.get_by_label("Select action to run").select_option(label="End (and destroy the sandbox)")
        page.get_by_role("button", name="Run").click()
        expect(page.get_by_text("1 ended.")).to_be_visible()
        person.open("/admin/")
        expect(page.get_by_role("link", name="Audit events").first).to_be_visible()
        page.screenshot(path=folder / "admin-index.png")
        assert person.complaints == []
        assert person.hosts == {f"127.0.0.1:{live.port}"}
    assert live.request("GET", f"/v1/sessions/{session}", token=token).json()["end_reason"] == "admin"

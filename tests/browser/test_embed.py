"""The page of docs/how-to/embed-example.html, on another origin, shows a real session."""

from __future__ import annotations

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.chat_harness.chat import chat_in
from tests.browser.chat_harness.pages import ROOT, Site
from tests.live import LiveStack

pytestmark = [pytest.mark.browser, pytest.mark.docker]

EXAMPLE = ROOT / "docs" / "how-to" / "embed-example.html"


def test_the_example_page_embeds_a_live_chat(browser: Browser, host: Site, live: LiveStack) -> None:
    key = live.api_key("embedder@example.com")
    made = live.request(
        "POST", "/v1/sessions", {"agent": {"kind": "shell"}, "user_id": "u1"}, token=key
    ).json()
    page_text = EXAMPLE.read_text()
    assert "http://127.0.0.1:8000/static/e2a/chat.js" in page_text
    host.pages["/"] = page_text.replace("http://127.0.0.1:8000", live.url)
    host.policy = None  # The example has its script and style in the page.
    assert host.origin != live.url

    with chat_in(browser) as chat:
        chat.page.goto(host.origin + "/")
        chat.page.get_by_label("connect_url").fill(made["connect_url"])
        chat.page.get_by_label("jwt").fill(made["jwt"])
        chat.page.get_by_role("button", name="Open the chat").click()
        chat.wait_connection("live")
        chat.find("textarea").fill("echo from another origin")
        chat.page.keyboard.press("Enter")
        expect(chat.find(".output .stdout")).to_have_text("from another origin\n")
        assert chat.complaints == []
        assert {url.split("/")[2] for url in chat.requests} <= {
            f"127.0.0.1:{live.port}",
            host.origin.split("/")[2],
        }
        assert chat.page.context.cookies(live.url) == [], "the embed has no cookie of ours"

    assert live.request("DELETE", f"/v1/sessions/{made['chat_session_id']}", token=key).status == 200


def test_no_page_of_ours_can_be_framed_elsewhere(browser: Browser, host: Site, live: LiveStack) -> None:
    host.policy = None
    for path in ("/sign-in", "/v1/docs", "/admin/login/"):
        host.pages["/"] = f'<!doctype html><title>Frame</title><iframe src="{live.url}{path}"></iframe>'
        with chat_in(browser) as chat:
            chat.page.goto(host.origin + "/")
            chat.page.wait_for_load_state("networkidle")
            assert any("frame-ancestors" in text for text in chat.complaints), (path, chat.complaints)

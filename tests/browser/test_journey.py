"""The whole product, as a person in a browser meets it: from the mailed code to a destroyed sandbox."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.dashboard import Dashboard, dashboard
from tests.live import LiveStack, wait_for

pytestmark = [pytest.mark.browser, pytest.mark.docker]


@pytest.fixture
def person(browser: Browser, live: LiveStack) -> Iterator[Dashboard]:
    """Somebody new; the test fails when a page complained or spoke to anybody but us."""
    with dashboard(browser, live) as page:
        yield page
        assert page.complaints == []
        assert page.hosts == {f"127.0.0.1:{live.port}"}


def test_a_newcomer_gets_from_the_mailed_code_to_an_agents_output_and_cleans_up(
    person: Dashboard, live: LiveStack
) -> None:
    page = person.page
    person.accept_questions()
    person.sign_in("journey@example.com")

    # A key, shown once.
    page.get_by_role("link", name="API keys", exact=True).click()
    page.get_by_label("Name").fill("journey")
    page.get_by_role("button", name="Make the key").click()
    shown = page.locator("section[aria-labelledby=issued] code")
    expect(shown).to_have_text(re.compile(r"^e2a_live_\w{30,}$"))
    key = str(shown.text_content())
    page.locator("section[aria-labelledby=issued]").get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == key
    assert live.request("GET", "/v1/me", token=key).json()["email"] == "journey@example.com"
    page.get_by_role("link", name="API keys", exact=True).click()
    expect(page.get_by_role("row").filter(has_text="journey")).to_contain_text("active")
    assert key not in page.content()

    # A bundle, never shown.
    page.get_by_role("link", name="Secrets", exact=True).click()
    page.get_by_label("Name", exact=True).first.fill("journey")
    page.locator("input[type=password], textarea").first.fill("sk-ant-journey-secret")
    page.get_by_role("button", name="Make the bundle").click()
    expect(page.get_by_role("status")).to_contain_text("journey")
    assert "sk-ant-journey-secret" not in page.content()

    # A session, a command, its output.
    page.get_by_role("link", name="Sessions", exact=True).click()
    page.get_by_role("link", name="Start a session").first.click()
    page.get_by_label("Agent").select_option("shell")
    page.get_by_role("button", name="Start", exact=True).click()
    person.wait_connection("live")
    person.send("echo $((40 + 2)) > /workspace/answer && cat /workspace/answer")
    expect(person.output()).to_have_text("42\n")

    # The server goes away and comes back: so does the chat, and nothing is lost or doubled.
    person.is_interrupted = True
    person.send("for i in 1 2 3 4 5 6; do echo line $i; sleep 0.5; done")
    expect(person.output().last).to_contain_text("line 1")
    live.kill("web")
    person.wait_connection("connecting", "waiting", "offline", "replaying")
    person.wait_connection("live")
    person.is_interrupted = False
    expect(person.output().last).to_have_text("".join(f"line {i}\n" for i in range(1, 7)))
    person.send("cat answer")
    expect(person.output().last).to_have_text("42\n")
    session_url = page.url

    # Its sandbox is listed; ending the session ends it.
    page.get_by_role("link", name="Sandboxes", exact=True).click()
    expect(page.get_by_role("row").filter(has_text="running")).to_have_count(1)
    page.goto(session_url)
    expect(person.output().first).to_have_text("42\n")
    page.get_by_role("button", name="End session").click()
    expect(page.get_by_role("status")).to_contain_text("ended")
    page.goto(session_url)
    expect(page.get_by_text("echo $((40 + 2))")).to_be_visible()

    # A sandbox of one's own, destroyed from its page.
    made = live.request("POST", "/v1/sandboxes", {"metadata": {"for": "journey"}}, token=key).json()[
        "sandbox_id"
    ]
    page.get_by_role("link", name="Sandboxes", exact=True).click()
    page.get_by_role("link", name=made).click()
    expect(page.get_by_text("journey", exact=True)).to_be_visible()
    page.get_by_role("button", name="Destroy").click()
    expect(page.get_by_role("status")).to_contain_text("being destroyed")
    wait_for(
        lambda: live.request("GET", f"/v1/sandboxes/{made}", token=key).json()["state"] == "destroyed",
        what=f"{made} destroyed",
    )

    # The key is revoked, and out.
    page.get_by_role("link", name="API keys", exact=True).click()
    page.get_by_role("row").filter(has_text="journey").get_by_role("button", name="Revoke").click()
    expect(page.get_by_role("row").filter(has_text="journey")).to_contain_text("revoked")
    assert live.request("GET", "/v1/me", token=key).status == 401
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    page.goto(session_url)
    assert page.url.startswith(f"{live.url}/sign-in?next=/sessions/")

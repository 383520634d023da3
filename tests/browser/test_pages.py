"""Every page at 360 and 1440 pixels, light and dark: nothing runs over, nothing complains, the keyboard is enough."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.dashboard import OVERFLOW, Dashboard, dashboard
from tests.live import LiveStack, wait_for

pytestmark = [pytest.mark.browser, pytest.mark.docker]

EMAIL = "pages@example.com"

MARK = """() => {
  const seen = (e) => e.checkVisibility({ visibilityProperty: true, opacityProperty: true });
  const inside = (e) => [e, ...(e.shadowRoot ? all(e.shadowRoot) : [])];
  const all = (root) => [...root.querySelectorAll("*")].flatMap(inside);
  const wanted = "a[href], button, input:not([type=hidden]), select, textarea, summary, [tabindex='0']";
  window.marked = all(document).filter((e) => e.matches(wanted) && seen(e) && !e.disabled && e.tabIndex >= 0);
  const name = (e) => [
    e.getAttribute("aria-label"), e.labels?.[0]?.textContent, e.title, e.type === "submit" && e.value, e.textContent,
    e.getRootNode().getElementById(e.getAttribute("aria-labelledby") ?? "-")?.textContent,
  ].find((text) => text && text.trim());
  return window.marked.map((e) => ({ tag: e.outerHTML.slice(0, 120), name: name(e)?.trim() ?? "" }));
}"""
FOCUSED = """() => {
  let e = document.activeElement;
  while (e?.shadowRoot?.activeElement) e = e.shadowRoot.activeElement;
  if (!e || e === document.body) return { index: -1, ring: true };
  const style = getComputedStyle(e);
  const ring = style.outlineStyle !== "none" || style.boxShadow !== "none";
  return { index: window.marked.indexOf(e), ring, tag: e.outerHTML.slice(0, 120) };
}"""


@dataclass(frozen=True)
class Furnished:
    """A tenant with something on every page, and the cookies of one who is signed in to it."""

    paths: dict[str, str]
    cookies: list[Any]


@pytest.fixture(scope="module")
def furnished(browser: Browser, live: LiveStack) -> Iterator[Furnished]:
    token = live.sign_in(EMAIL)

    def post(path: str, body: Any) -> Any:
        answer = live.request("POST", path, body, token=token)
        assert answer.status in (200, 201, 202), answer.body
        return answer.json()

    for scopes in (["sessions:read"], None):
        post("/v1/api-keys", {"name": "ci"} | ({"scopes": scopes} if scopes else {}))
    values = {
        "LLM_API_KEY": "sk-ant-" + "x" * 40,
        "DATABASE_URL_OF_THE_STAGING_ENVIRONMENT": "postgres://example",
    }
    post(
        "/v1/tenants/me/secrets",
        {"name": "a-bundle-with-quite-a-long-name-for-a-narrow-screen", "values": values},
    )
    sandbox = post("/v1/sandboxes", {"metadata": {"project": "a-long-value-without-a-break-" + "x" * 60}})[
        "sandbox_id"
    ]
    post(f"/v1/sandboxes/{sandbox}/exec", {"command": "seq 1 40; echo " + "long" * 60})
    blocked = f"https://{'a-rather-long-label.' * 4}example.com"
    post(f"/v1/sandboxes/{sandbox}/exec", {"command": f"curl -s {blocked}; curl -s http://127.0.0.3:8080/"})
    shell = {"agent": {"kind": "shell"}, "user_id": "somebody-with-a-rather-long-identifier@example.com"}
    live_one, ended = (
        post("/v1/sessions", shell)["chat_session_id"],
        post("/v1/sessions", shell)["chat_session_id"],
    )
    for session in (live_one, ended):
        task = post(
            f"/v1/sessions/{session}/tasks", {"prompt": "seq 1 30; echo " + "wide" * 80 + "; ls /nope"}
        )["task_id"]
        path = f"/v1/sessions/{session}/tasks/{task}"
        wait_for(
            lambda path=path: live.request("GET", path, token=token).json()["status"] == "done", what=path
        )
    live.request("DELETE", f"/v1/sessions/{ended}", token=token)
    with dashboard(browser, live) as person:
        person.sign_in(EMAIL)
        cookies = list(person.context.cookies())
    yield Furnished(
        {
            "quickstart": "/",
            "sessions": "/sessions",
            "session-new": "/sessions/new",
            "session": f"/sessions/{live_one}",
            "session-ended": f"/sessions/{ended}",
            "sandboxes": "/sandboxes?all=1",
            "sandbox": f"/sandboxes/{sandbox}",
            "snapshots": "/snapshots",
            "secrets": "/secrets",
            "secret": "/secrets/a-bundle-with-quite-a-long-name-for-a-narrow-screen",
            "api-keys": "/api-keys",
            "dev-mail": "/dev-mail",
        },
        cookies,
    )
    for path in (f"/v1/sessions/{live_one}", f"/v1/sandboxes/{sandbox}"):
        live.request("DELETE", path, token=token)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go: `TEST_PICTURES`, else a folder that pytest keeps for a while."""
    folder = Path(os.environ.get("TEST_PICTURES") or tmp_path_factory.mktemp("pictures"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(
    params=[(360, "light"), (360, "dark"), (1440, "light"), (1440, "dark")], ids=lambda p: f"{p[0]}-{p[1]}"
)
def look(request: pytest.FixtureRequest) -> tuple[int, Literal["light", "dark"]]:
    width, scheme = request.param
    return width, scheme


def settle(person: Dashboard) -> None:
    person.page.wait_for_load_state("networkidle")
    if person.page.locator("e2a-chat").count():
        person.wait_connection("live")
        expect(person.output().first).to_contain_text("30")


def check_width(person: Dashboard, name: str) -> None:
    assert person.page.evaluate(OVERFLOW) <= 0, f"{name} runs over"


def check_names_and_keyboard(person: Dashboard, name: str) -> None:
    """Every control that is seen has a name, and Tab reaches it with a visible ring."""
    marked = person.page.evaluate(MARK)
    assert [entry["tag"] for entry in marked if not entry["name"]] == [], name
    reached: set[int] = set()
    person.page.evaluate("document.activeElement?.blur()")
    for _ in range(len(marked) + 5):
        person.page.keyboard.press("Tab")
        at = person.page.evaluate(FOCUSED)
        assert at["ring"], f"{name}: no visible focus on {at.get('tag')}"
        reached.add(at["index"])
    assert [entry["tag"] for index, entry in enumerate(marked) if index not in reached] == [], name


def test_every_page_fits_and_says_nothing_wrong(
    browser: Browser,
    live: LiveStack,
    furnished: Furnished,
    look: tuple[int, Literal["light", "dark"]],
    pictures: Path,
) -> None:
    width, scheme = look
    with dashboard(browser, live, width=width, scheme=scheme) as person:
        person.context.add_cookies(furnished.cookies)
        for name, path in furnished.paths.items():
            person.open(path)
            settle(person)
            person.page.screenshot(path=pictures / f"{name}-{width}-{scheme}.png", full_page=True)
            check_width(person, name)
        assert person.complaints == []
        assert person.hosts == {f"127.0.0.1:{live.port}"}


def test_pages_of_nobody_fit_too(
    browser: Browser, live: LiveStack, look: tuple[int, Literal["light", "dark"]], pictures: Path
) -> None:
    width, scheme = look
    with dashboard(browser, live, width=width, scheme=scheme) as person:
        for name, path in {"sign-in": "/sign-in", "docs": "/v1/docs"}.items():
            person.open(path)
            settle(person)
            person.page.screenshot(path=pictures / f"{name}-{width}-{scheme}.png")
            check_width(person, name)
        person.open("/sign-in")
        person.page.get_by_label("Mail address").fill(f"pages-{width}-{scheme}-{time.time_ns()}@example.com")
        person.page.get_by_role("button", name="Send me a code").click()
        expect(person.page.get_by_label("Code", exact=True)).to_be_focused()
        person.page.screenshot(path=pictures / f"code-{width}-{scheme}.png")
        check_width(person, "code")
        assert person.complaints == []
        person.open("/no/such/page")
        person.page.screenshot(path=pictures / f"missing-{width}-{scheme}.png")
        check_width(person, "missing")
        assert [text for text in person.complaints if "404" not in text] == []


@pytest.mark.parametrize("width", [360, 1440])
def test_the_keyboard_reaches_every_control_and_shows_where_it_is(
    browser: Browser, live: LiveStack, furnished: Furnished, width: int
) -> None:
    with dashboard(browser, live, width=width) as person:
        person.context.add_cookies(furnished.cookies)
        for name, path in furnished.paths.items():
            person.open(path)
            settle(person)
            check_names_and_keyboard(person, name)
        assert person.complaints == []
    with dashboard(browser, live, width=width) as person:
        person.open("/sign-in")
        check_names_and_keyboard(person, "sign-in")


def test_on_a_narrow_screen_the_menu_opens_and_closes_by_keyboard(
    browser: Browser, live: LiveStack, furnished: Furnished
) -> None:
    with dashboard(browser, live, width=360) as person:
        person.context.add_cookies(furnished.cookies)
        person.open("/")
        link = person.page.get_by_role("link", name="API keys", exact=True).last
        expect(link).to_be_hidden()
        person.page.get_by_role("button", name="Menu").focus()
        person.page.keyboard.press("Enter")
        expect(link).to_be_visible()
        check_width(person, "menu")
        person.page.keyboard.press("Escape")
        expect(link).to_be_hidden()
        person.page.keyboard.press("Enter")
        link.focus()
        person.page.keyboard.press("Enter")
        expect(person.page.get_by_role("heading", name="API keys")).to_be_visible()


def test_a_list_that_renews_itself_keeps_the_focus(
    browser: Browser, live: LiveStack, furnished: Furnished
) -> None:
    with dashboard(browser, live) as person:
        person.context.add_cookies(furnished.cookies)
        person.open("/sandboxes")
        button = person.page.get_by_role("button", name="Destroy").first
        button.focus()
        with person.page.expect_response(lambda answer: answer.url.endswith("/sandboxes"), timeout=20_000):
            pass
        person.page.wait_for_load_state("networkidle")
        wait_for(
            lambda: person.page.evaluate("document.querySelector('.htmx-request, .htmx-swapping') === null"),
            what="the swap",
        )
        expect(button).to_be_focused()
        assert person.complaints == []


def test_dark_mode_is_one_button_and_is_remembered(
    browser: Browser, live: LiveStack, furnished: Furnished
) -> None:
    with dashboard(browser, live) as person:
        person.context.add_cookies(furnished.cookies)
        person.open("/")
        background = "getComputedStyle(document.body).backgroundColor"
        light = person.page.evaluate(background)
        person.page.get_by_role("button", name="Dark mode").click()
        dark = person.page.evaluate(background)
        assert dark != light
        person.page.reload()
        assert person.page.evaluate(background) == dark
        assert person.complaints == []

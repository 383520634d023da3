"""The terminal's page in a real browser: a shell is typed into, left, come back to, and shared."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.dashboard import LIMIT_MS, OVERFLOW, Dashboard, dashboard
from tests.live import LiveStack, wait_for

pytestmark = [pytest.mark.browser, pytest.mark.docker]

EMAIL = "terminal@example.com"


@pytest.fixture(scope="module")
def cookies(browser: Browser, live: LiveStack) -> list[object]:
    with dashboard(browser, live) as person:
        person.sign_in(EMAIL)
        return list(person.context.cookies())


@pytest.fixture(scope="module")
def key(live: LiveStack) -> str:
    return live.api_key(EMAIL)


@pytest.fixture
def sandbox(live: LiveStack, key: str) -> Iterator[str]:
    made = live.request("POST", "/v1/sandboxes", {}, token=key).json()["sandbox_id"]
    yield made
    live.request("DELETE", f"/v1/sandboxes/{made}", token=key)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("TEST_PICTURES") or tmp_path_factory.mktemp("pictures"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class TerminalPage:
    """The page of one sandbox's terminal."""

    def __init__(self, person: Dashboard, sandbox: str) -> None:
        self.person = person
        self.page = person.page
        self.screen = self.page.locator(".xterm-rows")
        self.status = self.page.get_by_role("status")
        person.open(f"/sandboxes/{sandbox}/terminal")

    def connected(self) -> None:
        expect(self.status).to_have_text("Connected.")

    def type(self, text: str) -> None:
        self.page.locator("#terminal").click()
        self.page.keyboard.type(text + "\n")

    def shows(self, text: str, *, limit_ms: int = LIMIT_MS) -> None:
        expect(self.screen).to_contain_text(text, timeout=limit_ms)


@contextmanager
def terminal(
    browser: Browser,
    live: LiveStack,
    sandbox: str,
    cookies: list[object],
    *,
    width: int = 1440,
    scheme: Literal["light", "dark"] = "light",
) -> Iterator[TerminalPage]:
    with dashboard(browser, live, width=width, scheme=scheme) as person:
        person.context.add_cookies(cookies)  # type: ignore[arg-type]  # As they were given.
        yield TerminalPage(person, sandbox)
        assert person.complaints == []
        assert person.hosts == {f"127.0.0.1:{live.port}"}


def test_a_shell_is_typed_into_left_and_come_back_to(
    browser: Browser, live: LiveStack, sandbox: str, cookies: list[object]
) -> None:
    with terminal(browser, live, sandbox, cookies) as page:
        page.person.open(f"/sandboxes/{sandbox}")
        page.page.get_by_role("link", name="Terminal").click()
        page.connected()
        page.type("X=kept; echo hi-$((1+1))")
        page.shows("hi-2")
        page.page.reload()
        page.connected()
        page.shows("hi-2")
        page.type("echo $X-$((2+3))")
        page.shows("kept-5")
        page.type("exit 7")
        expect(page.status).to_contain_text("The shell has ended with 7.")
        page.page.get_by_role("button", name="Start a new shell").click()
        page.connected()
        page.type("echo new-$((3+3))$X")
        page.shows("new-6")
        # The keyboard gets out of it.
        page.page.keyboard.press("Shift+Tab")
        assert page.page.evaluate("document.activeElement.closest('#terminal')") is None


def test_web_restarts_and_the_page_misses_nothing(
    browser: Browser, live: LiveStack, sandbox: str, cookies: list[object]
) -> None:
    with terminal(browser, live, sandbox, cookies) as page:
        page.connected()
        page.type('for i in $(seq 1 60); do printf "<$i>"; sleep 0.1; done; echo $((4*4))-all')
        page.shows("<10>")
        page.person.is_interrupted = True
        live.kill("web")
        expect(page.status).to_contain_text("coming back")
        page.shows("16-all", limit_ms=6 * LIMIT_MS)  # A process starts, on a machine that may be busy.
        page.connected()
        text = page.screen.inner_text().replace("\n", "").replace("\xa0", " ")
        wanted = "".join(f"<{number}>" for number in range(1, 61))
        assert wanted in text.replace(" ", "")
        page.type("echo still-$((5+5))")
        page.shows("still-10")


def test_a_second_reader_looks_on_and_takes_over(
    browser: Browser, live: LiveStack, sandbox: str, cookies: list[object]
) -> None:
    with terminal(browser, live, sandbox, cookies) as one:
        one.connected()
        one.type("echo one-$((1+2))")
        with terminal(browser, live, sandbox, cookies, width=360) as two:
            expect(two.status).to_contain_text("Read-only: someone else types.")
            two.shows("one-3")
            two.page.get_by_role("button", name="Take over").click()
            two.connected()
            expect(one.status).to_contain_text("Read-only")
            two.type("echo two-$((2+2)); tput cols")
            one.shows("two-4")
        one.connected()
        one.type("echo back-$((3+4))")
        one.shows("back-7")


@pytest.mark.parametrize(
    ("width", "scheme"), [(360, "light"), (360, "dark"), (1440, "light"), (1440, "dark")]
)
def test_it_fits_and_looks_right(
    browser: Browser,
    live: LiveStack,
    sandbox: str,
    cookies: list[object],
    pictures: Path,
    width: int,
    scheme: Literal["light", "dark"],
) -> None:
    with terminal(browser, live, sandbox, cookies, width=width, scheme=scheme) as page:
        page.connected()
        page.type("ls --color=always -la /; echo $((1+1))-done")
        page.shows("2-done")
        page.page.screenshot(path=pictures / f"terminal-{width}-{scheme}.png")
        assert page.page.evaluate(OVERFLOW) <= 0
        before = columns(page)
        page.page.set_viewport_size({"width": 720, "height": 700})
        wait_for(
            lambda: (columns(page) > before) is (width < 720) and columns(page) != before,
            what="another window",
            every=0.5,
        )


def columns(page: TerminalPage) -> int:
    """What the shell says of its window."""
    page.type("clear; echo =$(tput cols)=")
    found: list[str] = []

    def told() -> bool:
        found[:] = re.findall(r"^=(\d+)=", page.screen.inner_text(), re.MULTILINE)
        return bool(found)

    wait_for(told, what="the shell's word")
    return int(found[0])


def test_the_policy_is_looser_on_this_page_only(
    live: LiveStack, browser: Browser, sandbox: str, cookies: list[object]
) -> None:
    with dashboard(browser, live) as person:
        person.context.add_cookies(cookies)  # type: ignore[arg-type]  # As they were given.
        policies = {}
        for path in (f"/sandboxes/{sandbox}", f"/sandboxes/{sandbox}/terminal"):
            answer = person.page.goto(live.url + path)
            assert answer is not None
            policies[path] = answer.headers["content-security-policy"]
        plain, loose = policies.values()
        assert "unsafe-inline" not in plain
        assert "style-src 'self' 'unsafe-inline'" in loose
        assert "script-src 'self';" in loose

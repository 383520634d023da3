"""A person at the dashboard: signs in, goes from page to page, and notes everything that a page complains of."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, expect

from tests.live import LiveStack, wait_for

LIMIT_MS = 30_000

_NOTE_VIOLATIONS = """document.addEventListener("securitypolicyviolation", (event) =>
  console.error(`policy violation: ${event.violatedDirective} ${event.blockedURI} ${event.sourceFile}`));"""

OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


class Dashboard:
    """One browser page on the live stack."""

    def __init__(self, context: BrowserContext, stack: LiveStack) -> None:
        self.stack = stack
        self.context = context
        self.complaints: list[str] = []
        self.hosts: set[str] = set()
        self.is_interrupted = False
        """While the test has the server down: failed connections are then what it wants."""
        context.add_init_script(_NOTE_VIOLATIONS)
        context.on("request", lambda request: self._contacted(request.url))
        self.page = context.new_page()
        self.page.set_default_timeout(LIMIT_MS)
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.complaints.append(f"{self.page.url}: {error}"))
        self.page.on("websocket", lambda opened: self._contacted(opened.url))

    def _contacted(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob"):
            self.hosts.add(parts.netloc)

    def _console(self, message: ConsoleMessage) -> None:
        is_line = "WebSocket connection to" in message.text or "ERR_CONNECTION" in message.text
        if message.type in ("error", "warning") and not (self.is_interrupted and is_line):
            self.complaints.append(f"{self.page.url}: {message.text}")

    def open(self, path: str) -> None:
        self.page.goto(self.stack.url + path)

    def sign_in(self, email: str) -> None:
        """By the pages themselves, with the mailed code."""
        started = time.time()
        self.open("/sign-in")
        self.page.get_by_label("Mail address").fill(email)
        self.page.get_by_role("button", name="Send me a code").click()
        self.page.get_by_label("Code", exact=True).fill(self.stack.mailed_code(email, after=started))
        self.page.get_by_role("button", name="Sign in").click()
        expect(self.page.get_by_role("heading", name="Quickstart")).to_be_visible()

    def accept_questions(self) -> None:
        self.page.on("dialog", lambda dialog: dialog.accept())

    def send(self, text: str) -> None:
        """Type a message into the chat."""
        self.page.locator("e2a-chat").get_by_role("textbox").fill(text)
        self.page.keyboard.press("Enter")

    def output(self) -> Any:
        return self.page.locator("e2a-chat .output .stdout")

    def wait_connection(self, *states: str) -> None:
        """Until the chat's connection is one of these. Asked from here: a page of ours lets nobody `eval` in it."""
        wait_for(lambda: self._connection() in states, what=f"a connection that is {' or '.join(states)}")

    def _connection(self) -> str | None:
        found: str | None = self.page.evaluate("document.querySelector('e2a-chat').status?.connection")
        return found


@contextmanager
def dashboard(
    browser: Browser, stack: LiveStack, *, width: int = 1440, scheme: Literal["light", "dark"] = "light"
) -> Iterator[Dashboard]:
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme=scheme,
        permissions=["clipboard-read", "clipboard-write"],
    )
    try:
        yield Dashboard(context, stack)
    finally:
        context.close()

"""What a test sees and does in a browser page that shows one `<e2a-chat>`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from playwright.sync_api import Browser, ConsoleMessage, Dialog, Locator, Page, sync_playwright

from tests.browser.chat_harness.pages import Site
from tests.browser.chat_harness.server import ScriptedSession

LIMIT_MS = 15_000

SEEN_TEXT = """() => {
  const chat = document.querySelector("e2a-chat").shadowRoot;
  return [...chat.querySelectorAll(".output pre, .markdown")].map((e) => e.textContent).join("");
}"""


class Chat:
    """A page with a chat, and everything that went wrong in it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.set_default_timeout(LIMIT_MS)
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", self._dialog)
        page.on("request", lambda request: self.requests.append(request.url))

    def _dialog(self, dialog: Dialog) -> None:
        self.complaints.append(dialog.message)
        dialog.dismiss()

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error" and "WebSocket connection to" not in message.text:
            self.complaints.append(message.text)

    def show(self, site: Site, session: ScriptedSession, attributes: str = 'token="good"') -> None:
        self.page.goto(site.chat_page(f'connect-url="{session.url}" {attributes}'))

    @property
    def log(self) -> Locator:
        return self.page.get_by_role("log")

    @property
    def input(self) -> Locator:
        return self.page.get_by_role("textbox")

    def find(self, selector: str) -> Locator:
        return self.page.locator(f"e2a-chat {selector}")

    def text(self) -> str:
        """Everything that commands printed and the assistant said."""
        return str(self.page.evaluate(SEEN_TEXT))

    def element(self, expression: str) -> Any:
        return self.page.evaluate(f"document.querySelector('e2a-chat').{expression}")

    def wait_connection(self, state: str) -> None:
        self.page.wait_for_function(
            "state => document.querySelector('e2a-chat').status?.connection === state", arg=state
        )

    def wait_seq(self, seq: int) -> None:
        """Until the frame `seq` has come and is painted."""
        self.page.wait_for_function(
            "seq => document.querySelector('e2a-chat').status?.lastSeq >= seq", arg=seq
        )
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 60)))")


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def chat_in(
    browser: Browser,
    width: int = 900,
    scheme: Literal["light", "dark"] = "light",
) -> Iterator[Chat]:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    try:
        yield Chat(context.new_page())
    finally:
        context.close()

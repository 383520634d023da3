"""The README's own commands run as they are written, in their order, against a running server."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

from tests.live import LiveStack
from tests.model_server import call, say, then, together
from tests.product.documents import ROOT, Block, blocks_of
from tests.product.pasting import PastingShell

README = ROOT / "README.md"
LIMIT_MS = 30_000

pytestmark = [pytest.mark.docker, pytest.mark.browser, pytest.mark.timeout(300)]

WORDS = {
    "Done in": "quickstart",
    "exit code is 0": "quickstart",
    "e2a_live_": "api-keys",
    '"keys":["LLM_API_KEY"]': "tenants/me/secrets",
    "const connect_url": '"const connect_url',
    "idle": ".sessions[]",
    '"status":"ended"': "-X DELETE $E2A/v1/sessions",
    "Linux": "/events",
    "total ": "/events",
    "Python 3": "/exec",
    "agent": "/exec",
    "hello": "files?path",
    '"status":"destroyed"': "-X DELETE $E2A/v1/sandboxes",
}
"""What a block must print: the words, and a part of the block that must print them."""


def _paste_into_console(stack: LiveStack, *scripts: str) -> list[str]:
    """Paste scripts into the console of a page of that server; what they log, until an exit code."""
    logged: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        try:
            page = browser.new_page()
            page.goto(f"{stack.url}/sign-in")
            page.on("console", lambda message: logged.append(message.text))
            with page.expect_console_message(lambda message: "exit code" in message.text, timeout=LIMIT_MS):
                # As a console does it: through the debugger, in the page's global scope, past its policy.
                console = page.context.new_cdp_session(page)
                for script in scripts:
                    done = console.send("Runtime.evaluate", {"expression": script, "replMode": True})
                    assert "exceptionDetails" not in done, done
        finally:
            browser.close()
    return logged


def _said(block: Block, printed: str) -> None:
    """What was printed is what the README promises."""
    assert "urn:e2a:error" not in printed, f"line {block.line}: {printed}"
    assert "null" not in printed.splitlines(), f"line {block.line}: {printed}"
    for words, part in WORDS.items():
        if part in block.text:
            assert words in printed.replace('": ', '":'), (
                f"line {block.line} did not print {words}:\n{printed}"
            )


def test_its_commands_run_as_they_are_written(live: LiveStack, tmp_path: Path) -> None:
    live.model.play(
        then(
            together(say("I will look."), call("bash", {"command": "ls -la /workspace"})),
            say("The folder is empty."),
        )
    )
    began = time.time()
    asks: dict[str, Any] = {
        "The code from the mail:": lambda: live.mailed_code("you@example.com", after=began),
        "LLM_API_KEY:": lambda: "sk-ant-a-key-from-the-readme-test",
    }
    # What the reader's shell has: our server instead of the usual address, and its data folder.
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("E2A_", "DATABASE_", "REDIS_", "LLM_"))
    }
    environment |= {"E2A": live.url, "E2A_BIND": f"127.0.0.1:{live.port}", "E2A_DATA_DIR": str(live.data_dir)}
    logged: list[str] = []
    first_line = ""
    checked: set[str] = set()
    with PastingShell(ROOT, environment) as shell:
        for block in blocks_of(README):
            if block.language == "bash" and not block.reason:
                printed = shell.paste(block, asks=asks)
                _said(block, printed)
                checked |= {part for part in WORDS.values() if part in block.text}
                if "const connect_url" in printed:
                    first_line = printed.strip().splitlines()[-1]
            elif block.language == "javascript":
                logged = _paste_into_console(live, first_line, block.text)
    assert checked == set(WORDS.values()), "a command that is checked here left the README"
    text = "".join(logged)
    assert "I will look." in text
    assert "total " in text, "what the command printed"
    assert "The folder is empty." in text
    assert logged[-1] == "exit code 0"
    assert {request.key for request in live.model.requests[-2:]} == {"sk-ant-a-key-from-the-readme-test"}


def test_the_element_of_its_html_is_served(live: LiveStack) -> None:
    [block] = [block for block in blocks_of(README) if block.language == "html"]
    source = block.text.split('src="', 1)[1].split('"', 1)[0]
    answer = live.request("GET", source.removeprefix("http://127.0.0.1:8000"))
    assert answer.status == 200
    assert b'customElements.define("e2a-chat"' in answer.body


@pytest.mark.parametrize("path", ["/v1/docs", "/dev-mail", "/sign-in"])
def test_the_pages_it_names_are_there(live: LiveStack, path: str) -> None:
    assert live.request("GET", path).status == 200
    assert path == "/sign-in" or f"http://127.0.0.1:8000{path}" in README.read_text()


def test_it_names_exactly_two_commands_to_begin_with() -> None:
    [first] = [block for block in blocks_of(README) if "script/server   " in block.text]
    assert [line.split()[0] for line in first.text.splitlines()] == ["script/server", "script/test"]
    assert all((ROOT / name).stat().st_mode & 0o100 for name in ("script/server", "script/test"))

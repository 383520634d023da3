"""A browser, a site, a scripted session, and a page that must not complain."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.chat_harness.chat import LIMIT_MS, Chat, chat_in, chromium
from tests.browser.chat_harness.pages import Site, site
from tests.browser.chat_harness.server import ScriptedSession, scripted_session

expect.set_options(timeout=LIMIT_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def host() -> Iterator[Site]:
    """A site of another origin than the session's."""
    with site() as running:
        yield running


@pytest.fixture
def session() -> Iterator[ScriptedSession]:
    with scripted_session() as running:
        yield running


@pytest.fixture
def chat(browser: Browser) -> Iterator[Chat]:
    """A blank page; a test fails when anything in it complains (script errors, the policy, dialogs)."""
    with chat_in(browser) as page:
        yield page
        assert page.complaints == []

"""Previews and the desktop in a real browser, which resolves `*.localhost` by itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.dashboard import LIMIT_MS, OVERFLOW, dashboard
from tests.live import LiveStack
from tests.sandboxes.preview_server import PORT
from tests.sandboxes.preview_server import SOURCE as SERVER
from tests.sandboxes.vnc_server import SOURCE as VNC

pytestmark = [pytest.mark.browser, pytest.mark.docker]

EMAIL = "previews@example.com"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("TEST_PICTURES") or tmp_path_factory.mktemp("pictures"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_a_person_opens_a_preview_from_the_sandboxs_page_and_its_desktop(
    browser: Browser, live: LiveStack, pictures: Path
) -> None:
    key = live.api_key(EMAIL)
    sandbox = live.request("POST", "/v1/sandboxes", {}, token=key).json()["sandbox_id"]
    for name, source in (("server.py", SERVER), ("vnc.py", VNC)):
        live.request("PUT", f"/v1/sandboxes/{sandbox}/files?path={name}", source.encode(), token=key)
        live.request("POST", f"/v1/sandboxes/{sandbox}/jobs", {"command": f"python3 {name}"}, token=key)
    wait = "for p in 5900 8123; do until (echo >/dev/tcp/127.0.0.1/$p) 2>/dev/null; do sleep 0.1; done; done"
    assert live.request("POST", f"/v1/sandboxes/{sandbox}/exec", {"command": wait}, token=key).status == 200
    with dashboard(browser, live) as person:
        person.sign_in(EMAIL)
        person.open(f"/sandboxes/{sandbox}")
        page = person.page
        page.screenshot(path=pictures / "sandbox-with-preview.png", full_page=True)
        page.get_by_label("Port").fill(str(PORT))
        with person.context.expect_page() as opening:
            page.get_by_role("button", name="Preview port").click()
        preview = opening.value
        host = f"{PORT}-{sandbox.removeprefix('sbx_')}.localhost:{live.port}"
        preview.wait_for_url(f"http://{host}/", timeout=LIMIT_MS)
        preview.goto(f"http://{host}/page")
        expect(preview.locator("#said")).to_have_text("echo: hello", timeout=LIMIT_MS)
        assert preview.evaluate("document.cookie") == ""
        ours = {cookie["name"] for cookie in person.context.cookies([f"http://{host}/"])}
        assert ours and all("preview" in name for name in ours)
        preview.goto(f"http://{host.replace(str(PORT), '9', 1)}/")
        expect(preview.get_by_role("heading")).to_have_text("Authentication needed")
        preview.screenshot(path=pictures / "preview-refused.png")
        preview.close()

        # A `standard` sandbox has none, so it is not offered; this one has begun its own.
        expect(page.get_by_role("link", name="Desktop")).to_have_count(0)
        person.open(f"/sandboxes/{sandbox}/desktop")
        expect(page.get_by_role("status")).to_have_text("Connected.", timeout=LIMIT_MS)
        canvas = page.locator("#desktop canvas")
        expect(canvas).to_be_visible()
        assert page.evaluate("document.querySelector('#desktop canvas').width") == 64
        page.screenshot(path=pictures / "desktop-1440.png")
        page.get_by_label("Only look on").check()
        expect(page.get_by_role("status")).to_have_text("Read-only.", timeout=LIMIT_MS)
        page.set_viewport_size({"width": 360, "height": 740})
        assert page.evaluate(OVERFLOW) == 0
        page.screenshot(path=pictures / "desktop-360.png")
        page.goto("about:blank")
        assert [line for line in person.complaints if "127.0.0.1" in line] == []
    live.request("DELETE", f"/v1/sandboxes/{sandbox}", token=key)

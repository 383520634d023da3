"""Each template does its real job, in a real sandbox that the API made."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sandboxes.models import Node, Template
from tests.fixtures import Api
from tests.sandboxes.pictures import Picture, read_png
from tests.sandboxes.running import RunningNode, streamed, wait_until
from tests.sandboxes.test_warm_and_cold import exec_in, made

pytestmark = [pytest.mark.docker, pytest.mark.one_database]

PAGE = """<!doctype html><title>loading</title>
<style>body { margin: 0; background: #c00000 } div { width: 200px; height: 100px; background: #0000c0 }</style>
<div></div><script>document.title = "six times seven is " + 6 * 7</script>"""

PLAYWRIGHT = """
import functools, http.server, threading
from playwright.sync_api import sync_playwright

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 8123), Quiet)
threading.Thread(target=server.serve_forever, daemon=True).start()
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path="/usr/bin/chromium")
    page = browser.new_page(viewport={"width": 400, "height": 300})
    page.goto("http://127.0.0.1:8123/page.html")
    print(page.title(), page.evaluate("document.querySelector('div').offsetWidth"))
    page.screenshot(path="page.png")
    browser.close()
"""

CDP = """
chromium --headless --remote-debugging-port=9222 --user-data-dir=/tmp/cdp about:blank >/tmp/cdp.log 2>&1 &
for try in $(seq 150); do
    curl -fsS http://127.0.0.1:9222/json/version 2>/dev/null && break
    sleep 0.2
done
kill %1
"""

CANVAS = """<!doctype html><style>body { margin: 0 } canvas { display: block }</style>
<canvas id="c" width="200" height="100"></canvas><script>
const pen = document.getElementById("c").getContext("2d")
pen.fillStyle = "rgb(0, 0, 255)"; pen.fillRect(0, 0, 100, 100)
setTimeout(() => { pen.fillStyle = "rgb(0, 255, 0)"; pen.fillRect(100, 0, 100, 100) }, 100)
</script>"""


def sandbox_of(api: Api, template: str) -> str:
    return str(made(api, template=template)["vm_id"])


def put(api: Api, sandbox: str, path: str, text: str) -> None:
    assert api.put(f"/v1/sandboxes/{sandbox}/files?path={path}", text.encode()).status_code == 200


def picture(api: Api, sandbox: str, path: str) -> Picture:
    answer = api.get(f"/v1/sandboxes/{sandbox}/files?path={path}")
    assert answer.status_code == 200
    return read_png(streamed(answer))


def done(api: Api, sandbox: str, command: str, **body: Any) -> str:
    """What the command printed; it must succeed."""
    ended = exec_in(api, sandbox, command, timeout_seconds=120, **body)
    assert ended["exit_code"] == 0, ended
    return str(ended["stdout"])


def test_browser_opens_a_page_by_playwright_and_answers_cdp(
    template_node: RunningNode, worker: Any, as_alice: Api
) -> None:
    sandbox = sandbox_of(as_alice, "browser")
    put(as_alice, sandbox, "page.html", PAGE)
    put(as_alice, sandbox, "open.py", PLAYWRIGHT)
    assert done(as_alice, sandbox, "python3 open.py") == "six times seven is 42 200\n"
    shot = picture(as_alice, sandbox, "page.png")
    assert (shot.width, shot.height) == (400, 300)
    assert [shot.pixel(x, y) for x, y in ((10, 10), (199, 99), (200, 50), (50, 100), (399, 299))] == [
        (0, 0, 192), (0, 0, 192), (192, 0, 0), (192, 0, 0), (192, 0, 0),
    ]  # fmt: skip
    version = json.loads(done(as_alice, sandbox, CDP))
    assert version["webSocketDebuggerUrl"].startswith("ws://127.0.0.1:9222/devtools/browser/")


def test_cua_has_a_desktop_that_is_typed_into_seen_and_reached_by_vnc(
    template_node: RunningNode, worker: Any, as_alice: Api
) -> None:
    sandbox = sandbox_of(as_alice, "cua")
    # Nothing runs before; then many at once, and again: one desktop, and each of them a success.
    assert exec_in(as_alice, sandbox, "pgrep Xvfb")["exit_code"] == 1
    at_once = "for i in 1 2 3 4 5; do desktop-start & all+=($!); done; for one in ${all[@]}; do wait $one || exit; done"
    done(as_alice, sandbox, at_once)
    done(as_alice, sandbox, "desktop-start")
    counted = "for name in Xvfb openbox x11vnc; do pgrep -c -x $name; done"
    assert done(as_alice, sandbox, counted) == "1\n1\n1\n"
    greeting = "exec 8<>/dev/tcp/127.0.0.1/5900; head -c 12 <&8"
    assert done(as_alice, sandbox, greeting) == "RFB 003.008\n"

    window = "xterm -T desk -geometry 80x24+100+100 -e 'cat >typed' >/dev/null 2>&1 & "
    done(as_alice, sandbox, window + "xdotool search --sync --onlyvisible --name '^desk$' windowfocus --sync")
    done(as_alice, sandbox, "scrot -o before.png")
    done(as_alice, sandbox, "xdotool type 'hello from outside'; xdotool key Return")
    done(as_alice, sandbox, "for try in $(seq 100); do [ -s typed ] && exit 0; sleep 0.1; done; exit 1")
    assert done(as_alice, sandbox, "cat typed") == "hello from outside\n"
    seen = "for try in $(seq 100); do scrot -o after.png; cmp -s before.png after.png || exit 0; done; exit 1"
    done(as_alice, sandbox, seen)
    before, after = picture(as_alice, sandbox, "before.png"), picture(as_alice, sandbox, "after.png")
    assert (after.width, after.height) == (1280, 800)
    assert 0 < before.differing(after) < 200  # Some lines of text, not the whole screen.

    red = "chromium --start-maximized 'data:text/html,<title>red</title><body style=background:red>' >/dev/null 2>&1 & "
    done(as_alice, sandbox, red + "true")

    def shows_its_page() -> bool:
        done(as_alice, sandbox, "scrot -o red.png")
        return picture(as_alice, sandbox, "red.png").pixel(640, 600) == (255, 0, 0)

    wait_until(shows_its_page, seconds=120, what="Chromium's page on the screen")

    # A server that was killed is started again, the others are left alone.
    killed = "pkill -x x11vnc; while pgrep -x x11vnc >/dev/null; do sleep 0.05; done; desktop-start"
    done(as_alice, sandbox, killed)
    assert done(as_alice, sandbox, greeting) == "RFB 003.008\n"
    assert done(as_alice, sandbox, counted) == "1\n1\n1\n"


def test_canvas_draws_html_to_a_png(template_node: RunningNode, worker: Any, as_alice: Api) -> None:
    sandbox = sandbox_of(as_alice, "canvas")
    put(as_alice, sandbox, "page.html", CANVAS)
    done(as_alice, sandbox, "canvas-render page.html out.png --size 200x100")
    drawn = picture(as_alice, sandbox, "out.png")
    assert (drawn.width, drawn.height) == (200, 100)
    assert [drawn.pixel(x, 50) for x in (0, 99, 100, 199)] == [
        (0, 0, 255),
        (0, 0, 255),
        (0, 255, 0),
        (0, 255, 0),
    ]
    refused = exec_in(as_alice, sandbox, "canvas-render missing.html out.png")
    assert (refused["exit_code"], refused["stderr"]) == (1, "canvas-render: there is no file missing.html\n")


def test_images_are_pinned_by_digest_and_said_to_be_available(
    template_node: RunningNode, worker: Any, as_alice: Api, template_images: dict[str, str]
) -> None:
    images = Node.objects.get().images
    assert {name: image["tag"] for name, image in images.items()} == template_images
    for name, image in images.items():
        assert image["id"].startswith("sha256:")
        assert Template.objects.get(name=name).image_id == image["id"]
    shown = as_alice.get("/v1/templates").json()["templates"]
    assert {one["name"]: one["available"] for one in shown} == dict.fromkeys(template_images, True)
    sizes = {one["name"]: (one["vcpu"], one["memory_mib"], one["disk_mib"]) for one in shown}
    assert sizes == {
        "standard": (0.5, 512, 2048),
        "browser": (1, 1024, 4096),
        "cua": (1, 2048, 4096),
        "canvas": (1, 1024, 2048),
    }

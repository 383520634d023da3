"""A site of another origin: pages under the strictest policy that the chat promises to live with."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
STATIC = ROOT / "static" / "e2a"
CONTENT_TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}
STRICT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src ws://localhost:*; base-uri 'none'; "
    "form-action 'none'; require-trusted-types-for 'script'"
)


class Site:
    """Serves `pages` (path → HTML) and, under /static/e2a/, the repository's own files."""

    def __init__(self) -> None:
        self.pages: dict[str, str] = {}
        self.policy: str | None = STRICT_POLICY
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = site._find(self.path.split("?")[0])
                self.send_response(404 if body is None else 200)
                suffix = Path(self.path).suffix if self.path.startswith("/static/") else ".html"
                self.send_header("Content-Type", CONTENT_TYPES.get(suffix, "text/html") + "; charset=utf-8")
                if site.policy:
                    self.send_header("Content-Security-Policy", site.policy)
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def chat_page(self, attributes: str = "") -> str:
        """Put up a page with one chat; returns its address."""
        self.pages["/"] = (
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>Host</title>'
            '<meta name="viewport" content="width=device-width">'
            f'<script src="/static/e2a/chat.js" defer></script><e2a-chat {attributes}></e2a-chat></html>'
        )
        return self.origin + "/"

    def _find(self, path: str) -> bytes | None:
        if path == "/favicon.ico":
            return b""
        if path in self.pages:
            return self.pages[path].encode()
        name = path.removeprefix("/static/e2a/")
        file = STATIC / name
        return file.read_bytes() if name != path and "/" not in name and file.is_file() else None


@contextmanager
def site() -> Iterator[Site]:
    made = Site()
    threading.Thread(target=made.server.serve_forever, args=(0.1,), daemon=True).start()
    try:
        yield made
    finally:
        made.server.shutdown()
        made.server.server_close()

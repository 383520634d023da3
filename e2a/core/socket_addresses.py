"""Where our sockets are reached."""

from __future__ import annotations

from django.conf import settings
from django.http import HttpRequest


def socket_url(request: HttpRequest, path: str) -> str:
    """`path` on `E2A_RT_URL`, else on the public URL, else on the request's own host (development)."""
    base = settings.E2A.rt_url or settings.E2A.public_url or f"{request.scheme}://{request.get_host()}"
    for http, ws in (("https://", "wss://"), ("http://", "ws://")):
        if base.startswith(http):
            base = ws + base.removeprefix(http)
    return base + path

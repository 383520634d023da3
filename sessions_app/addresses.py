"""Where a session's socket is."""

from __future__ import annotations

from django.conf import settings
from django.http import HttpRequest

from sessions_app.models import Session


def connect_url(session: Session, request: HttpRequest) -> str:
    """`E2A_RT_URL`, else the public URL, else the request's own host (development)."""
    base = settings.E2A.rt_url or settings.E2A.public_url or f"{request.scheme}://{request.get_host()}"
    for http, ws in (("https://", "wss://"), ("http://", "ws://")):
        if base.startswith(http):
            base = ws + base.removeprefix(http)
    return f"{base}/v1/sessions/{session.public_id}/ws"

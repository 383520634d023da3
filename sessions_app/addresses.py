"""Where a session's socket is."""

from __future__ import annotations

from django.http import HttpRequest

from e2a.core.socket_addresses import socket_url
from sessions_app.models import Session


def connect_url(session: Session, request: HttpRequest) -> str:
    """As `socket_url`."""
    return socket_url(request, f"/v1/sessions/{session.public_id}/ws")

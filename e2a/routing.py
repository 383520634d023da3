"""All WebSocket paths."""

from __future__ import annotations

from sandboxes import routing as sandboxes
from sessions_app import routing as sessions

websocket_urlpatterns = [*sessions.websocket_urlpatterns, *sandboxes.websocket_urlpatterns]

__all__ = ["websocket_urlpatterns"]

"""All WebSocket paths."""

from __future__ import annotations

from sessions_app.routing import websocket_urlpatterns

__all__ = ["websocket_urlpatterns"]

"""WebSocket paths of sandboxes."""

from __future__ import annotations

from typing import Any

from django.urls import path

from sandboxes.desktop_socket import DesktopConsumer
from sandboxes.terminal_socket import TerminalConsumer

websocket_urlpatterns: list[Any] = [
    path("v1/sandboxes/<str:sandbox_id>/desktop", DesktopConsumer.as_asgi()),
    path("v1/sandboxes/<str:sandbox_id>/terminal", TerminalConsumer.as_asgi()),
]

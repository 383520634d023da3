"""WebSocket paths of sessions."""

from __future__ import annotations

from typing import Any

from django.urls import path

from sessions_app.consumers import SessionConsumer

websocket_urlpatterns: list[Any] = [
    path("v1/sessions/<str:session_id>/ws", SessionConsumer.as_asgi()),
]

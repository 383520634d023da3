"""The web process: REST, dashboard, admin and sockets in one ASGI application. Served by uvicorn."""

from __future__ import annotations

import os
from typing import cast

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "e2a.settings")

from channels.routing import ProtocolTypeRouter, URLRouter
from django.core.asgi import get_asgi_application

_http = get_asgi_application()  # Loads the apps: what follows imports models.

from e2a.body_gate import BodyGate  # noqa: E402
from e2a.core.requests import ASGIApp, RequestIdMiddleware  # noqa: E402
from e2a.routing import websocket_urlpatterns  # noqa: E402

application = RequestIdMiddleware(
    ProtocolTypeRouter(
        {"http": BodyGate(cast(ASGIApp, _http)), "websocket": URLRouter(websocket_urlpatterns)}
    )
)

"""The web process: REST, dashboard, admin and sockets in one ASGI application. Served by uvicorn."""

from __future__ import annotations

import os
from typing import cast

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "e2a.settings")

import django
from channels.routing import ProtocolTypeRouter, URLRouter

django.setup(set_prefix=False)  # Loads the apps: what follows imports models.

from e2a.body_gate import BodyGate  # noqa: E402
from e2a.core.http_handler import ThreadHandler  # noqa: E402
from e2a.core.requests import ASGIApp, RequestIdMiddleware  # noqa: E402
from e2a.routing import websocket_urlpatterns  # noqa: E402
from sandboxes.preview.app import PreviewGate  # noqa: E402

application = RequestIdMiddleware(
    PreviewGate(
        cast(
            ASGIApp,
            ProtocolTypeRouter(
                {
                    "http": BodyGate(cast(ASGIApp, ThreadHandler())),
                    "websocket": URLRouter(websocket_urlpatterns),
                }
            ),
        )
    )
)

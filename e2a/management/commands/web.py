"""`manage.py web`: the ASGI application under uvicorn."""

from __future__ import annotations

from typing import Any

import uvicorn
from django.conf import settings
from django.core.management.base import BaseCommand

from e2a.core.collector import collector_settle

FRAME_LIMIT = 2 * 1024 * 1024
"""Bytes. Over the contract's 1 MiB, so that our own 4413 is what a client sees."""


class Command(BaseCommand):
    help = "Serve REST, dashboard, admin and sockets on E2A_BIND."
    requires_system_checks = "__all__"

    def handle(self, *args: Any, **options: Any) -> None:
        from e2a.asgi import application  # Not before settings are checked: it loads every app.

        collector_settle()
        host, _, port = settings.E2A.bind.rpartition(":")
        uvicorn.run(
            application,
            host=host.strip("[]") or "127.0.0.1",
            port=int(port),
            loop="asyncio",
            ws="websockets-sansio",
            ws_max_size=FRAME_LIMIT,
            ws_ping_interval=25,
            ws_ping_timeout=30,
            ws_per_message_deflate=False,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=5,
            backlog=2048,
        )

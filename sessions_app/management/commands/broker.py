"""`manage.py broker`: model calls of programs inside sandboxes, with the tenants' keys."""

from __future__ import annotations

from typing import Any

import uvloop
from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from e2a.core.collector import collector_settle
from sandboxes.gateway.address import address_parse
from sandboxes.gateway.listening import AddressTaken, listening_socket
from sessions_app.broker.server import Broker


class Command(BaseCommand):
    help = "Pass model calls of programs inside sandboxes on, with the tenants' keys. Ends on SIGTERM."

    def handle(self, *args: Any, **options: Any) -> None:
        ours = settings.E2A
        try:
            address = address_parse(ours.broker_bind)
            broker = Broker(node_key=ours.node_key)
        except ValueError as error:
            raise CommandError(f"E2A_BROKER_BIND or E2A_NODE_KEY: {error}") from error
        collector_settle()
        try:
            with listening_socket(address) as listener:
                uvloop.run(broker.run(listener, on_ready=lambda: self._say(str(address))))
        except (AddressTaken, OSError) as error:
            raise CommandError(str(error)) from error

    def _say(self, address: str) -> None:
        self.stdout.write(f"broker: serves {address}")
        self.stdout.flush()

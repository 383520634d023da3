"""`manage.py gateway`: relay between web, workers and the guests of this host."""

from __future__ import annotations

from typing import Any

import uvloop
from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from e2a.core.collector import collector_settle
from sandboxes.gateway.address import address_parse
from sandboxes.gateway.listening import AddressTaken
from sandboxes.gateway.server import Gateway, run_until_signalled


class Command(BaseCommand):
    help = "Relay signed requests to the guests of this host. Ends on SIGTERM."
    # It has no database, and `check` would ask for one.
    requires_system_checks: list[str] = []

    def handle(self, *args: Any, **options: Any) -> None:
        ours = settings.E2A
        try:
            address = address_parse(ours.gateway_bind)
            gateway = Gateway(
                data_dir=ours.data_dir,
                node_key=ours.node_key,
                address=address,
                allow_private=ours.egress_allow_private,
                broker=address_parse(ours.broker_address),
            )
        except ValueError as error:
            raise CommandError(f"E2A_GATEWAY_BIND, E2A_BROKER_ADDRESS or E2A_NODE_KEY: {error}") from error
        collector_settle()
        try:
            uvloop.run(run_until_signalled(gateway, on_ready=lambda: self._say(str(address))))
        except (AddressTaken, OSError) as error:
            raise CommandError(str(error)) from error

    def _say(self, address: str) -> None:
        self.stdout.write(f"gateway: serves {address}")
        self.stdout.flush()

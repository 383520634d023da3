"""`manage.py sandboxes_remove_all --yes`: what uninstalling e2a from a host begins with."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from sandboxes.host import host_of


class Command(BaseCommand):
    help = (
        "Destroy every container, volume, loop and mount of this installation on this host. Stop e2a first."
    )
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--yes", action="store_true", help="Really do it.")

    def handle(self, *args: Any, **options: Any) -> None:
        if not options["yes"]:
            raise CommandError("This destroys every sandbox of this installation; say --yes.")
        host = host_of(settings.E2A)
        found: set[tuple[str, int]] = {
            (state.sandbox_id, state.generation) for state in host.engine.list_labelled(host.instance)
        }
        found |= {(left.sandbox_id, left.generation or 1) for left in host.engine.leftovers()}
        for sandbox_id, generation in sorted(found):
            host.engine.destroy(sandbox_id, generation)
        self.stdout.write(f"{len(found)} removed")

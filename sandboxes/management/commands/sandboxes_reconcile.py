"""`manage.py sandboxes_reconcile`: one pass by hand on this host, also when the breaker has tripped."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from e2a.core.errors import EngineError
from sandboxes.host import this_host
from sandboxes.reconcile import ReconcileMemory, reconcile


class Command(BaseCommand):
    help = "Make the containers of this host and the rows of the database agree, once."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--force",
            action="store_true",
            help="Also remove containers that no row knows, at once and however many they are.",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            report = reconcile(this_host(), ReconcileMemory(), is_forced=bool(options["force"]))
        except EngineError as error:
            raise CommandError(error.detail) from error
        self.stdout.write(
            f"dead: {report.dead}, containers removed: {report.orphans_removed}, "
            f"folders removed: {report.leftovers_removed}"
        )
        if report.is_tripped:
            raise CommandError(
                "Many containers have no row: none was removed. If that is right, use --force."
            )

"""`manage.py doctor`: look at this machine and its e2a, and say what to do about what is wrong."""

from __future__ import annotations

import json
import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from e2a.core.diagnosis import Finding, findings_of
from e2a.diagnosis import looks
from sandboxes.diagnosis.machine import LEAST_FREE_GIB


class Command(BaseCommand):
    help = (
        "Look at settings, database, Redis, clock, Docker, images, disks, kernel, processes and mail. Exit code 1 when "
        "something fails. Run it as the user, and with the environment, of the processes it is about."
    )
    # It must work where everything is broken.
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--json", action="store_true", help="one JSON array of {check, level, seen, advice}"
        )
        parser.add_argument(
            "--min-free-gib",
            type=float,
            default=LEAST_FREE_GIB,
            help=f"warn when a disk has less free ({LEAST_FREE_GIB:g}); below a fifth of it, fail",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        found = findings_of(looks(least_free_gib=options["min_free_gib"]))
        if options["json"]:
            self.stdout.write(json.dumps([finding.as_dict() for finding in found], indent=1))
        else:
            self._show(found)
        if any(finding.level == "fail" for finding in found):
            sys.exit(1)

    def _show(self, found: list[Finding]) -> None:
        styles = {"ok": self.style.SUCCESS, "warn": self.style.WARNING, "fail": self.style.ERROR}
        for finding in found:
            self.stdout.write(
                f"{styles[finding.level](f'{finding.level:<4}')} {finding.check}: {finding.seen}"
            )
            if finding.advice:
                self.stdout.write(f"     → {finding.advice}")
        counts = {level: sum(finding.level == level for finding in found) for level in ("ok", "warn", "fail")}
        self.stdout.write(", ".join(f"{count} {level}" for level, count in counts.items()))

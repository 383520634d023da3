"""`manage.py sandboxes_pool`: how well the warm pool serves."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from sandboxes.pool_figures import PoolFigures, pool_figures


class Command(BaseCommand):
    help = "Say for each template what is parked, how many creates came warm, and why the others did not."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--hours", type=float, default=24.0, help="count creates of so long (24, at most 720)"
        )
        parser.add_argument("--json", action="store_true", help="one JSON array")

    def handle(self, *args: Any, **options: Any) -> None:
        figures = pool_figures(since=dt.timedelta(hours=min(options["hours"], 720.0)))
        if options["json"]:
            self.stdout.write(json.dumps([one.as_dict() for one in figures]))
            return
        for one in figures:
            self.stdout.write(line_of(one))


def line_of(one: PoolFigures) -> str:
    rate = (
        "no creates"
        if one.hit_rate is None
        else f"{one.hits} warm, {one.missed} cold ({one.hit_rate:.0%} warm)"
    )
    reasons = f": {one.reasons}" if one.misses else ""
    return f"{one.template}: {one.parked} of {one.wanted} parked, {one.coming} coming; {rate}{reasons}"

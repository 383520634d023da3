"""`manage.py templates_sync`: make the template rows say what the catalogue says."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand

from sandboxes.catalogue import CATALOGUE, templates_sync


class Command(BaseCommand):
    help = "Write the built templates into the database. Runs by itself after migrate; twice is fine."

    def handle(self, *args: Any, **options: Any) -> None:
        templates_sync()
        self.stdout.write(f"templates: {', '.join(entry.name for entry in CATALOGUE)}")

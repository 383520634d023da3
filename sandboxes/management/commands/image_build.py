"""`manage.py image_build`: make the images that sandboxes of this host start from."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from e2a.core.errors import EngineError
from sandboxes.image_build import build_image
from sandboxes.image_files import template_names


class Command(BaseCommand):
    help = "Build the sandbox images on this host's Docker. One that is up to date is left alone."
    requires_system_checks: list[str] = []  # It needs Docker, and no database or secret.

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("templates", nargs="*", metavar="TEMPLATE", help="which ones; all by default")
        parser.add_argument("--base", help="the Debian image to build on, instead of choosing one")
        parser.add_argument("--mirror", help="the Debian mirror, when a base must be made with debootstrap")
        parser.add_argument("--again", action="store_true", help="build although the image is up to date")
        parser.add_argument(
            "--prune",
            action="store_true",
            help="then remove images of ours that nothing of this installation uses",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        for template in options["templates"] or template_names():
            try:
                build_image(
                    template,
                    docker_host=settings.E2A.docker_host,
                    say=self._say,
                    base=options["base"],
                    mirror=options["mirror"],
                    again=options["again"],
                )
            except EngineError as error:
                raise CommandError(error.detail) from error
        if options["prune"]:
            self._prune()

    def _prune(self) -> None:
        from sandboxes.image_prune import images_kept, images_prune  # Needs the database.

        try:
            removed = images_prune(images_kept(), docker_host=settings.E2A.docker_host)
        except EngineError as error:
            raise CommandError(error.detail) from error
        for tag in removed:
            self._say(f"removed {tag}")
        self._say(f"{len(removed)} images that nothing uses were removed")

    def _say(self, line: str) -> None:
        self.stdout.write(line)
        self.stdout.flush()

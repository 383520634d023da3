"""`manage.py template_add`: register an operator's own image as a template, and wait for its trial run."""

from __future__ import annotations

import time
from decimal import Decimal, InvalidOperation
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from e2a.core.errors import Conflict, ValidationFailed
from sandboxes.models import ContainerRuntime, Template, TemplateState
from sandboxes.templates import template_add

WAIT_SECONDS = 600
_LOOK_SECONDS = 0.5


def _cores(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation as error:
        raise CommandError(f"--vcpu is a number of cores, not {text!r}") from error


class Command(BaseCommand):
    help = "Make an image a template. A node tries it; the command waits and says how that ended."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name", help="small letters, digits and dashes")
        parser.add_argument("image", help="as Docker knows it, such as python:3.12-slim")
        parser.add_argument("--vcpu", default="1", help="cores, 1 by default")
        parser.add_argument("--memory-mib", type=int, default=1024, help="1024 by default")
        parser.add_argument("--disk-mib", type=int, default=2048, help="2048 by default")
        parser.add_argument("--pids", type=int, default=256, help="processes and threads, 256 by default")
        parser.add_argument("--shm-mib", type=int, default=64, help="shared memory, 64 by default")
        parser.add_argument("--description", default="")
        parser.add_argument("--runtime", default="", choices=["", *ContainerRuntime.values])
        parser.add_argument("--no-wait", action="store_true", help="do not wait for the trial run")

    def handle(self, *args: Any, **options: Any) -> None:
        names = ("name", "image", "memory_mib", "disk_mib", "pids", "shm_mib", "description", "runtime")
        try:
            template = template_add(vcpu=_cores(options["vcpu"]), **{name: options[name] for name in names})
        except ValidationFailed as error:
            problems = "; ".join(f"{one.field}: {one.detail}" for one in error.errors)
            raise CommandError(problems) from error
        except Conflict as error:
            raise CommandError(error.detail) from error
        self.stdout.write(f"{template.name} is being tried on a node")
        if not options["no_wait"]:
            self._await(template)

    def _await(self, template: Template) -> None:
        give_up_at = time.monotonic() + WAIT_SECONDS
        while template.state == TemplateState.TRYING:
            if time.monotonic() > give_up_at:
                raise CommandError(
                    f"still being tried after {WAIT_SECONDS} s: is a node with Docker running?"
                )
            time.sleep(_LOOK_SECONDS)
            template.refresh_from_db()
        if template.state == TemplateState.REFUSED:
            raise CommandError(f"{template.name} is refused: {template.refusal}")
        self.stdout.write(f"{template.name} is ready: {template.image_id}")

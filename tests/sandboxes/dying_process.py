"""A node or worker process that kills itself with signal 9 at one step: `python -m tests.sandboxes.dying_process
WHAT SANDBOX_PK TARGET before|after`.

A process of its own, so that nothing of it runs after the kill: no `finally`, no lock given back by hand, no
transaction rolled back but by the database.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any

import django


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(target: str, when: str) -> None:
    """Let the function that `target` names (`module:name` or `module:Class.name`) be the last one that is called."""
    module_name, _, path = target.partition(":")
    holder: Any = importlib.import_module(module_name)
    *outer, name = path.split(".")
    for part in outer:
        holder = getattr(holder, part)
    real = getattr(holder, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            die()
        answer = real(*args, **kwargs)
        die()
        return answer

    setattr(holder, name, dying)


def main() -> None:
    what, pk, target, when = sys.argv[1:]
    django.setup()
    from django.conf import settings

    from sandboxes.host import host_of
    from sandboxes.models import Sandbox
    from sandboxes.provision import sandbox_provision
    from sandboxes.removal import sandbox_remove
    from sandboxes.services import sandbox_configure

    arm(target, when)
    if what == "provision":
        sandbox_provision(host_of(settings.E2A), int(pk))
    elif what == "remove":
        sandbox_remove(host_of(settings.E2A), int(pk))
    else:
        sandbox_configure(Sandbox.objects.select_related("node", "tenant", "template").get(pk=pk))


if __name__ == "__main__":
    main()

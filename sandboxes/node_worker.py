"""The node agent lives as long as the Celery worker of a node process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery.signals import worker_ready, worker_shutting_down
from django.conf import settings

if TYPE_CHECKING:
    from sandboxes.node import NodeAgent

_agents: list[NodeAgent] = []


@worker_ready.connect
def _start(**kwargs: Any) -> None:
    if settings.E2A.role != "node":
        return
    from sandboxes.node import NodeAgent  # Not before the apps are ready.

    agent = NodeAgent()
    agent.start()
    _agents.append(agent)


@worker_shutting_down.connect
def _stop(**kwargs: Any) -> None:
    while _agents:
        # Celery calls this from its signal handler: ask the threads to end, the worker's own end joins them.
        _agents.pop().stop(wait_seconds=0)

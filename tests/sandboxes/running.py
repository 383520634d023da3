"""A node as it really runs, in this process: agent threads, process or Docker engine, a gateway process, a
worker."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from asgiref.sync import async_to_sync
from django.conf import settings
from django.db import connections

from sandboxes import host as host_module
from sandboxes.host import Host
from sandboxes.models import Sandbox, SandboxState, Template
from sandboxes.node import NodeAgent, images_ensure
from sandboxes.node_images import LOOK_SECONDS
from sandboxes.removal import sandbox_remove

ROOT = Path(__file__).resolve().parents[2]
Answer = TypeVar("Answer")


def wait_until(condition: Callable[[], Any], *, seconds: float = 60.0, what: str = "") -> Any:
    """The first true value of `condition`, asked every 20 ms. Fails the test after `seconds`."""
    give_up_at = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < give_up_at, f"{what or 'the condition'} not true after {seconds:g} s"
        time.sleep(0.02)  # Between two looks; the wait itself has a limit.
    return value


def at_once(count: int, call: Callable[[int], Answer]) -> list[Answer | BaseException]:
    """`call(0)` … `call(count - 1)` from a barrier, each in a thread of its own; answers or errors in
    order."""
    barrier = threading.Barrier(count)
    answers: dict[int, Answer | BaseException] = {}

    def run(number: int) -> None:
        try:
            barrier.wait(60)
            answers[number] = call(number)
        except Exception as error:
            answers[number] = error
        finally:
            connections.close_all()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(answers) == count, f"{count - len(answers)} of {count} calls not done after 120 s"
    return [answers[number] for number in range(count)]


@contextmanager
def gateway_process() -> Iterator[subprocess.Popen[bytes]]:
    """A real `manage.py gateway` on the address that the settings name."""
    process = subprocess.Popen(
        [sys.executable, "manage.py", "gateway"],
        cwd=ROOT,
        env={**os.environ, "E2A_ROLE": "gateway"},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert b"serves" in line, f"the gateway did not start: {line!r}"
        yield process
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()


class RunningNode:
    """An agent and its host. `stop` leaves the containers, as a killed process would; `start` is the next
    process."""

    def __init__(self, host: Host, pool_size: int) -> None:
        self.host = host
        self.pool_size = pool_size
        self.agent: NodeAgent | None = None

    def start(self) -> NodeAgent:
        assert self.agent is None
        host_module._this_host[:] = [self.host]
        self.agent = NodeAgent(self.host, pool_sizes={"standard": self.pool_size})
        images_ensure(self.host)
        self.agent.images.due_at = time.monotonic() + LOOK_SECONDS  # It has just looked.
        self.agent.start()
        return self.agent

    def stop(self) -> None:
        if self.agent is not None:
            self.agent.stop(wait_seconds=10)
            self.agent = None

    def restart(self, host: Host) -> NodeAgent:
        """Another process of the same node: nothing is remembered but what is in the database and the
        engine."""
        self.stop()
        self.host = host
        return self.start()

    def wait_parked(self, count: int, *, seconds: float = 60.0) -> list[Sandbox]:
        rows = Sandbox.objects.filter(state=SandboxState.PARKED)
        wait_until(lambda: rows.count() >= count, seconds=seconds, what=f"{count} parked")
        return list(rows.order_by("pk"))

    def clear(self) -> None:
        """Take away everything of this node."""
        self.stop()
        for sandbox in Sandbox.objects.exclude(state=SandboxState.DESTROYED).select_related("node"):
            Sandbox.objects.filter(pk=sandbox.pk).update(state=SandboxState.STOPPING)
            sandbox_remove(self.host, sandbox.pk)
        for state in self.host.engine.list_labelled(self.host.instance):
            self.host.engine.destroy(state.sandbox_id, state.generation)
        for item in self.host.engine.leftovers():
            self.host.engine.destroy(item.sandbox_id, item.generation or 1)
        host_module._this_host.clear()


@contextmanager
def celery_worker(*queues: str) -> Iterator[Any]:
    """A real Celery worker in threads of this process."""
    from celery.contrib.testing.worker import start_worker

    from e2a.celery import app

    names = queues or ("control", "provision", "archives", f"node.{settings.E2A.node_name}")
    with (
        start_worker(
            app,
            pool="threads",
            concurrency=4,
            loglevel=logging.getLogger().level,  # It is set for the whole process, also for the tests that come after.
            queues=list(names),
            perform_ping_check=False,
            shutdown_timeout=20,
        ) as worker
    ):
        yield worker


def standard() -> Template:
    return Template.objects.get(name="standard")


def streamed(answer: Any) -> bytes:
    """The whole body of a streamed answer."""

    async def collect() -> bytes:
        return b"".join([piece async for piece in answer.streaming_content])

    return async_to_sync(collect)()


def streamed_until(answer: Any, text: bytes) -> None:
    """Read until `text` came, then leave as a client does that closes its connection."""

    async def read() -> None:
        seen = b""
        try:
            async for piece in answer.streaming_content:
                seen += piece
                if text in seen:
                    return
            raise AssertionError(f"the stream ended with {seen!r}")
        finally:
            await answer.streaming_content.aclose()

    async_to_sync(read)()
    answer.close()

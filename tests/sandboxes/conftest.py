"""Sandboxes on a real node: the process engine for speed, Docker where the test says so."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.conf import settings
from django.db import connections

from sandboxes.host import host_of
from sandboxes.models import Node, Sandbox, SandboxState, Template
from tests.sandboxes.running import RunningNode, celery_worker, gateway_process

# Threads and processes share the database here, so it is a file: SQLite's shared memory knows no waiting.
if connections["default"].vendor == "sqlite":
    connections["default"].settings_dict["TEST"]["NAME"] = str(settings.E2A.data_dir / "test.sqlite3")


@pytest.fixture(scope="session")
def gateway() -> Iterator[subprocess.Popen[bytes]]:
    with gateway_process() as process:
        yield process


@pytest.fixture
def settings_of_node(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Change what `settings.E2A` says, for this test."""

    def change(**values: Any) -> None:
        monkeypatch.setattr(settings, "E2A", dataclasses.replace(settings.E2A, **values))

    return change


@pytest.fixture
def make_node(
    transactional_db: None, gateway: object, settings_of_node: Callable[..., None]
) -> Iterator[Callable[..., RunningNode]]:
    """Starts the node `local`: `make_node(pool=2, capacity=10, engine="process")`."""
    made: list[RunningNode] = []

    def make(*, pool: int = 0, capacity: int = 20, engine: str = "process") -> RunningNode:
        settings_of_node(engine=engine, max_sandboxes=capacity)
        made.append(RunningNode(host_of(settings.E2A), pool))
        made[-1].start()
        return made[-1]

    yield make
    for node in made:
        node.clear()


@pytest.fixture(scope="session")
def template_images() -> dict[str, str]:
    """The image of every template, by its name. Built once; some three minutes on a machine that has none."""
    from sandboxes.image_build import build_image
    from sandboxes.image_files import template_names

    return {name: build_image(name).tag for name in template_names()}


@pytest.fixture
def template_node(template_images: dict[str, str], make_node: Callable[..., RunningNode]) -> RunningNode:
    """A node on Docker that has the images of all templates, and no pool."""
    return make_node(engine="docker")


@pytest.fixture
def node(make_node: Callable[..., RunningNode]) -> RunningNode:
    """A node without a pool."""
    return make_node()


@pytest.fixture
def worker(transactional_db: None) -> Iterator[Any]:
    """A worker for all queues that sandboxes use."""
    with celery_worker() as running:
        yield running


@pytest.fixture
def node_row(db: None) -> Node:
    """A live node that is nothing but a row, for what needs no container."""
    from e2a.core.clock import now

    Template.objects.filter(name="standard").update(image="e2a/standard", image_id="e2a/standard:test")
    return Node.objects.create(
        name="elsewhere",
        address="unix:/nowhere/gateway.sock",
        engine="docker",
        is_engine_up=True,
        capacity=1000,
        heartbeat_at=now(),
        images={"standard": {"tag": "e2a/standard:test", "id": "e2a/standard:test"}},
    )


@pytest.fixture
def parked_row(node_row: Node) -> Callable[[], Sandbox]:
    """A parked sandbox that is nothing but a row."""
    from e2a.core.clock import now

    def make() -> Sandbox:
        return Sandbox.objects.create(
            template=Template.objects.get(name="standard"),
            node=node_row,
            slot=Sandbox.objects.count(),
            state=SandboxState.PARKED,
            image_id="e2a/standard:test",
            created_at=now(),
        )

    return make

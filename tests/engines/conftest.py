"""Engines on the real Docker daemon and the real image, each test with its own instance and folder."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandboxes.engines.base import ContainerRef, Engine, SandboxSpec
from sandboxes.engines.docker import DockerConnection, DockerEngine
from sandboxes.engines.process import ProcessEngine
from sandboxes.image_build import build_image
from tests.engines.inside import wait_until_ready

SpecMaker = Callable[..., SandboxSpec]
Starter = Callable[[Engine, SandboxSpec], ContainerRef]


@pytest.fixture(autouse=True)
def _empty_redis() -> None:
    """Engines know nothing of Redis: the project's own fixture of this name is not needed here."""


@pytest.fixture(scope="session")
def standard_image() -> str:
    """The real image, built from the guest as it is now; a second when nothing but the guest changed."""
    return build_image("standard").tag


@pytest.fixture(scope="session")
def connection() -> DockerConnection:
    """Docker behind the engine's back: to look at it, and to do to it what an operator could do."""
    return DockerConnection(None)


@pytest.fixture
def instance() -> str:
    return f"test-{secrets.token_hex(4)}"


@pytest.fixture
def sandboxes_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="e2a-engines-"))
    yield folder / "sandboxes"
    shutil.rmtree(folder)


@pytest.fixture
def docker_engine(instance: str, sandboxes_folder: Path, standard_image: str) -> Iterator[DockerEngine]:
    engine = DockerEngine(instance=instance, sandboxes_folder=sandboxes_folder)
    yield engine
    _destroy_all(engine, instance)


@pytest.fixture
def process_engine(instance: str, sandboxes_folder: Path) -> Iterator[ProcessEngine]:
    engine = ProcessEngine(instance=instance, sandboxes_folder=sandboxes_folder)
    yield engine
    _destroy_all(engine, instance)


@pytest.fixture(params=["docker", "process"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """Each implementation of the Protocol in turn."""
    found: Engine = request.getfixturevalue(f"{request.param}_engine")
    return found


@pytest.fixture
def make_spec(instance: str, sandboxes_folder: Path, standard_image: str) -> SpecMaker:
    """A small sandbox; keyword arguments replace what a test is about."""

    def make(**changes: object) -> SandboxSpec:
        sandbox_id = str(changes.pop("sandbox_id", f"sbx_{secrets.token_hex(8)}"))
        fields: dict[str, object] = {
            "sandbox_id": sandbox_id,
            "instance": instance,
            "generation": 1,
            "image": standard_image,
            "memory_mib": 256,
            "cpu": 1.0,
            "disk_mib": 64,
            "pids": 64,
            "uid": 10_001,
            "gid": 10_001,
            "folder": sandboxes_folder / sandbox_id,
            "lifetime_seconds": 300,
        }
        return SandboxSpec(**(fields | changes))  # type: ignore[arg-type]

    return make


@pytest.fixture
def started() -> Starter:
    """Create, start and wait until the guest answers."""

    def start(engine: Engine, spec: SandboxSpec) -> ContainerRef:
        ref = engine.create(spec)
        engine.start(ref)
        wait_until_ready(spec)
        return ref

    return start


def _destroy_all(engine: Engine, instance: str) -> None:
    for state in engine.list_labelled(instance):
        engine.destroy(state.sandbox_id, state.generation)
    for leftover in engine.leftovers():
        engine.destroy(leftover.sandbox_id, leftover.generation or 1)

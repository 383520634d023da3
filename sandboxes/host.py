"""What a node process works with: its engine, its folder, its name, and which rows it is busy with."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from django.conf import settings

from e2a.settings.environment import E2ASettings
from sandboxes.engines.base import Engine
from sandboxes.witness import Witness

MAKING_PER_CPU = 4
"""Making one waits for the kernel and the engine most of the time: 20 of them were done soonest 8 at a time on two
CPUs (ARCHITECTURE 4)."""


MAKING_MOST = 32
"""However many CPUs: Docker's daemon serialises much of it."""


def making_at_once(cpus: int) -> int:
    """How many cold sandboxes a host of so many CPUs makes at the same time."""
    return max(4, min(MAKING_PER_CPU * cpus, MAKING_MOST))


@dataclass(slots=True)
class Host:
    """This host as its node process sees it. One a process, shared by its threads.

    `holder` names this process in leases: another process of the same node is not the same holder.
    """

    name: str
    address: str
    capacity: int
    instance: str
    sandboxes_folder: Path
    runtime: str
    engine: Engine
    holder: str = field(default_factory=lambda: f"{os.getpid()}-{secrets.token_hex(4)}")
    witness: Witness = field(default_factory=Witness)
    making: threading.BoundedSemaphore = field(
        default_factory=lambda: threading.BoundedSemaphore(making_at_once(os.cpu_count() or 1))
    )
    """Held by whoever makes a tenant's cold sandbox."""
    _busy: set[int] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def working_on(self, sandbox_pk: int) -> Iterator[bool]:
        """Yields False when another thread of this process is at that sandbox: then leave it alone."""
        with self._lock:
            is_free = sandbox_pk not in self._busy
            if is_free:
                self._busy.add(sandbox_pk)
        try:
            yield is_free
        finally:
            if is_free:
                with self._lock:
                    self._busy.discard(sandbox_pk)

    def busy(self) -> frozenset[int]:
        """The sandboxes that this process works on now."""
        with self._lock:
            return frozenset(self._busy)


def host_of(ours: E2ASettings) -> Host:
    """A host as the settings describe it."""
    folder = ours.data_dir / "sandboxes"
    return Host(
        name=ours.node_name,
        address=ours.node_address,
        capacity=ours.max_sandboxes,
        instance=ours.instance,
        sandboxes_folder=folder,
        runtime=ours.docker_runtime,
        engine=_engine(ours, folder),
    )


def _engine(ours: E2ASettings, folder: Path) -> Engine:
    # Imported here: only node processes may speak with an engine, and everybody imports the tasks.
    if ours.engine == "process":
        from sandboxes.engines.process import ProcessEngine

        return ProcessEngine(instance=ours.instance, sandboxes_folder=folder)
    from sandboxes.engines.docker import DockerEngine

    return DockerEngine(
        instance=ours.instance,
        sandboxes_folder=folder,
        docker_host=ours.docker_host,
        runtime=ours.docker_runtime,
        disk_write_bytes=ours.disk_write_mib * 1024 * 1024,
    )


_this_host: list[Host] = []
_making = threading.Lock()


def this_host() -> Host:
    """The host of this process, made when first asked for."""
    with _making:
        if not _this_host:
            _this_host.append(host_of(settings.E2A))
        return _this_host[0]


def host_forget() -> None:
    """The next `this_host` is made anew. For tests, whose settings change."""
    with _making:
        _this_host.clear()

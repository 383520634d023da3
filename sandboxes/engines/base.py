"""What every engine promises, and the small frozen types that cross its border.

An engine makes a sandbox's container, tells what became of it and takes it away. It knows no database row:
it is handed a `SandboxSpec` and answers with facts. Every step may be repeated with the same arguments, from
any number of threads and processes, because the callers are tasks that may run twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, Protocol

from e2a.core.errors import EngineError

ContainerStatus = Literal["created", "running", "paused", "exited"]
EventKind = Literal["created", "started", "paused", "resumed", "oom", "died", "destroyed"]

SANDBOX_ID = re.compile(r"[a-z]{2,8}_[a-zA-Z0-9]{1,64}")
INSTANCE = re.compile(r"[a-z0-9][a-z0-9-]{0,40}")

# The lowest uid of a slot: nothing of the image and no system account of the host uses one above it.
LOWEST_SLOT_UID = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxSpec:
    """Everything an engine needs to make one sandbox; nothing of it names a tenant.

    `folder` is `<data>/sandboxes/<sandbox_id>` on this host. `cpu` is in cores. `uid` and `gid` belong to the
    slot and are at least 10000. `lifetime_seconds` is enforced by the guest itself, None for no deadline yet.
    `runtime` is a name Docker knows (`runc`, `crun`, `runsc`); an unknown one fails, it never falls back.
    """

    sandbox_id: str
    instance: str
    generation: int
    image: str
    memory_mib: int
    cpu: float
    disk_mib: int
    pids: int
    uid: int
    gid: int
    folder: Path
    lifetime_seconds: int | None = None
    runtime: str = "runc"
    shm_mib: int = 64

    def __post_init__(self) -> None:
        if not SANDBOX_ID.fullmatch(self.sandbox_id):
            raise EngineError(f"{self.sandbox_id!r} is not a sandbox id")
        if not INSTANCE.fullmatch(self.instance):
            raise EngineError(f"{self.instance!r} is not an instance id")
        if self.folder.name != self.sandbox_id:
            raise EngineError(f"the folder of {self.sandbox_id} must bear its name, not {self.folder.name!r}")
        if min(self.uid, self.gid) < LOWEST_SLOT_UID:
            raise EngineError(f"uid and gid of a slot start at {LOWEST_SLOT_UID}, not {self.uid}:{self.gid}")
        if (
            self.generation < 1
            or self.pids < 1
            or self.memory_mib < 16
            or self.disk_mib < 16
            or self.cpu <= 0
        ):
            raise EngineError(f"{self.sandbox_id} has a limit that makes no sandbox: {self}")


@dataclass(frozen=True, slots=True)
class ContainerRef:
    """A container that exists. `adopted` is true when an earlier run of `create` had made it."""

    sandbox_id: str
    generation: int
    name: str
    container_id: str
    adopted: bool


@dataclass(frozen=True, slots=True)
class ContainerState:
    """What the engine knows of one container now.

    `exit_code` is None while it has not exited, and when nobody recorded how it ended: unknown is never 0.
    `oom` says that the whole container was ended by the kernel for memory, not that a child of it was.
    """

    sandbox_id: str
    generation: int
    instance: str
    container_id: str
    status: ContainerStatus
    exit_code: int | None = None
    oom: bool = False
    started_at: datetime | None = None
    finished_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """Whether the engine can be used. `soft_limits` are sentences about limits this host does not hold.

    `runtimes` are the names that a spec's `runtime` may have here; none where the engine knows no runtimes.
    """

    version: str
    available: bool
    detail: str
    soft_limits: tuple[str, ...] = ()
    started_at: datetime | None = None
    """When the engine itself was started, where that can be seen."""
    runtimes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """A container's memory as the kernel counts it, in bytes; None for what the kernel does not tell.

    `used_bytes` is without the file cache that can go at once, `peak_bytes` (the kernel's own high-water mark)
    with it. `oom_kills`: how many processes the kernel killed for memory since it was made.
    """

    used_bytes: int
    peak_bytes: int | None
    oom_kills: int | None


@dataclass(frozen=True, slots=True)
class ContainerEvent:
    """Something that happened to a labelled container. `exit_code` only with `died`, None when unknown.

    `oom` is also said when only a child was killed and the container lives on.
    """

    sandbox_id: str
    generation: int
    kind: EventKind
    at: datetime
    exit_code: int | None = None


@dataclass(frozen=True, slots=True)
class Leftover:
    """A sandbox folder (and what is mounted in it) that no container belongs to. `destroy` removes it.

    `generation` is None when the folder does not say (a crash before its record was written): any number
    given to `destroy` removes it. A folder being provisioned right now looks the same, so heed `age_seconds`.
    """

    sandbox_id: str
    generation: int | None
    mounts: tuple[str, ...]
    age_seconds: float


class EventStream(Protocol):
    """An endless iterator of events.

    `close()`, from any thread, ends it. EngineUnavailable when the engine is lost.
    """

    def __iter__(self) -> Iterator[ContainerEvent]: ...

    def close(self) -> None: ...


class Engine(Protocol):
    """Runs sandboxes. Raises EngineError (`retryable` says whether waiting helps) or EngineUnavailable.

    No method waits longer than the engine's own timeout. An engine serves one instance (one installation of
    e2a): it never touches a container that bears another instance's label, whatever it is named.
    """

    @property
    def name(self) -> str: ...

    def check(self) -> EngineStatus:
        """Say whether the engine can be used. Never raises, answers within about 3 s."""
        ...

    def create(self, spec: SandboxSpec) -> ContainerRef:
        """Make folder, disk, limits and container, labelled, not started. Adopts what an earlier call made.

        A newer generation replaces an older one whole; an older one than what exists is refused.
        """
        ...

    def start(self, ref: ContainerRef) -> None:
        """Start it; fine when it runs. EngineError `not_running` when it has ended: it is never run twice."""
        ...

    def inspect(self, sandbox_id: str, generation: int) -> ContainerState | None:
        """The state of one container, None when there is none."""
        ...

    def pause(self, sandbox_id: str, generation: int) -> None:
        """Freeze it; fine when it is frozen. EngineError `not_running` when it does not run."""
        ...

    def resume(self, sandbox_id: str, generation: int) -> None:
        """Thaw it; fine when it runs. EngineError `not_running` when it does not."""
        ...

    def destroy(self, sandbox_id: str, generation: int) -> None:
        """Kill and remove it with its disk, mounts and folder. Fine when nothing is there.

        What a newer generation of the same sandbox owns is left alone.
        """
        ...

    def list_labelled(self, instance: str) -> list[ContainerState]:
        """All containers of an instance, in any state."""
        ...

    def leftovers(self) -> list[Leftover]:
        """Folders, mounts and loop devices of this instance that no container belongs to."""
        ...

    def events(self, instance: str, *, since: datetime | None = None) -> EventStream:
        """Follow what happens to an instance's containers, from `since` (default: from now)."""
        ...

    def memory_use(self, container_id: str) -> MemoryUse | None:
        """What it uses now; None when it is gone, and where nobody counts. Reads files of the host only."""
        ...

    def last_output(self, sandbox_id: str) -> str:
        """What the sandbox printed last, then its guest's own last words, for the record of its death.

        Redacted by the guest. At most 64 KiB, and 16 KiB of the guest's. It reads the sandbox's folder, so call
        it before `destroy`.
        """
        ...


def container_name(instance: str, sandbox_id: str, generation: int) -> str:
    """The one name a container can have, so that making it twice is refused by the engine itself."""
    return f"e2a-{instance}-{sandbox_id.lower().replace('_', '-')}-g{generation}"

"""The process engine: the same guest as a plain child process, for fast tests and machines without Docker.

**It isolates nothing.** What runs in such a sandbox runs as the user who started e2a, sees that user's files
and network, and no limit holds but the guest's own deadline. It says so loudly, and production refuses it.

What Docker would keep, it keeps as files in the sandbox's folder, so that another process, or the same one
after a restart, can list, watch and end what it did not start itself.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from e2a.core.errors import EngineError
from sandboxes.engines.base import (
    ContainerEvent,
    ContainerRef,
    ContainerState,
    ContainerStatus,
    EngineStatus,
    EventKind,
    Leftover,
    MemoryUse,
    SandboxSpec,
    container_name,
)
from sandboxes.engines.host_folders import (
    LAST_OUTPUT_BYTES,
    Record,
    SandboxFolder,
    folders_without,
    sandbox_folder,
    sandbox_folders,
)
from sandboxes.engines.loop_disk import make_folder_disk
from sandboxes.engines.process_tree import (
    family,
    signal_all,
    start_ticks,
    status_letter,
)

logger = logging.getLogger(__name__)

GUEST = Path(__file__).parent.parent / "guest"
WARNING = (
    "E2A_ENGINE=process: NO ISOLATION. Commands of a sandbox run as this user, with this user's files and "
    "network, and no limit on memory, CPU, processes or disk. Only for tests and for a look around."
)
KILL_SECONDS = 5.0
EVENT_POLL_SECONDS = 0.1

# Runs the guest and writes down how it ended, so that the exit code outlives whoever started it.
KEEPER = '"$@" >guest.log 2>&1 </dev/null; code=$?; echo "$code" >exit.new && mv exit.new exit'


@dataclass(frozen=True, slots=True)
class Birth:
    """The process that keeps a guest. `ticks`, its start time, tells it from a later owner of its pid."""

    pid: int
    ticks: int
    started_at: float


class ProcessEngine:
    """Runs sandboxes as child processes of whoever calls `start`; see Engine, and the warning above."""

    name = "process"

    def __init__(self, *, instance: str, sandboxes_folder: Path, guest: Path = GUEST) -> None:
        self.instance = instance
        self.sandboxes_folder = sandboxes_folder.absolute()
        self.guest = guest
        self._lock = threading.Lock()
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._stopped: dict[str, set[tuple[int, int]]] = {}
        """Who a pause stopped, by sandbox."""
        logger.warning(WARNING)

    def check(self) -> EngineStatus:
        """See Engine. Available wherever there is /proc."""
        there = Path("/proc/self/stat").exists()
        detail = WARNING if there else f"the process engine needs /proc, which {sys.platform} has not"
        return EngineStatus(f"process on {platform.system()} {platform.release()}", there, detail, (WARNING,))

    def create(self, spec: SandboxSpec) -> ContainerRef:
        """See Engine. Makes the folder only."""
        if spec.instance != self.instance or spec.folder.absolute().parent != self.sandboxes_folder:
            raise EngineError(f"{spec.sandbox_id} is not of this engine's instance and folder")
        folder = SandboxFolder(spec.folder.absolute())
        record = Record(spec.sandbox_id, spec.instance, spec.generation, os.geteuid(), os.getegid())
        with folder.locked(make=True):
            if folder.predecessor(record) is not None:
                self._end(folder)
                folder.clear()
            folder.claim(record)
            folder.prepare(record, tmpfs=False)
            make_folder_disk(folder, uid=record.uid, gid=record.gid)
            command = folder.path / "command.json"
            adopted = command.exists()
            if not adopted:
                command.write_text(json.dumps(self._command(spec)))
        name = container_name(spec.instance, spec.sandbox_id, spec.generation)
        return ContainerRef(spec.sandbox_id, spec.generation, name, name, adopted)

    def start(self, ref: ContainerRef) -> None:
        """See Engine."""
        folder = sandbox_folder(self.sandboxes_folder, ref.sandbox_id)
        with folder.locked(make=False):
            state = self._state(folder, ref.generation)
            if state is None:
                raise EngineError(f"{ref.name} is gone", code="no_such_sandbox")
            if state.status == "exited":
                raise EngineError(f"{ref.name} has run and ended; it is never run twice", code="not_running")
            if state.status == "created":
                self._spawn(folder)

    def inspect(self, sandbox_id: str, generation: int) -> ContainerState | None:
        """See Engine."""
        return self._state(sandbox_folder(self.sandboxes_folder, sandbox_id), generation)

    def pause(self, sandbox_id: str, generation: int) -> None:
        """See Engine. Stops every process of the guest's family."""
        self._turn(sandbox_id, generation, signal.SIGSTOP, end="paused")

    def resume(self, sandbox_id: str, generation: int) -> None:
        """See Engine."""
        self._turn(sandbox_id, generation, signal.SIGCONT, end="running")

    def destroy(self, sandbox_id: str, generation: int) -> None:
        """See Engine."""
        folder = sandbox_folder(self.sandboxes_folder, sandbox_id)
        with folder.locked(make=False) as held:
            if held and folder.belongs_up_to(self.instance, generation):
                self._end(folder)
                folder.remove()
                self._stopped.pop(sandbox_id, None)

    def list_labelled(self, instance: str) -> list[ContainerState]:
        """See Engine."""
        found = []
        for folder in sandbox_folders(self.sandboxes_folder):
            record = folder.record()
            if record and record.instance == instance and (state := self._state(folder, record.generation)):
                found.append(state)
        return found

    def leftovers(self) -> list[Leftover]:
        """See Engine. Here a folder that was claimed but never became a sandbox."""
        owned = {(state.sandbox_id, state.generation) for state in self.list_labelled(self.instance)}
        return folders_without(owned, self.sandboxes_folder, self.instance)

    def events(self, instance: str, *, since: datetime | None = None) -> ProcessEventStream:
        """See Engine. There is nobody who remembers: what happened before `since` is not told."""
        return ProcessEventStream(self, instance)

    def memory_use(self, container_id: str) -> MemoryUse | None:
        """See Engine. Nobody counts a family of plain processes."""
        return None

    def last_output(self, sandbox_id: str) -> str:
        """See Engine."""
        folder = sandbox_folder(self.sandboxes_folder, sandbox_id)
        log = folder.path / "guest.log"
        words = ""
        if log.is_file():
            with log.open("rb") as file:
                file.seek(max(0, log.stat().st_size - LAST_OUTPUT_BYTES))
                words = file.read(LAST_OUTPUT_BYTES).decode(errors="replace")
        return folder.printed() + words

    def _command(self, spec: SandboxSpec) -> list[str]:
        # Paths relative to the folder: a socket's address has at most 107 bytes.
        command = [sys.executable, "-I", "-S", "-B", str(self.guest / "__main__.py")]
        command += ["--no-isolation"]
        command += ["--listen", "guest/guest.sock", "--uid", str(os.geteuid()), "--gid", str(os.getegid())]
        command += ["--workspace", str(spec.folder.absolute() / "disk" / "workspace")]
        command += ["--home", str(spec.folder.absolute() / "disk" / "home")]
        if spec.lifetime_seconds is not None:
            command += ["--lifetime", str(spec.lifetime_seconds)]
        return command

    def _spawn(self, folder: SandboxFolder) -> None:
        command = json.loads((folder.path / "command.json").read_text())
        logger.warning("%s: starting without isolation: %s", folder.path.name, shlex.join(command))
        child = subprocess.Popen(
            ("/bin/sh", "-c", KEEPER, "e2a-sandbox", *command),
            cwd=folder.path,
            env={
                "PATH": "/usr/local/bin:/usr/bin:/bin",
                "LANG": "C.UTF-8",
                "HOME": str(folder.disk / "home"),
                "TMPDIR": str(folder.disk / "tmp"),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        with self._lock:
            self._children[child.pid] = child
        birth = Birth(child.pid, start_ticks(child.pid) or 0, time.time())
        fresh = folder.path / "birth.new"
        fresh.write_text(json.dumps(asdict(birth)))
        fresh.replace(folder.path / "birth.json")

    def _state(self, folder: SandboxFolder, generation: int) -> ContainerState | None:
        record = folder.record()
        if record is None or record.generation != generation or record.instance != self.instance:
            return None
        if not (folder.path / "command.json").exists():
            return None
        birth = _birth(folder)
        status: ContainerStatus = "created" if birth is None else self._status(birth)
        exit_file = folder.path / "exit"
        exit_code, finished_at = None, None
        if status == "exited":
            with suppress(FileNotFoundError, ValueError):
                exit_code = int(exit_file.read_text())
                finished_at = datetime.fromtimestamp(exit_file.stat().st_mtime, UTC)
        return ContainerState(
            sandbox_id=record.sandbox_id,
            generation=generation,
            instance=record.instance,
            container_id=container_name(record.instance, record.sandbox_id, generation),
            status=status,
            exit_code=exit_code,
            started_at=datetime.fromtimestamp(birth.started_at, UTC) if birth else None,
            finished_at=finished_at,
        )

    def _status(self, birth: Birth) -> ContainerStatus:
        with self._lock:
            child = self._children.get(birth.pid)
            if child is not None and child.poll() is not None:
                del self._children[birth.pid]
        if start_ticks(birth.pid) != birth.ticks:
            return "exited"
        letter = status_letter(birth.pid)
        if letter is None or letter in "ZX":
            return "exited"
        return "paused" if letter == "T" else "running"

    def _turn(
        self, sandbox_id: str, generation: int, number: signal.Signals, *, end: ContainerStatus
    ) -> None:
        folder = sandbox_folder(self.sandboxes_folder, sandbox_id)
        with folder.locked(make=False):
            state, birth = self._state(folder, generation), _birth(folder)
            if state is None:
                raise EngineError(f"{sandbox_id} of generation {generation} is gone", code="no_such_sandbox")
            if birth is None or state.status not in {"running", "paused"}:
                raise EngineError(f"{sandbox_id} does not run, it is {state.status}", code="not_running")
            if state.status != end:
                members = family(birth.pid)
                if number == signal.SIGSTOP:
                    self._stopped[sandbox_id] = members
                else:  # Also who was stopped in the middle of a fork, whose parent ended: it is nobody's child now.
                    members |= self._stopped.pop(sandbox_id, set())
                signal_all(members, number)
                # On a busy machine the kernel shows the new state a moment after it took the signal.
                deadline = time.monotonic() + KILL_SECONDS
                while self._status(birth) not in (end, "exited"):
                    if time.monotonic() > deadline:
                        raise EngineError(
                            f"{sandbox_id} is not {end} after {KILL_SECONDS:g} s", retryable=True
                        )
                    time.sleep(0.005)

    def _end(self, folder: SandboxFolder) -> None:
        """Kill the guest and all that it started. Raises EngineError (retryable) when something stays."""
        birth = _birth(folder)
        if birth is None or self._status(birth) == "exited":
            return
        # Stopped first, so that nothing of the family is born while it is being counted.
        members = family(birth.pid)
        for _round in range(10):
            signal_all(members, signal.SIGSTOP)
            if (again := family(birth.pid) | members) == members:
                break
            members = again
        signal_all(members, signal.SIGKILL)
        deadline = time.monotonic() + KILL_SECONDS
        while self._status(birth) != "exited":
            if time.monotonic() > deadline:
                raise EngineError(f"pid {birth.pid} still runs after {KILL_SECONDS:g} s", retryable=True)
            time.sleep(0.005)


class ProcessEventStream:
    """Events found by looking ten times a second; see EventStream."""

    def __init__(self, engine: ProcessEngine, instance: str) -> None:
        self._engine = engine
        self._instance = instance
        self._closed = threading.Event()
        self._seen = self._look()

    def __iter__(self) -> Iterator[ContainerEvent]:
        while not self._closed.wait(EVENT_POLL_SECONDS):
            now = self._look()
            for key, state in now.items():
                before = self._seen.get(key)
                for kind in _kinds(before.status if before else None, state.status):
                    yield ContainerEvent(
                        state.sandbox_id,
                        state.generation,
                        kind,
                        datetime.now(UTC),
                        state.exit_code if kind == "died" else None,
                    )
            for sandbox_id, generation in self._seen.keys() - now.keys():
                yield ContainerEvent(sandbox_id, generation, "destroyed", datetime.now(UTC))
            self._seen = now

    def close(self) -> None:
        self._closed.set()

    def _look(self) -> dict[tuple[str, int], ContainerState]:
        states = self._engine.list_labelled(self._instance)
        return {(state.sandbox_id, state.generation): state for state in states}


def _kinds(before: ContainerStatus | None, now: ContainerStatus) -> list[EventKind]:
    """What must have happened between two looks at one sandbox."""
    if before == now:
        return []
    kinds: list[EventKind] = [] if before else ["created"]
    if before in {None, "created"} and now != "created":
        kinds.append("started")
    if now == "paused":
        kinds.append("paused")
    if before == "paused" and now == "running":
        kinds.append("resumed")
    if now == "exited":
        kinds.append("died")
    return kinds


def _birth(folder: SandboxFolder) -> Birth | None:
    try:
        return Birth(**json.loads((folder.path / "birth.json").read_text()))
    except FileNotFoundError:
        return None

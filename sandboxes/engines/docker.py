"""The Docker engine: the only module of the engines that speaks to the daemon. It translates its every error.

What a container looks like is `container_options`, what the daemon's answers mean is `container_facts`, what
a container stands on is `host_folders` and `loop_disk`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

import docker
import requests
from docker.errors import APIError, DockerException
from urllib3.exceptions import HTTPError

from e2a.core.errors import EngineError, EngineUnavailable
from sandboxes.engines.base import (
    ContainerEvent,
    ContainerRef,
    ContainerState,
    ContainerStatus,
    EngineStatus,
    Leftover,
    MemoryUse,
    SandboxSpec,
    container_name,
)
from sandboxes.engines.cgroup_memory import limit_sockets, memory_use
from sandboxes.engines.container_facts import (
    EVENT_KINDS,
    container_event,
    container_state,
    daemon_soft_limits,
)
from sandboxes.engines.container_options import (
    LABEL_GENERATION,
    LABEL_INSTANCE,
    LABEL_SANDBOX,
    container_config,
)
from sandboxes.engines.daemon_start import daemon_started_at
from sandboxes.engines.disk_rate import container_limit, is_possible
from sandboxes.engines.host_folders import Record, SandboxFolder, folders_without, sandbox_folder
from sandboxes.engines.loop_disk import loop_disks_possible, make_folder_disk, make_loop_disk

DEFAULT_HOST = "unix:///var/run/docker.sock"
CALL_SECONDS = 15.0
CHECK_SECONDS = 3.0
REMOVAL_SECONDS = 15.0
CONNECTIONS = 16

T = TypeVar("T")
Raw = dict[str, Any]


class DockerConnection:
    """One pooled, thread-safe client of a daemon, made when needed and again after the daemon was lost."""

    def __init__(self, docker_host: str | None, *, timeout_seconds: float = CALL_SECONDS) -> None:
        self.docker_host = docker_host or DEFAULT_HOST
        self.timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._client: docker.APIClient | None = None

    def run(self, what: str, call: Callable[[docker.APIClient], T]) -> T:
        """Make one call; `what` completes "Docker could not …". Raises EngineUnavailable or EngineError.

        A connection that a restarted daemon closed is noticed here and the call made once more on a new one,
        so every call handed in must bear being made twice.
        """
        client, fresh = self._connected()
        try:
            return self.translated(what, lambda: call(client))
        except EngineUnavailable as error:
            self._forget(client)
            if fresh or isinstance(error.__cause__, requests.exceptions.Timeout):
                raise
        client, _fresh = self._connected()
        return self.translated(what, lambda: call(client))

    def client(self, timeout_seconds: float) -> docker.APIClient:
        """A client of its own, for a stream or a long call; the caller closes it."""
        return self.translated(
            "answer",
            lambda: docker.APIClient(
                base_url=self.docker_host,
                version="auto",
                timeout=timeout_seconds,  # type: ignore[arg-type]  # the stub wants int, sockets take a float
                max_pool_size=CONNECTIONS,
            ),
        )

    def translated(self, what: str, call: Callable[[], T]) -> T:
        """Run a call of the library, its errors turned into ours; an HTTP error stays as the cause."""
        try:
            return call()
        except APIError as error:
            detail = error.explanation if isinstance(error.explanation, str) else str(error)
            retryable = (error.status_code or 0) >= HTTPStatus.INTERNAL_SERVER_ERROR
            raise EngineError(f"Docker could not {what}: {detail}", retryable=retryable) from error
        except requests.exceptions.Timeout as error:
            raise EngineUnavailable(f"Docker at {self.docker_host} did not {what} in time") from error
        except (requests.exceptions.RequestException, HTTPError, DockerException, OSError) as error:
            raise EngineUnavailable(f"Docker at {self.docker_host} does not answer: {error}") from error

    def _connected(self) -> tuple[docker.APIClient, bool]:
        with self._lock:
            if self._client is not None:
                return self._client, False
            self._client = self.client(self.timeout_seconds)
            return self._client, True

    def _forget(self, client: docker.APIClient) -> None:
        """Drop a client that lost its daemon; not closed, since other threads may be in a call of it."""
        with self._lock:
            if self._client is client:
                self._client = None


class DockerEngine:
    """Runs sandboxes as Docker containers on this host. `sandboxes_folder` is `<data>/sandboxes`.

    `docker_host` is None for the usual socket. `runtime` is what `check` looks for; each spec names its own.
    """

    name = "docker"

    def __init__(
        self,
        *,
        instance: str,
        sandboxes_folder: Path,
        docker_host: str | None = None,
        runtime: str = "runc",
        disk_write_bytes: int = 0,
        timeout_seconds: float = CALL_SECONDS,
    ) -> None:
        self.instance = instance
        self.sandboxes_folder = sandboxes_folder.absolute()
        self.runtime = runtime
        self.disk_write_bytes = disk_write_bytes
        self.connection = DockerConnection(docker_host, timeout_seconds=timeout_seconds)
        self.is_root = os.geteuid() == 0
        self.loop_disks = loop_disks_possible()

    def check(self) -> EngineStatus:
        """See Engine. Unavailable also when the daemon does not know the runtime of the setting."""
        try:
            client = self.connection.client(CHECK_SECONDS)
            try:
                info: Raw = self.connection.translated("describe itself", client.info)
            finally:
                client.close()
        except EngineError as error:
            return EngineStatus(version="", available=False, detail=error.detail)
        known = self.runtime in info["Runtimes"]
        if known:
            cgroup = info.get("CgroupVersion", "1")
            detail = f"runtime {self.runtime}, cgroup v{cgroup}, kernel {info['KernelVersion']}"
        else:
            names = ", ".join(sorted(info["Runtimes"]))
            detail = f"the runtime {self.runtime!r} is not known to this daemon; it knows {names}"
        limits = (*self._host_soft_limits(), *daemon_soft_limits(info))
        runtimes = tuple(sorted(info["Runtimes"]))
        started_at = daemon_started_at(self.connection.docker_host)
        return EngineStatus(
            f"Docker {info['ServerVersion']}", known, detail, limits, started_at=started_at, runtimes=runtimes
        )

    def create(self, spec: SandboxSpec) -> ContainerRef:
        """See Engine. 25 ms here. Raises EngineError `image_missing` when the image is not built."""
        if spec.instance != self.instance or spec.folder.absolute().parent != self.sandboxes_folder:
            raise EngineError(f"{spec.sandbox_id} is not of this engine's instance and folder")
        folder = SandboxFolder(spec.folder.absolute())
        guest_user = None if self.is_root else (os.geteuid(), os.getegid())
        uid, gid = guest_user or (spec.uid, spec.gid)
        record = Record(spec.sandbox_id, spec.instance, spec.generation, uid, gid)
        with folder.locked(make=True):
            if (older := folder.predecessor(record)) is not None:
                self._remove_container(container_name(self.instance, older.sandbox_id, older.generation))
                folder.clear()
            folder.claim(record)
            folder.prepare(record, tmpfs=self.is_root)
            config = container_config(spec, folder, guest_user=guest_user)
            if self.loop_disks:
                rate = self.disk_write_bytes
                device = make_loop_disk(
                    folder, disk_mib=spec.disk_mib, uid=uid, gid=gid, write_bytes_per_second=rate
                )
                config["HostConfig"]["BlkioDeviceWriteBps"] = container_limit(device, rate)
            else:
                make_folder_disk(folder, uid=uid, gid=gid)
            return self._create_container(spec, config)

    def start(self, ref: ContainerRef) -> None:
        """See Engine. 75 ms here. EngineError `runtime_failed` when the container's runtime said no."""
        state = self._present(ref.name)
        if state.status == "created":
            try:
                self.connection.run(f"start {ref.name}", lambda client: client.start(state.container_id))
            except EngineError as error:
                if "OCI runtime" not in error.detail:
                    raise
                raise EngineError(error.detail, code="runtime_failed", retryable=error.retryable) from error
            limit_sockets(state.container_id)
        elif state.status == "exited":
            raise EngineError(f"{ref.name} has run and ended; it is never run twice", code="not_running")

    def inspect(self, sandbox_id: str, generation: int) -> ContainerState | None:
        """See Engine. About 2 ms."""
        found = self._find(container_name(self.instance, sandbox_id, generation))
        return None if found is None else container_state(found)

    def pause(self, sandbox_id: str, generation: int) -> None:
        """See Engine. About 10 ms."""
        name = container_name(self.instance, sandbox_id, generation)
        self._turn("pause", name, lambda client: client.pause(name), start="running", end="paused")

    def resume(self, sandbox_id: str, generation: int) -> None:
        """See Engine. About 10 ms."""
        name = container_name(self.instance, sandbox_id, generation)
        self._turn("resume", name, lambda client: client.unpause(name), start="paused", end="running")

    def destroy(self, sandbox_id: str, generation: int) -> None:
        """See Engine. 60 ms here: killed at once, never a stop that waits."""
        folder = sandbox_folder(self.sandboxes_folder, sandbox_id)
        with folder.locked(make=False) as held:
            self._remove_container(container_name(self.instance, sandbox_id, generation))
            if held and folder.belongs_up_to(self.instance, generation):
                folder.remove()

    def list_labelled(self, instance: str) -> list[ContainerState]:
        """See Engine. About 2 ms a container."""
        filters = {"label": [f"{LABEL_INSTANCE}={instance}", LABEL_SANDBOX, LABEL_GENERATION]}
        rows = self.connection.run(
            "list containers", lambda client: client.containers(all=True, filters=filters)
        )
        found = [self._inspect(row["Id"]) for row in rows]
        return [container_state(container) for container in found if container is not None]

    def leftovers(self) -> list[Leftover]:
        """See Engine. Docker is asked first: a daemon that is down never makes everything look left over."""
        owned = {(state.sandbox_id, state.generation) for state in self.list_labelled(self.instance)}
        return folders_without(owned, self.sandboxes_folder, self.instance)

    def events(self, instance: str, *, since: datetime | None = None) -> DockerEventStream:
        """See Engine."""
        return DockerEventStream(self.connection, instance, since)

    def memory_use(self, container_id: str) -> MemoryUse | None:
        """See Engine."""
        return memory_use(container_id)

    def last_output(self, sandbox_id: str) -> str:
        """See Engine. Docker keeps no log of a sandbox: this is what its guest left in its folder."""
        return sandbox_folder(self.sandboxes_folder, sandbox_id).last_output()

    def _create_container(self, spec: SandboxSpec, config: Raw) -> ContainerRef:
        name = container_name(spec.instance, spec.sandbox_id, spec.generation)
        try:
            made = self.connection.run(f"create {name}", lambda client: _create(client, config, name))
        except EngineError as error:
            if _http_status(error) == HTTPStatus.CONFLICT and (found := self._find(name)) is not None:
                return ContainerRef(spec.sandbox_id, spec.generation, name, found["Id"], adopted=True)
            if _http_status(error) == HTTPStatus.NOT_FOUND:
                detail = f"the image {spec.image} is not built on this host"
                raise EngineError(detail, code="image_missing") from error
            raise
        return ContainerRef(spec.sandbox_id, spec.generation, name, made["Id"], adopted=False)

    def _find(self, name: str) -> Raw | None:
        """Inspect by name. EngineError when the name is taken by a container that is not ours."""
        found = self._inspect(name)
        if found is not None and (found["Config"]["Labels"] or {}).get(LABEL_INSTANCE) != self.instance:
            raise EngineError(f"the container {name} bears no label of {self.instance}; it is left alone")
        return found

    def _inspect(self, name_or_id: str) -> Raw | None:
        try:
            found: Raw = self.connection.run(
                f"inspect {name_or_id}", lambda client: client.inspect_container(name_or_id)
            )
        except EngineError as error:
            if _http_status(error) == HTTPStatus.NOT_FOUND:
                return None
            raise
        return found

    def _present(self, name: str) -> ContainerState:
        found = self._find(name)
        if found is None:
            raise EngineError(f"{name} is gone", code="no_such_sandbox")
        return container_state(found)

    def _turn(
        self,
        what: str,
        name: str,
        call: Callable[[docker.APIClient], None],
        *,
        start: ContainerStatus,
        end: ContainerStatus,
    ) -> None:
        """Pause or thaw. Fine when it is so already, or when somebody else did it at the same moment."""
        state = self._present(name)
        if state.status == end:
            return
        if state.status != start:
            raise EngineError(f"{name} does not run, it is {state.status}", code="not_running")
        try:
            self.connection.run(f"{what} {name}", call)
        except EngineError:
            if self._present(name).status != end:
                raise

    def _remove_container(self, name: str) -> None:
        """Kill and remove, and return when it is gone. Raises EngineError (retryable) after 15 s."""
        deadline = time.monotonic() + REMOVAL_SECONDS
        while self._find(name) is not None:
            try:
                self.connection.run(
                    f"remove {name}", lambda client: client.remove_container(name, v=True, force=True)
                )
            except EngineUnavailable:
                raise
            except EngineError as error:
                # 404: somebody else was faster. 409: somebody else is at it. 500: "device busy", soon over.
                if time.monotonic() > deadline:
                    detail = f"{name} is not removed after {REMOVAL_SECONDS:g} s: {error.detail}"
                    raise EngineError(detail, retryable=True) from error
                time.sleep(0.02)

    def _host_soft_limits(self) -> list[str]:
        limits = []
        if not self.is_root:
            limits.append("not root: all sandboxes have one uid and share the kernel's per-uid limits")
            limits.append("not root: the guest's folder is the host's disk, without a size limit")
            if not Path("/sys/fs/cgroup/cgroup.controllers").exists():
                limits.append("not root, cgroup v1: the buffers of a sandbox's sockets are not counted")
        if not self.loop_disks:
            limits.append("no loop disks (root, /dev/loop-control, mkfs.ext4): disk_mib is not enforced")
        elif self.disk_write_bytes and not is_possible():
            limits.append("cgroup v1 without blkio throttling: how fast a disk is written is not limited")
        return limits


class DockerEventStream:
    """Docker's events for one instance; see EventStream."""

    def __init__(self, connection: DockerConnection, instance: str, since: datetime | None) -> None:
        self._connection = connection
        self._closed = False
        self._client = connection.client(CALL_SECONDS)
        filters = {
            "type": "container",
            "label": [f"{LABEL_INSTANCE}={instance}", LABEL_SANDBOX, LABEL_GENERATION],
            "event": list(EVENT_KINDS),
        }
        start: Any = None if since is None else f"{since.timestamp():.6f}"
        self._stream: Any = connection.translated(
            "stream events", lambda: self._client.events(since=start, filters=filters, decode=True)
        )

    def __iter__(self) -> Iterator[ContainerEvent]:
        while True:
            try:
                raw = self._connection.translated("stream events", lambda: next(self._stream, None))
            except EngineUnavailable:
                if self._closed:
                    return
                raise
            if raw is None:
                if self._closed:
                    return
                raise EngineUnavailable(f"the events of Docker at {self._connection.docker_host} ended")
            yield container_event(raw)

    def close(self) -> None:
        self._closed = True
        self._stream.close()
        self._client.close()


def _create(client: docker.APIClient, config: Raw, name: str) -> Raw:
    made: Raw = client.create_container_from_config(config, name)  # type: ignore[no-untyped-call]
    return made


def _http_status(error: EngineError) -> int | None:
    return error.__cause__.status_code if isinstance(error.__cause__, APIError) else None

"""Crashes and lost daemons: what is found, what is healed, and what never hangs."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2a.core.errors import EngineError, EngineUnavailable
from sandboxes.engines.base import container_name
from sandboxes.engines.docker import DockerConnection, DockerEngine
from sandboxes.engines.process import ProcessEngine
from sandboxes.engines.process_tree import status_letter
from tests.engines.conftest import SpecMaker, Starter
from tests.engines.inside import run, wait_for

DAEMON = "/var/run/docker.sock"


class DaemonPort:
    """A socket that stands for the daemon's: it can be missing, mute, or the real thing."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "docker.sock"
        self.host = f"unix://{self.path}"
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []

    def up(self, *, mute: bool = False) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(64)
        threading.Thread(target=self._accept, args=(self._listener, mute), daemon=True).start()

    def down(self) -> None:
        """As a daemon that was killed: no listener, every connection gone."""
        assert self._listener is not None
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._listener = None
        self.path.unlink()
        for held in self._open:
            cut(held)
        self._open.clear()

    def _accept(self, listener: socket.socket, mute: bool) -> None:
        while True:
            try:
                caller, _address = listener.accept()
            except OSError:
                return
            self._open.append(caller)
            if not mute:
                daemon = socket.socket(socket.AF_UNIX)
                daemon.connect(DAEMON)
                self._open.append(daemon)
                threading.Thread(target=pump, args=(caller, daemon), daemon=True).start()
                threading.Thread(target=pump, args=(daemon, caller), daemon=True).start()


def cut(held: socket.socket) -> None:
    try:
        held.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


def pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
    except OSError:
        return
    finally:
        cut(sink)


@pytest.fixture
def port() -> Iterator[DaemonPort]:
    folder = Path(tempfile.mkdtemp(prefix="e2a-daemon-"))
    made = DaemonPort(folder)
    yield made
    if made._listener is not None:
        made.down()
    shutil.rmtree(folder)


@pytest.fixture
def behind_port(port: DaemonPort, docker_engine: DockerEngine) -> DockerEngine:
    """The same instance and folder as `docker_engine`, but reaching Docker through `port`."""
    return DockerEngine(
        instance=docker_engine.instance,
        sandboxes_folder=docker_engine.sandboxes_folder,
        docker_host=port.host,
        timeout_seconds=1,
    )


def test_a_daemon_that_is_down_is_said_to_be_unavailable_at_once(
    behind_port: DockerEngine, make_spec: SpecMaker
) -> None:
    spec = make_spec()
    began = time.monotonic()
    for call in (
        lambda: behind_port.create(spec),
        lambda: behind_port.inspect(spec.sandbox_id, 1),
        lambda: behind_port.destroy(spec.sandbox_id, 1),
        lambda: behind_port.list_labelled(spec.instance),
        lambda: behind_port.leftovers(),
        lambda: behind_port.events(spec.instance),
    ):
        with pytest.raises(EngineUnavailable) as down:
            call()
        assert down.value.retryable is True
    found = behind_port.check()
    assert (found.available, found.version) == (False, "")
    assert "docker.sock" in found.detail
    assert time.monotonic() - began < 3


def test_a_daemon_that_does_not_answer_ends_in_a_time_out(
    behind_port: DockerEngine, port: DaemonPort, make_spec: SpecMaker
) -> None:
    port.up(mute=True)
    began = time.monotonic()
    with pytest.raises(EngineUnavailable):
        behind_port.inspect("sbx_any", 1)
    assert behind_port.check().available is False
    assert time.monotonic() - began < 8


def test_the_engine_heals_by_itself_when_the_daemon_is_back(
    behind_port: DockerEngine, port: DaemonPort, make_spec: SpecMaker
) -> None:
    """Invariant 10. Also: the first call after a restart is not lost to a connection that died with it."""
    spec = make_spec()
    with pytest.raises(EngineUnavailable):
        behind_port.create(spec)
    port.up()
    assert behind_port.create(spec).adopted is False
    port.down()
    port.up()
    assert behind_port.check().available is True
    state = behind_port.inspect(spec.sandbox_id, 1)
    assert state is not None
    assert state.status == "created"


def test_the_events_say_that_the_daemon_was_lost(
    behind_port: DockerEngine, port: DaemonPort, instance: str
) -> None:
    port.up()
    stream = behind_port.events(instance)
    raised: list[Exception] = []

    def read() -> None:
        try:
            list(stream)
        except EngineUnavailable as error:
            raised.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    port.down()
    reader.join(timeout=10)
    assert len(raised) == 1


def test_events_of_the_past_are_told_to_who_asks_since_when(
    docker_engine: DockerEngine, make_spec: SpecMaker, started: Starter, connection: DockerConnection
) -> None:
    spec = make_spec()
    ref = started(docker_engine, spec)
    connection.run("kill", lambda client: client.kill(ref.container_id))
    wait_for(lambda: (s := docker_engine.inspect(spec.sandbox_id, 1)) and s.status == "exited", "its end")
    state = docker_engine.inspect(spec.sandbox_id, 1)
    assert state is not None
    assert (state.exit_code, state.oom) == (137, False)
    assert state.started_at is not None
    stream = docker_engine.events(spec.instance, since=state.started_at)
    seen = next(event for event in stream if event.kind == "died")
    stream.close()
    assert (seen.sandbox_id, seen.exit_code) == (spec.sandbox_id, 137)


def test_memory_running_out_inside_is_an_event_though_the_sandbox_lives(
    docker_engine: DockerEngine, make_spec: SpecMaker, started: Starter
) -> None:
    spec = make_spec(memory_mib=128)
    started(docker_engine, spec)
    stream = docker_engine.events(spec.instance)
    assert run(spec, "python3 -c 'held = bytearray(300 * 1024 * 1024)'").exit_code == 137
    seen = next(iter(stream))
    stream.close()
    assert (seen.kind, seen.sandbox_id) == ("oom", spec.sandbox_id)


@pytest.mark.parametrize("crashed_after", ["folder", "record", "half-made image", "disk", "container"])
def test_create_goes_on_where_a_crash_left_it(
    docker_engine: DockerEngine, make_spec: SpecMaker, started: Starter, crashed_after: str, instance: str
) -> None:
    spec = make_spec()
    if crashed_after == "folder":
        spec.folder.mkdir(parents=True)
    elif crashed_after == "record":
        docker_engine.create(spec)
        docker_engine.connection.run("remove", lambda c: c.remove_container(_name(spec.sandbox_id, instance)))
        os.system(
            f"umount {spec.folder}/guest {spec.folder}/disk; rm -rf {spec.folder}/[a-q]* {spec.folder}/h*"
        )
    elif crashed_after == "half-made image":
        spec.folder.mkdir(parents=True)
        (spec.folder / "disk.new").write_bytes(b"half")
    elif crashed_after == "disk":
        docker_engine.create(spec)
        docker_engine.connection.run("remove", lambda c: c.remove_container(_name(spec.sandbox_id, instance)))
    else:
        docker_engine.create(spec)
    started(docker_engine, spec)
    assert run(spec, "echo fine > /workspace/x; cat /workspace/x").output == "fine\n"


def test_a_container_that_lost_its_folder_is_removed_all_the_same(
    docker_engine: DockerEngine, make_spec: SpecMaker, instance: str
) -> None:
    spec = make_spec()
    docker_engine.create(spec)
    os.system(f"umount {spec.folder}/guest {spec.folder}/disk; rm -rf {spec.folder}")
    assert len(docker_engine.list_labelled(instance)) == 1
    docker_engine.destroy(spec.sandbox_id, 1)
    assert docker_engine.list_labelled(instance) == []


def test_a_container_whose_disk_is_not_mounted_does_not_start_on_the_hosts_disk(
    docker_engine: DockerEngine, make_spec: SpecMaker
) -> None:
    spec = make_spec()
    ref = docker_engine.create(spec)
    os.system(f"umount {spec.folder}/disk")
    with pytest.raises(EngineError):
        docker_engine.start(ref)


def test_a_sandbox_without_a_container_is_left_over_with_its_mounts(
    docker_engine: DockerEngine, make_spec: SpecMaker, instance: str
) -> None:
    spec = make_spec()
    docker_engine.create(spec)
    docker_engine.connection.run("remove", lambda c: c.remove_container(_name(spec.sandbox_id, instance)))
    left = docker_engine.leftovers()
    assert [(item.sandbox_id, item.generation) for item in left] == [(spec.sandbox_id, 1)]
    assert set(left[0].mounts) == {f"{spec.folder}/guest", f"{spec.folder}/disk"}
    docker_engine.destroy(spec.sandbox_id, 1)
    assert docker_engine.leftovers() == []


def test_a_disk_that_is_in_use_is_detached_and_goes_with_its_user(
    docker_engine: DockerEngine, make_spec: SpecMaker
) -> None:
    spec = make_spec()
    docker_engine.create(spec)
    with open(spec.folder / "disk" / "workspace" / "held", "wb") as held:
        docker_engine.destroy(spec.sandbox_id, 1)
        held.write(b"x")
    assert not spec.folder.exists()


def test_a_foreign_container_of_our_name_is_never_touched(
    docker_engine: DockerEngine, make_spec: SpecMaker, connection: DockerConnection, instance: str
) -> None:
    spec = make_spec()
    name = _name(spec.sandbox_id, instance)
    connection.run(
        "create", lambda client: client.create_container(spec.image, entrypoint=["/bin/true"], name=name)
    )
    try:
        for call in (
            lambda: docker_engine.create(spec),
            lambda: docker_engine.inspect(spec.sandbox_id, 1),
            lambda: docker_engine.destroy(spec.sandbox_id, 1),
        ):
            with pytest.raises(EngineError):
                call()
        assert docker_engine.list_labelled(instance) == []
    finally:
        connection.run("remove", lambda client: client.remove_container(name))


def test_a_process_sandbox_outlives_the_engine_that_started_it(
    process_engine: ProcessEngine, make_spec: SpecMaker, started: Starter
) -> None:
    spec = make_spec()
    started(process_engine, spec)
    later = ProcessEngine(instance=spec.instance, sandboxes_folder=process_engine.sandboxes_folder)
    assert [state.status for state in later.list_labelled(spec.instance)] == ["running"]
    later.destroy(spec.sandbox_id, 1)
    assert process_engine.list_labelled(spec.instance) == []


def test_a_process_sandbox_takes_everything_it_started_along(
    process_engine: ProcessEngine, make_spec: SpecMaker, started: Starter
) -> None:
    spec = make_spec()
    started(process_engine, spec)
    pid = int(run(spec, "setsid sh -c 'echo $$; exec sleep 300' & sleep 0.3").output or 0)
    assert status_letter(pid) == "S"
    process_engine.destroy(spec.sandbox_id, 1)
    wait_for(lambda: status_letter(pid) in {None, "Z"}, "the end of what it started")


def _name(sandbox_id: str, instance: str) -> str:
    return container_name(instance, sandbox_id, 1)

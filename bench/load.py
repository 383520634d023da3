"""The measures of `python -m bench.more`: many at once, many idle, great files, a terminal. Every call checks what it
got."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import docker
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from bench.docker_side import LABEL, TRUE
from bench.memory import megabytes, parents, with_descendants
from bench.product import Caller, Watcher, check
from bench.samples import Samples
from tests.live import LiveStack, wait_for

FILE_BYTES: Final = 64 * 1024 * 1024
READY_SECONDS: Final = 110.0
ECHO: Final = "terminal: a byte sent to its echo received"
ECHO_DOCKER: Final = "docker exec -t by the SDK: a byte sent to its echo received"


def create_name(parallel: int) -> str:
    return f"create by the API until it runs, cold, {parallel} at once"


def docker_create_name(parallel: int) -> str:
    return f"create and start by the SDK, {parallel} at once"


def exec_name(parallel: int) -> str:
    return f"exec by the API: `/bin/true`, {parallel} at once"


def docker_exec_name(parallel: int) -> str:
    return f"docker exec by the SDK: `/bin/true`, {parallel} at once"


def file_name(way: str, direction: str) -> str:
    return f"64 MiB {direction}: {way}"


@dataclass(slots=True)
class Load:
    """What the measures share."""

    stack: LiveStack
    watcher: Watcher
    callers: list[Caller]
    image: str
    samples: Samples
    notes: list[str] = field(default_factory=list)
    sandboxes: list[str] = field(default_factory=list)

    def at_once(self, count: int, call: Callable[[int], None]) -> None:
        """`call(0)` … `call(count - 1)` from a barrier. Raises the first error."""
        barrier = threading.Barrier(count)
        errors: list[Exception] = []

        def run(number: int) -> None:
            try:
                barrier.wait(60)
                call(number)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        if errors:
            raise errors[0]

    # -- creates

    def creates(self, parallel: int, *, keep: bool, is_timed: bool = True) -> None:
        """So many POSTs at once, each timed until its sandbox runs; then, unless kept, all are destroyed."""
        made: list[str] = []

        def create(number: int) -> None:
            began = time.perf_counter()
            answer = self.callers[number].call("POST", "/v1/sandboxes", {}, wants=201)
            sandbox = str(answer["vm_id"])
            made.append(sandbox)
            if answer["state"] != "running":
                self._wait_state(sandbox, "running")
            if is_timed:
                self.samples.add(create_name(parallel), (time.perf_counter() - began) * 1000)

        self.at_once(parallel, create)
        if keep:
            self.sandboxes += made
        else:
            self.destroy(made)

    def destroy(self, sandboxes: list[str]) -> None:
        for sandbox in sandboxes:
            self.callers[0].call("DELETE", f"/v1/sandboxes/{sandbox}", wants=200)
        for sandbox in sandboxes:
            self._wait_state(sandbox, "destroyed")

    def _wait_state(self, sandbox: str, state: str) -> None:
        query = "SELECT state FROM sandboxes_sandbox WHERE public_id = ?"
        wait_for(
            lambda: self.watcher.rows(query, sandbox) == [(state,)],
            what=f"{sandbox} is {state}", seconds=READY_SECONDS, every=0.02,
        )  # fmt: skip

    def docker_creates(self, parallel: int) -> None:
        """The same by the SDK alone, with the same limits but no disk, no guest and no network."""
        with _containers() as (client, made):

            def create(number: int) -> None:
                with self.samples.timed(docker_create_name(parallel)):
                    made.append(_started(client, self.image))

            self.at_once(parallel, create)

    # -- exec

    def execs(self, parallel: int, times: int) -> None:
        """In so many sandboxes at once, one command after the other in each; the same by Docker's own exec."""
        check(len(self.sandboxes) >= parallel, "not enough sandboxes are kept")

        def by_api(number: int) -> None:
            where = f"/v1/sandboxes/{self.sandboxes[number]}/exec"
            for _ in range(times):
                with self.samples.timed(exec_name(parallel)):
                    answer = self.callers[number].call("POST", where, {"argv": TRUE}, wants=200)
                check(answer["exit_code"] == 0, answer)

        self.at_once(parallel, by_api)
        with _containers() as (client, made):
            made += [_started(client, self.image) for _ in range(parallel)]

            def by_docker(number: int) -> None:
                for _ in range(times):
                    with self.samples.timed(docker_exec_name(parallel)):
                        code, _ = made[number].exec_run(TRUE)
                    check(code == 0, code)

            self.at_once(parallel, by_docker)

    # -- files

    def files(self, times: int) -> None:
        """64 MiB in and out: by the API, by `docker cp`, by the SDK's put_archive and get_archive."""
        sandbox = self.sandboxes[0]
        content = os.urandom(FILE_BYTES)
        with tempfile.TemporaryDirectory(prefix="e2a-bench-") as folder, _containers() as (client, made):
            path = Path(folder) / "in.bin"
            path.write_bytes(content)
            container = _started(client, self.image, writable=True)
            made.append(container)
            for _ in range(times):
                with self.samples.timed(file_name("by the API", "in")):
                    self.callers[0].upload(f"/v1/sandboxes/{sandbox}/files?path=big.bin", content)
                with self.samples.timed(file_name("by the API", "out")):
                    found = self.callers[0].download(f"/v1/sandboxes/{sandbox}/files?path=big.bin")
                check(found == content, "another file came back")
                with self.samples.timed(file_name("docker cp", "in")):
                    _copy(str(path), f"{container.id}:/tmp/cp.bin")
                with self.samples.timed(file_name("docker cp", "out")):
                    _copy(f"{container.id}:/tmp/cp.bin", f"{folder}/out.bin")
                check((Path(folder) / "out.bin").read_bytes() == content, "docker cp: another file")
                with self.samples.timed(file_name("put_archive by the SDK", "in")):
                    check(container.put_archive("/tmp", _archive(content)), "put_archive")
                with self.samples.timed(file_name("get_archive by the SDK", "out")):
                    stream, _ = container.get_archive("/tmp/sdk.bin")
                    raw = b"".join(stream)
                check(_first_file(raw) == content, "get_archive: another file")

    # -- terminal

    def echoes(self, times: int) -> None:
        """A key pressed in a terminal, until its echo is there. Noted and left out where there is no terminal."""
        sandbox = self.sandboxes[0]
        for sent in self._terminal_echoes(sandbox, times):
            self.samples.add(ECHO, sent)
        with _containers() as (client, made):
            container = _started(client, self.image)
            made.append(container)
            for sent in _docker_echoes(client, container, times):
                self.samples.add(ECHO_DOCKER, sent)

    def _terminal_echoes(self, sandbox: str, times: int) -> Iterator[float]:
        token = self.callers[0].token_of(sandbox)
        if token is None:
            self.notes.append(
                "This revision has no terminal (`POST …/token` is 404): its echo is not measured."
            )
            return
        url = f"ws://127.0.0.1:{self.stack.port}/v1/sandboxes/{sandbox}/terminal?token={token}"
        try:
            socket = connect(url, proxy=None, compression=None, open_timeout=20, close_timeout=5)
        except InvalidStatus as error:
            self.notes.append(
                f"The terminal's socket is refused ({error.response.status_code}): no echo is measured."
            )
            return
        with socket:
            # `cat` alone answers, by the terminal's own echo; a shell would draw its line anew.
            socket.send(b"stty -echo; echo re''ady; stty echo; exec cat\n")
            heard = b""
            while b"ready" not in heard:
                frame = socket.recv(timeout=30)
                heard += frame if isinstance(frame, bytes) else b""
            _drain(socket)
            for number in range(times):
                key = b"abcdefghij"[number % 10 : number % 10 + 1]
                began = time.perf_counter()
                socket.send(key)
                while not _is_echo(socket.recv(timeout=30), key):
                    continue
                yield (time.perf_counter() - began) * 1000
                time.sleep(0.02)  # Typed, not pasted.

    # -- idle

    def idle(self, count: int, seconds: float) -> dict[str, tuple[float, float]]:
        """PSS and CPU of `count` idle sandboxes: MB and percent of one CPU, in all and for each."""
        while len(self.sandboxes) < count:
            self.creates(min(10, count - len(self.sandboxes)), keep=True, is_timed=False)
        rows = self.watcher.rows("SELECT container_id FROM sandboxes_sandbox WHERE state = 'running'")
        client = docker.from_env(timeout=60)
        try:
            api: Any = client.api
            firsts = [int(api.inspect_container(row[0])["State"]["Pid"]) for row in rows]
        finally:
            client.close()
        parent_of = parents()
        inside = [pid for first in firsts for pid in with_descendants(first, parent_of)]
        shims = [parent_of[first] for first in firsts]
        product = [
            pid for child in self.stack.children().values() for pid in with_descendants(child, parent_of)
        ]
        groups = {
            f"{len(firsts)} idle sandboxes, guests and helpers": inside,
            "— their containerd-shims": shims,
            "the product's processes beside them": product,
        }
        before = {name: cpu_seconds(pids) for name, pids in groups.items()}
        time.sleep(seconds)
        found = {
            name: (megabytes(pids)[0], (cpu_seconds(pids) - before[name]) / seconds * 100)
            for name, pids in groups.items()
        }
        pss = sum(found[name][0] for name in list(groups)[:2]) / len(firsts)
        cpu = sum(found[name][1] for name in list(groups)[:2]) / len(firsts)
        return found | {"one idle sandbox with its shim": (pss, cpu)}


def cpu_seconds(pids: list[int]) -> float:
    """CPU time that these processes have used so far; one that has ended counts nothing."""
    ticks = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            continue
        fields = text[text.rindex(")") + 2 :].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def _containers() -> Iterator[tuple[Any, list[Any]]]:
    """A client of Docker, and a list of containers that are removed in the end."""
    client = docker.from_env(timeout=60, max_pool_size=40)
    made: list[Any] = []
    try:
        yield client, made
    finally:
        for container in made:
            container.remove(force=True)
        client.close()


def _started(client: Any, image: str, *, writable: bool = False) -> Any:
    """A container that only waits, under a sandbox's limits."""
    return client.containers.run(
        image, entrypoint=["/bin/sleep"], command=["infinity"], network_mode="none", labels={LABEL: "1"},
        mem_limit="512m", nano_cpus=500_000_000, pids_limit=256, init=True, detach=True, read_only=not writable,
    )  # fmt: skip


def _copy(source: str, target: str) -> None:
    subprocess.run(["docker", "cp", source, target], check=True, capture_output=True, timeout=120)


def _archive(content: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        entry = tarfile.TarInfo("sdk.bin")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def _first_file(raw: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        file = archive.extractfile(archive.getmembers()[0])
        assert file is not None
        return file.read()


def _is_echo(frame: str | bytes, key: bytes) -> bool:
    return isinstance(frame, bytes) and key in frame


def _drain(socket: Any) -> None:
    """Read what is on its way until nothing comes for a while."""
    while True:
        try:
            socket.recv(timeout=0.3)
        except TimeoutError:
            return


def _docker_echoes(client: Any, container: Any, times: int) -> Iterator[float]:
    """The same through `docker exec -t`."""
    made = client.api.exec_create(container.id, ["/bin/cat"], stdin=True, tty=True)
    stream = client.api.exec_start(made["Id"], tty=True, socket=True)
    raw = stream._sock
    try:
        raw.settimeout(30)
        for number in range(times):
            key = b"abcdefghij"[number % 10 : number % 10 + 1]
            began = time.perf_counter()
            raw.sendall(key)
            while key not in raw.recv(4096):
                continue
            yield (time.perf_counter() - began) * 1000
            time.sleep(0.02)
    finally:
        stream.close()

"""One round of each measure. Every call checks what it got: a wrong answer ends the run.

Samples of cheap calls are spaced: a sandbox may use half a CPU, and back to back the kernel would hold it up.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from websockets.sync.client import ClientConnection, connect

from bench.docker_side import RawDocker
from bench.guest_exec import guest_exec, posix_spawn
from bench.memory import megabytes, parents, with_descendants
from bench.product import Caller, Watcher, check
from bench.samples import Samples
from sandboxes.guest_client import GuestClient, ProcessSpec
from tests.live import LiveStack

CREATE_KEPT: Final = "create a warm session, bundle attached, kept connection"
CREATE_FRESH: Final = "create a warm session, bundle attached, fresh connection"
FIRST_OUTPUT: Final = "create to first output: POST, WebSocket, task, `hi`"
TASK_OUTPUT: Final = "task to first output on an open socket"
EXEC_ARGV: Final = "exec by the API: `/bin/true`"
EXEC_COMMAND: Final = "exec by the API: `true` by bash"
EXEC_SECRETS: Final = "exec by the API: `/bin/true`, bundle attached"
GUEST_GATEWAY: Final = "guest exec through the gateway: `/bin/true`"
GUEST_DIRECT: Final = "guest exec on its socket: `/bin/true`"
SPAWN: Final = "posix_spawn of `/bin/true` on the host"
DOCKER_RUN: Final = "docker run by the SDK: create, start, wait, remove `/bin/true`"
DOCKER_EXEC: Final = "docker exec by the SDK: `/bin/true`"
FRAME_STORED: Final = "WebSocket: frame's `ts` (stored) to received"
FRAME_PRINTED: Final = "WebSocket: printed in the sandbox to received"
PING: Final = "WebSocket: ping to pong"

ORDER: Final = (
    CREATE_KEPT, CREATE_FRESH, FIRST_OUTPUT, TASK_OUTPUT, EXEC_ARGV, EXEC_COMMAND, EXEC_SECRETS, DOCKER_EXEC,
    DOCKER_RUN, GUEST_GATEWAY, GUEST_DIRECT, SPAWN, FRAME_STORED, FRAME_PRINTED, PING,
)  # fmt: skip
"""As the table shows them."""

BUNDLE: Final = "bench"
SECRET: Final = "a secret of the benchmark, not of anybody"
LINES: Final = 20
PAUSE_SECONDS: Final = 0.006
"""Between samples of a guest: its command costs it about 2 ms of CPU, and it may use 50 of every 100."""

# `read` with a limit waits without a process of its own.
_LINES_COMMAND = 'for i in {1..%d}; do echo "$EPOCHREALTIME"; read -rt 0.05; done; true'
_SECRET_COMMAND = 'printf %s "$BENCH_SECRET" | sha256sum'


def spaced(times: int) -> Iterator[int]:
    """Count, with a pause after each."""
    for index in range(times):
        yield index
        time.sleep(PAUSE_SECONDS)


@dataclass(slots=True)
class Bench:
    """What the measures share: the product, two sandboxes for `exec`, a raw container, and the samples."""

    stack: LiveStack
    watcher: Watcher
    samples: Samples
    callers: tuple[Caller, ...]
    fresh: Caller
    raw: RawDocker
    warm: int = 0
    cold: int = 0
    plain_id: str = ""
    secret_id: str = ""
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def prepare(self) -> None:
        """Sandboxes that live for the whole run: one without secrets, one with the bundle."""
        for bundle in ([], [BUNDLE]):
            self.watcher.wait_settled()
            made = self.caller().call("POST", "/v1/sandboxes", {"secrets": bundle}, wants=201)
            check(made["state"] == "running", made)
            if bundle:
                self.secret_id = made["sandbox_id"]
            else:
                self.plain_id = made["sandbox_id"]
        self._exec(self.secret_id, {"command": f'[ "$({_SECRET_COMMAND})" = "{_secret_digest()}  -" ]'})
        for sandbox_id in (self.plain_id, self.secret_id):
            for _ in range(5):
                self._exec(sandbox_id, {"argv": ["/bin/true"]})

    def caller(self) -> Caller:
        """The keys in turn: each may call 600 times a minute."""
        return self.callers[next(self._numbers) % len(self.callers)]

    # -- creates

    def creates(self, *, keep_alive: bool) -> None:
        """One warm session from POST to the first byte of its output, then frames and pings on its socket."""
        self.watcher.wait_settled()
        caller = self.callers[0] if keep_alive else self.fresh
        if keep_alive:
            caller.warm_up()
        body = {"agent": {"kind": "shell"}, "user_id": "bench", "secrets": [BUNDLE]}
        began = time.perf_counter()
        session = caller.call("POST", "/v1/sessions", body, wants=201)
        created = time.perf_counter()
        try:
            with _socket_of(session) as socket:
                _say(socket, type="task", prompt="echo hi")
                first = _hear(socket, "stdout")
                heard = time.perf_counter()
                check(first["data"] == "hi\n", first)
                check(_hear(socket, "exit")["exit_code"] == 0, "echo hi")
                if self.watcher.is_warm(session["chat_session_id"]):
                    self.warm += 1
                    self.samples.add(CREATE_KEPT if keep_alive else CREATE_FRESH, (created - began) * 1000)
                    self.samples.add(FIRST_OUTPUT, (heard - began) * 1000)
                else:
                    self.cold += 1
                self._bundle_is_there(socket)
                self.watcher.wait_settled()
                self._task_output(socket)
                self._frames(socket)
                self._pings(socket)
        finally:
            self.caller().call("DELETE", f"/v1/sessions/{session['chat_session_id']}", wants=200)

    def _bundle_is_there(self, socket: ClientConnection) -> None:
        _say(socket, type="task", prompt=_SECRET_COMMAND)
        heard = _hear(socket, "stdout")
        check(heard["data"].split()[0] == _secret_digest(), heard)
        _hear(socket, "exit")

    def _task_output(self, socket: ClientConnection) -> None:
        for number in range(5):
            began = time.perf_counter()
            _say(socket, type="task", prompt=f"echo {number}")
            heard = _hear(socket, "stdout")
            self.samples.add(TASK_OUTPUT, (time.perf_counter() - began) * 1000)
            check(heard["data"] == f"{number}\n", heard)
            _hear(socket, "exit")

    def _frames(self, socket: ClientConnection) -> None:
        _say(socket, type="task", prompt=_LINES_COMMAND % LINES)
        lines = 0
        while (frame := _hear(socket, "stdout", "exit"))["type"] == "stdout":
            received = time.time()
            stored = dt.datetime.fromisoformat(frame["ts"]).timestamp()
            self.samples.add(FRAME_STORED, (received - stored) * 1000)
            for line in frame["data"].split():
                self.samples.add(FRAME_PRINTED, (received - float(line)) * 1000)
                lines += 1
        check(frame["exit_code"] == 0 and lines == LINES, f"{frame} after {lines} lines")

    def _pings(self, socket: ClientConnection) -> None:
        for number in spaced(10):
            with self.samples.timed(PING):
                _say(socket, type="ping", data=number)
                heard = _hear(socket, "pong")
            check(heard["data"] == number, heard)

    # -- exec

    def execs(self, times: int) -> None:
        """By the API and by Docker, one after the other."""
        self.watcher.wait_settled()
        for caller in self.callers:
            caller.warm_up()
        true = {"argv": ["/bin/true"]}
        for _ in spaced(times):
            self.samples.time_call(EXEC_ARGV, lambda: self._exec(self.plain_id, true))
            self.samples.time_call(EXEC_COMMAND, lambda: self._exec(self.plain_id, {"command": "true"}))
            self.samples.time_call(EXEC_SECRETS, lambda: self._exec(self.secret_id, true))
            self.samples.time_call(DOCKER_EXEC, self.raw.exec_true)

    def _exec(self, sandbox_id: str, body: dict[str, Any]) -> None:
        answer = self.caller().call("POST", f"/v1/sandboxes/{sandbox_id}/exec", body, wants=200)
        check((answer["exit_code"], answer["stdout"], answer["stderr"]) == (0, "", ""), answer)

    def guests(self, times: int) -> None:
        """The guest alone beside the kernel alone, one after the other."""
        self.watcher.wait_settled()
        address = str(self.stack.data_dir / "sandboxes" / self.plain_id / "guest" / "guest.sock")
        through = self._gateway_client()
        for _ in spaced(times):
            self.samples.time_call(SPAWN, posix_spawn)
            number = next(self._numbers)
            self.samples.time_call(GUEST_DIRECT, lambda: guest_exec(address, number, argv=["/bin/true"]))  # noqa: B023
            spec = ProcessSpec(id=f"bench-{number}", argv=("/bin/true",))
            time.sleep(PAUSE_SECONDS)
            ended = self.samples.time_call(GUEST_GATEWAY, lambda: through.run(spec))  # noqa: B023
            check(ended.exit_code == 0, ended)

    def _gateway_client(self) -> GuestClient:
        node_key = (self.stack.data_dir / "keys" / "e2a_node_key").read_text().strip().encode()
        ((address,),) = self.watcher.rows("SELECT address FROM sandboxes_node")
        return GuestClient(self.plain_id, address, node_key)

    def docker_run(self) -> None:
        self.watcher.wait_settled()
        self.samples.time_call(DOCKER_RUN, self.raw.run_true)

    # -- memory

    def memory(self) -> dict[str, tuple[float, float]]:
        """PSS and private memory in MB: one parked sandbox (the mean of all), and each process of the product."""
        self.watcher.wait_settled()
        parent_of = parents()
        inside: list[tuple[float, float]] = []
        shims: list[tuple[float, float]] = []
        for container in self.watcher.parked_containers():
            first = self.raw.pid_of(container)
            inside.append(megabytes(with_descendants(first, parent_of)))
            shims.append(megabytes([parent_of[first]]))
        found = {
            "one parked sandbox with its shim": _mean([*_added(inside, shims)]),
            "— its guest and helper": _mean(inside),
            "— its containerd-shim": _mean(shims),
        }
        processes = {
            name: megabytes(with_descendants(pid, parent_of)) for name, pid in self.stack.children().items()
        }
        assert self.stack.process is not None
        processes["up (supervisor)"] = megabytes([self.stack.process.pid])
        found["the product's processes together"] = (
            sum(pss for pss, _ in processes.values()),
            sum(own for _, own in processes.values()),
        )
        return found | {f"— {name}": value for name, value in sorted(processes.items())}


def _secret_digest() -> str:
    return hashlib.sha256(SECRET.encode()).hexdigest()


def _added(*parts: list[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    for group in zip(*parts, strict=True):
        yield sum(pss for pss, _ in group), sum(own for _, own in group)


def _mean(values: list[tuple[float, float]]) -> tuple[float, float]:
    return sum(pss for pss, _ in values) / len(values), sum(own for _, own in values) / len(values)


@contextmanager
def _socket_of(session: dict[str, Any]) -> Iterator[ClientConnection]:
    """As the browser's snippet of the contract opens it."""
    url = f"{session['connect_url']}?token={session['jwt']}"
    with connect(url, proxy=None, compression=None, open_timeout=20, close_timeout=5) as socket:
        yield socket


def _say(socket: ClientConnection, **frame: Any) -> None:
    socket.send(json.dumps(frame))


def _hear(socket: ClientConnection, *types: str) -> dict[str, Any]:
    """The next frame of one of these types. TimeoutError after 30 s of silence; WrongAnswer for an error frame."""
    while True:
        frame: dict[str, Any] = json.loads(socket.recv(timeout=30))
        if frame["type"] in types:
            return frame
        check(frame["type"] != "error", frame)


def standard_image(watcher: Watcher) -> str:
    ((image,),) = watcher.rows("SELECT image_id FROM sandboxes_template WHERE name = 'standard'")
    return str(image)

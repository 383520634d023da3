"""All processes of the sandbox, what is configured for them, and the limits they share."""

import os
import time

from . import messages
from .cgroup import PidsCgroup
from .pool import Pool
from .process import Process
from .redaction import Patterns
from .wire import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .cgroup import MemoryCgroup
    from .loop import Loop
    from .runner import Identity
    from .spec import Spec
    from .tail import Tail

RUNNING_LIMIT = 64
FINISHED_LIMIT = 32
LOG_TOTAL = 16 << 20
"""All logs together; beyond it the finished are forgotten, then the largest rings are cut."""
LOG_UNCOUNTED = LOG_TOTAL // (RUNNING_LIMIT + FINISHED_LIMIT)
"""Logs that are all this small cannot exceed the total."""
ROOM = 16
"""With fewer processes free, what ended commands left running gives way: a shell with a pipeline needs some."""
IDLE_SECONDS = 30.0
STRAY_SECONDS = 1.0


class Table:
    """Processes by id. The same id is never started twice."""

    def __init__(
        self,
        loop: "Loop",
        memory: "MemoryCgroup",
        identity: "Identity",
        home: str,
        path: str,
        own_env: dict[bytes, bytes] | None = None,
    ) -> None:
        self.loop = loop
        self.memory = memory
        self.patterns = Patterns()
        self.tail: Tail | None = None
        self._pids = PidsCgroup()
        self.pool = Pool(identity, loop.watch, loop.unwatch)
        self.bytes_in = 0
        self.bytes_out = 0
        self.configured = False
        self._identity = identity
        self._processes: dict[str, Process] = {}
        self._grown: dict[Process, None] = {}
        self._moved_at = time.monotonic()
        self._env: dict[bytes, bytes] = {}
        self._base_env = {
            **{name: value for name, value in (own_env or {}).items() if name != b"HOSTNAME"},
            b"PATH": os.fsencode(path),
            b"HOME": os.fsencode(home),
            b"USER": b"agent",
            b"LOGNAME": b"agent",
            b"SHELL": b"/bin/bash",
            b"LANG": b"C.UTF-8",
        }
        if not identity.isolated and "TMPDIR" in os.environ:
            self._base_env[b"TMPDIR"] = os.environb[b"TMPDIR"]  # The process engine's /tmp.

    def set_base_environment(self, more: dict[bytes, bytes]) -> None:
        """What every command gets unless it is configured or asked for otherwise."""
        self._base_env.update(more)

    def configure(self, env: dict[bytes, bytes], patterns: Patterns) -> None:
        """Replace environment and redaction wholly: the one for the next start, the other at once."""
        self._env = env
        self.patterns = patterns
        self.configured = True
        for process in self._processes.values():
            process.adopt_patterns()

    def start(self, spec: "Spec") -> tuple[Process, bool]:
        """Return the process of this id and whether it is new. Raises Refused at a limit."""
        known = self._processes.get(str(spec.id))
        if known is not None:
            return known, False
        if self.running >= RUNNING_LIMIT:
            raise Refused(409, "too_many_processes", f"at most {RUNNING_LIMIT} processes run at once")
        if self._is_crowded() and self.make_room():
            raise Refused(
                503, "no_resources", "what ended commands left running is at the limit of processes"
            )
        process = Process(self, spec)
        env = {**self._base_env}
        if spec.terminal:
            env[b"TERM"] = b"xterm-256color"
        env.update(self._env)
        env.update(spec.env)
        folder = os.path.join(os.fsencode(self._identity.workspace), spec.folder)
        with_stdin = bool(spec.stdin) or spec.keep_stdin_open
        job = (spec.argv, spec.script, folder, env, with_stdin, spec.terminal)
        self._processes[process.id] = process
        try:
            process.runner = self.pool.give(messages.SPAWN, job, [], process)
        except OSError as error:
            self.remove(process)
            self.loop.cancel((process, "start"))
            self.make_room()
            raise Refused(
                503, "no_resources", f"no process can be started: {os.strerror(error.errno or 11)}"
            ) from None
        spec.argv = spec.argv[:1]
        spec.script = None
        self._touch()
        if not self.pool.idle:
            # Off the hot path: a short command gives its runner back before this is due.
            self.loop.call_in("spare", 0.02, self._keep_spare)
        self.loop.call_in("idle", IDLE_SECONDS, self._trim_runners)
        return process, True

    def _keep_spare(self) -> None:
        if not self.pool.idle and self.running < RUNNING_LIMIT:
            try:
                self.pool.fork()
            except OSError:
                return  # At the limit of processes; the next start says so to its caller.

    def _trim_runners(self) -> None:
        self.pool.trim(1)

    def get(self, process_id: str) -> Process:
        process = self._processes.get(process_id)
        if process is None:
            raise Refused(404, "no_such_process", "there is no process of this id")
        return process

    def all(self) -> list[Process]:
        return list(self._processes.values())

    def remove(self, process: Process) -> None:
        if self._processes.get(process.id) is process:
            del self._processes[process.id]

    def forget(self, process: Process) -> None:
        """Kill it and let go of its id."""
        process.kill()
        self.remove(process)

    @property
    def running(self) -> int:
        return sum(not process.over for process in self._processes.values())

    def on_log_grown(self, process: Process) -> None:
        """Let followers have what is new, once for all that is ready now."""
        if not self._grown:
            self.loop.call_later(self._serve_followers)
        self._grown[process] = None

    def _serve_followers(self) -> None:
        grown, self._grown = self._grown, {}
        for process in grown:
            for follower in list(process.followers):
                follower.pump()
            if process.log.size > LOG_UNCOUNTED:
                self._bound_logs()

    def on_over(self, process: Process) -> None:
        self._touch()
        self.on_log_grown(process)
        self.trim()

    def trim(self) -> None:
        """Forget the oldest finished processes beyond the limit, never one that still has something
        running.
        """
        finished = [process for process in self._processes.values() if process.over and process.alone]
        for process in finished[: max(0, len(finished) - FINISHED_LIMIT)]:
            self.remove(process)

    def _bound_logs(self) -> None:
        total = sum(process.log.size for process in self._processes.values())
        if total <= LOG_TOTAL:
            return
        everyone = sorted(self._processes.values(), key=lambda one: (not one.over, -one.log.size))
        for process in everyone:
            if total <= LOG_TOTAL:
                return
            if process.over and process.alone and not process.followers:
                self.remove(process)
                total -= process.log.size
            elif not process.log.lossless:
                before = process.log.size
                process.log.trim(process.log.end - before // 2)
                total -= before - process.log.size

    def _is_crowded(self) -> bool:
        """Whether a command could perhaps be started, but would itself find no room for the processes it needs."""
        free = self._pids.free()
        return free is not None and free < ROOM

    def make_room(self) -> bool:
        """At the limit of processes: end what commands that are over left in the background. False when there is none.

        Else a fork bomb that outlived its command would leave the sandbox of no use to anybody. What still runs
        stays: it has somebody who can end it.
        """
        left = [process for process in self._processes.values() if process.over and not process.alone]
        for process in left:
            if not process.ending:
                process.kill()
        return bool(left)

    def watch_strays(self) -> None:
        """Look for what escapes from commands that lost their runner, for as long as there are any."""
        self.pool.kill_strays()
        if self.pool.adopting:
            self.loop.call_in("strays", STRAY_SECONDS, self.watch_strays)

    def reap(self) -> None:
        self.pool.reap()
        if self.pool.adopting and not self.loop.has("strays"):
            self.watch_strays()

    def note_moved(self, taken: int, sent: int) -> None:
        self.bytes_in += taken
        self.bytes_out += sent
        self._moved_at = time.monotonic()

    def _touch(self) -> None:
        self._moved_at = time.monotonic()

    def stats(self) -> dict[str, object]:
        open_ones = [process for process in self._processes.values() if not process.over]
        busy = [process for process in open_ones if not process.resting]
        running = len(open_ones)
        idle = time.monotonic() - self._moved_at
        return {
            **self.memory.usage(),
            "oom_kills": self.memory.oom_kills(),
            "running": running,
            "last_activity_seconds": 0.0 if running else round(idle, 3),
            "last_moved_seconds": round(idle, 3),
            "resting_terminals": running - len(busy),
            "longest_running_seconds": round(max([process.age for process in busy], default=0.0), 3),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
        }

"""One process from its start to its exit record: output, timeout, and signals to everything below it."""

import _signal  # type: ignore[import-not-found]
import errno
import os
import time

from . import linux, messages, wire
from .log import OutputLog
from .pipes import Input, Output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .follow import Follower
    from .pool import Runner
    from .spec import Spec
    from .table import Table

START_SECONDS = 5.0
GRACE_SECONDS = 1.0
"""Between TERM and KILL, when a timeout or a lost client ends a command."""
KILL_SECONDS = 3.0
"""After so long of KILL without an exit record, the runner itself is taken for stuck and killed."""
QUIET_SECONDS, DRAIN_SECONDS = 0.2, 1.0
"""How long output of what outlives the command is waited for: until quiet, and at most."""

SIGNALS = {
    name[3:]: int(getattr(_signal, name))
    for name in dir(_signal)
    if name.startswith("SIG") and not name.startswith("SIG_") and name not in ("SIGCLD", "SIGPOLL")
}
_SIGNAL_NAMES = {number: name for name, number in SIGNALS.items()}
_NO_PROGRAM = (errno.ENOENT, errno.ENOTDIR)
_NOT_EXECUTABLE = (*_NO_PROGRAM, errno.EACCES, errno.ENOEXEC, errno.EISDIR)
_NO_RESOURCES = (errno.EAGAIN, errno.ENOMEM, errno.ENFILE, errno.EMFILE)


class Process:
    """`over` once there is an exit record or none can come; until then its state is running."""

    def __init__(self, table: "Table", spec: "Spec") -> None:
        self.table = table
        self.id = str(spec.id)
        self.log = OutputLog(spec.log_bytes, spec.lossless, table.tail)
        self.pid = 0
        self.over = False
        self.alone = False
        """Nothing of it is left, not even what it put into the background."""
        self.kill_on_disconnect = spec.kill_on_disconnect
        self.followers: list[Follower] = []
        self.runner: Runner | None = None
        self._spec = spec
        self._status: int | None = None
        self._timed_out = False
        self._oom = False
        self._killed = False
        self._never_read = False
        self._pipes: list[Output] = []
        self._input: Input | None = None
        self._waiting: list[Callable[[wire.Refused | None], None]] = []
        self._oom_kills = table.memory.oom_kills()
        self._started_at = time.time()
        self._ended_at: float | None = None
        self._kill_from = 0.0
        self._kill_pause = 0.0
        self._drain_until = 0.0
        table.loop.call_in((self, "start"), START_SECONDS, self._on_stuck)

    # What it is at.

    @property
    def resting(self) -> bool:
        """A terminal whose shell waits at its prompt: nothing else is in its foreground."""
        if self._spec.terminal is None or self._input is None:
            return False
        return self.pid != 0 and self._input.foreground() == self.pid

    @property
    def age(self) -> float:
        return max(0.0, time.time() - self._started_at)

    # What the runner tells.

    @property
    def ended(self) -> bool:
        return self._status is not None

    @property
    def ending(self) -> bool:
        """Whether all of it is being killed just now."""
        return time.monotonic() < self._kill_from + KILL_SECONDS

    def on_started(self, pid: int, fds: list[int]) -> None:
        self.pid = pid
        self._started_at = time.time()
        self.table.loop.cancel((self, "start"))
        spec = self._spec
        if spec.timeout is not None:
            self.table.loop.call_in((self, "timeout"), spec.timeout, self._on_timeout)
        self._pipes = [Output(self, fds[0], wire.STDOUT)]
        if spec.terminal is not None:
            fds.append(os.dup(fds[0]))
        else:
            self._pipes.append(Output(self, fds[1], wire.STDERR))
        if spec.terminal is not None or len(fds) > 2:
            self._input = Input(
                self.table,
                fds[-1],
                spec.stdin,
                closing=not spec.keep_stdin_open,
                terminal=spec.terminal is not None,
            )
        spec.env = {}  # The command has them; our memory is counted.
        spec.stdin = b""
        self._tell_waiting(None)

    def on_refused(self, stage: int, number: int) -> None:
        self.table.loop.cancel((self, "start"))
        self._left_alone()
        reason = os.strerror(number)
        if stage == messages.AT_PROGRAM and number in _NOT_EXECUTABLE:
            # As a shell reports it: there was a process, and its end tells.
            name = os.fsdecode(self._spec.argv[0])
            told = f"{name}: {reason}\n".encode("utf-8", "replace")
            self.log.append(wire.STDERR, self.table.patterns.redact(told))
            self._status = (127 if number in _NO_PROGRAM else 126) << 8
            self._finish()
            self._tell_waiting(None)
            return
        self.over = True
        self.table.remove(self)
        if stage == messages.AT_FOLDER:
            refused = wire.Refused(400, "bad_cwd", f"cwd: {reason}")
        elif number == errno.E2BIG:
            refused = wire.Refused(400, "too_large", "the command or its environment is too large")
        elif number in _NO_RESOURCES:
            self.table.make_room()
            refused = wire.Refused(503, "no_resources", f"no process can be started: {reason}")
        else:
            refused = wire.Refused(400, "cannot_start", f"the process cannot be started: {reason}")
        self._tell_waiting(refused)

    def on_ended(self, status: int, alone: bool) -> None:
        self._status = status
        self._ended_at = time.time()
        self.table.loop.cancel((self, "timeout"))
        if status:
            self._judge_memory(status)
        if alone:
            self._left_alone()
        self._drain_until = time.monotonic() + DRAIN_SECONDS
        self._drain()

    def on_idle(self, taken: int, sent: int) -> None:
        self._left_alone()
        if self.over:
            self.table.trim()
        else:
            self._drain()

    def on_tunnels(self, kind: int, first: int, second: int) -> None:
        raise AssertionError("a command carries no tunnel")

    def on_adopted(self) -> None:
        self.runner = None
        self.table.watch_strays()

    def on_runner_lost(self) -> None:
        """The runner died and the command is not ours to reap: what was not reported stays unknown."""
        self._left_alone()
        for timer in ("start", "timeout"):
            self.table.loop.cancel((self, timer))
        if self._never_read:
            self.over = True
            self.table.remove(self)
            self._tell_waiting(wire.Refused(503, "no_resources", "the process could not be started"))
        elif self.over:
            self.table.trim()
        else:
            # Without a pid, too: it may have run, so its id must not be started again.
            self._drain_until = time.monotonic() + DRAIN_SECONDS
            self._drain()
            self._tell_waiting(None)

    def _left_alone(self) -> None:
        """Nothing of it is left: its runner may already be busy with something else."""
        self.alone = True
        self.runner = None
        self.table.loop.cancel((self, "kill"))

    def _judge_memory(self, status: int) -> None:
        """Decide whether memory ended it.

        The kernel's counter must have risen, and it died of a KILL that was not ours (a shell tells its
        child's as 137), or it failed while nothing else ran that could have been meant.
        """
        if self._killed or self.table.memory.oom_kills() <= self._oom_kills:
            return
        killed = status & 0x7F == _signal.SIGKILL or status >> 8 == 128 + _signal.SIGKILL
        self._oom = killed or self.table.running == 1

    # Output and input.

    def on_output(self) -> None:
        self.table.on_log_grown(self)
        if self.ended:
            self._drain(grew=True)
        elif self.log.full:
            for pipe in self._pipes:
                pipe.pause(True)

    def on_output_closed(self, pipe: Output) -> None:
        if self.over:
            self._pipes.remove(pipe)
            return
        rest = pipe.redactor.end()
        if rest:
            self.log.append(pipe.kind, rest)
            self.table.on_log_grown(self)
        if self.ended:
            self._drain()

    def on_read(self, offset: int) -> None:
        """A follower has taken everything before `offset`."""
        if self.log.lossless:
            self.log.mark_read(offset)
            if not self.log.full:
                for pipe in self._pipes:
                    pipe.pause(False)

    def write_stdin(self, data: bytes, close: bool) -> None:
        """Queue input; raises Refused 409 when it is not wanted."""
        if self._input is None:
            raise wire.Refused(409, "stdin_closed", "the process takes no input")
        self._input.write(data, close=close)

    def resize(self, cols: int, rows: int) -> None:
        if self._spec.terminal is None or self._input is None:
            raise wire.Refused(409, "no_terminal", "the process has no terminal")
        self._input.resize(cols, rows)

    def adopt_patterns(self) -> None:
        for pipe in self._pipes:
            pipe.redactor.patterns = self.table.patterns

    def _drain(self, grew: bool = False) -> None:
        """Take what the ended command left in its pipes, and end when that is all there can be."""
        for pipe in self._pipes:
            pipe.pause(False)
            # Bounded: what outlives the command may write for ever, and a pipe holds at most 1 MiB.
            for _ in range(32):
                if self.over or pipe.fd < 0 or not pipe.read():
                    break
                grew = True
        if self.over:
            return
        if grew:
            self.table.on_log_grown(self)
        now = time.monotonic()
        if not self.alone and self._kill_from and now < self._kill_from + KILL_SECONDS + 2:
            # It is told as ended when all of it is.
            self.table.loop.call_in((self, "drain"), 0.05, self._drain)
        elif now >= self._drain_until or not any(pipe.fd >= 0 for pipe in self._pipes):
            self._finish()
        elif grew or not self.table.loop.has((self, "drain")):
            when = min(now + QUIET_SECONDS, self._drain_until)
            self.table.loop.call_at((self, "drain"), when, self._on_quiet)

    def _on_quiet(self) -> None:
        if not any(pipe.fd >= 0 and pipe.read() for pipe in self._pipes):
            self._drain_until = 0.0
        self._drain(grew=True)

    def _finish(self) -> None:
        for pipe in self._pipes:
            self.log.append(pipe.kind, pipe.redactor.end())
        self._pipes = [pipe for pipe in self._pipes if pipe.fd >= 0]
        self.log.seal()
        self.over = True
        if self._ended_at is None:
            self._ended_at = time.time()
        for timer in ("drain", "timeout", "start"):
            self.table.loop.cancel((self, timer))
        if self._input is not None:
            self._input.close()
        self.table.on_over(self)

    # Ending it.

    def members(self) -> list[int]:
        """Return every process of this command, however far it forked itself away."""
        if self.alone or not self.pid:
            return []
        if self.runner is not None:
            return linux.descendants(self.runner.pid)
        return [self.pid, *linux.descendants(self.pid)]

    def signal(self, number: int) -> None:
        """Send a signal to all of it; KILL is repeated until nothing is left."""
        if number == _signal.SIGKILL:
            self.kill()
        else:
            linux.signal_all(self.members(), number)

    def stop(self) -> None:
        """End it: TERM, and KILL after a grace time."""
        if self.alone or self._kill_from:
            return
        if not self.pid:
            self._on_stuck()
            return
        members = self.members()
        linux.signal_all(members, _signal.SIGTERM)
        linux.signal_all(members, _signal.SIGCONT)  # A stopped one takes its TERM only then.
        self._kill_from = time.monotonic()
        self.table.loop.call_in((self, "kill"), GRACE_SECONDS, self.kill)

    def kill(self) -> None:
        """Kill everything of it, again and again until nothing is left."""
        if self.alone:
            return
        self._killed = True
        self._kill_from = time.monotonic()
        self._kill_pause = 0.002
        self._sweep()

    def _sweep(self) -> None:
        if self.alone:
            return
        linux.signal_all(self.members(), _signal.SIGKILL)
        if time.monotonic() > self._kill_from + KILL_SECONDS:
            self._on_stuck()
            return
        self._kill_pause = min(self._kill_pause * 1.5, 0.1)
        self.table.loop.call_in((self, "kill"), self._kill_pause, self._sweep)

    def _on_timeout(self) -> None:
        self._timed_out = not self.ended
        self.stop()

    def _on_stuck(self) -> None:
        """Kill a runner that does not answer (stopped by the sandbox, no memory): the kernel then tells."""
        if self.runner is not None:
            self._never_read = not self.pid and self.runner.has_unread()
            linux.signal_all([self.runner.pid], _signal.SIGKILL)

    # Telling about it.

    def when_started(self, tell: "Callable[[wire.Refused | None], None]") -> None:
        """Call when it is running or over, or with what refused it."""
        if self.pid or self.over:
            tell(None)
        else:
            self._waiting.append(tell)

    def _tell_waiting(self, refused: wire.Refused | None) -> None:
        waiting, self._waiting = self._waiting, []
        for tell in waiting:
            tell(refused)

    def describe(self) -> dict[str, object]:
        state, code, name = "running", None, None
        if self.over and self._status is None:
            state = "unknown"
        elif self.over and self._status is not None:
            state = "exited"
            number = self._status & 0x7F
            code = 128 + number if number else self._status >> 8
            name = _SIGNAL_NAMES.get(number)
        return {
            "id": self.id,
            "state": state,
            "exit_code": 124 if self.over and self._timed_out else code,
            "signal": name,
            "timed_out": self._timed_out,
            "oom": self._oom,
            "started_at": self._started_at,
            "ended_at": self._ended_at if self.over else None,
            "output_bytes": self.log.end,
            "first_offset": self.log.first,
            "stdin_open": self._input is not None and self._input.open,
            "pty": self._spec.terminal is not None,
            "background": self.over and not self.alone,
        }

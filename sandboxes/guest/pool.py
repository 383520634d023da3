"""Runners as PID 1 sees them: forked when none is idle, handed one job at a time, adopted from and replaced
when killed.
"""

import _signal  # type: ignore[import-not-found]
import _socket
import fcntl
import os
import time

from . import linux, messages, runner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Task(Protocol):
        """What a runner is busy with; told everything that happens to it. `pid` is 0 where there is no
        command.
        """

        @property
        def pid(self) -> int: ...
        @property
        def ended(self) -> bool: ...
        def on_started(self, pid: int, fds: list[int]) -> None: ...
        def on_refused(self, stage: int, number: int) -> None: ...
        def on_ended(self, status: int, alone: bool) -> None: ...
        def on_idle(self, taken: int, sent: int) -> None: ...
        def on_tunnels(self, kind: int, first: int, second: int) -> None: ...
        def on_adopted(self) -> None: ...
        def on_runner_lost(self) -> None: ...


IDLE_LIMIT = 4
_SIOCOUTQ = 0x5411


class Runner:
    """One forked runner. `task` is None while it is idle."""

    __slots__ = ("pid", "sock", "task")

    def __init__(self, pid: int, sock: _socket.socket) -> None:
        self.pid = pid
        self.sock = sock
        self.task: Task | None = None

    def has_unread(self) -> bool:
        """True when it has not even read its job."""
        unread = fcntl.ioctl(self.sock.fileno(), _SIOCOUTQ, b"\0\0\0\0")
        return unread != b"\0\0\0\0"


class Pool:
    """All runners, and every child of PID 1: runners, adopted commands, and strays, which are killed."""

    def __init__(
        self,
        identity: "runner.Identity",
        watch: "Callable[[int, Callable[[int], None]], None]",
        unwatch: "Callable[[int], None]",
    ) -> None:
        self._identity = identity
        self._watch = watch
        self._unwatch = unwatch
        self._runners: dict[int, Runner] = {}
        self._idle: list[Runner] = []
        self._adopted: dict[int, Task] = {}

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def adopting(self) -> bool:
        """True while a command outlives its runner: strays must be looked for."""
        return bool(self._adopted)

    def fork(self) -> Runner:
        """Start an idle runner (about 0.6 ms); raises OSError at the limit of processes or memory."""
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        try:
            pid = os.fork()
            if pid == 0:
                runner.run(theirs, self._identity)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        made = Runner(pid, ours)
        self._runners[pid] = made
        self._idle.append(made)
        self._watch(ours.fileno(), lambda events: self._on_report(made))
        return made

    def give(self, operation: int, job: tuple[object, ...], fds: list[int], task: "Task") -> Runner:
        """Hand a job to an idle runner, forking one when there is none; raises OSError when that cannot be
        done.
        """
        while True:
            fresh = not self._idle
            chosen = self.fork() if fresh else self._idle[-1]
            self._idle.pop()
            try:
                messages.send_job(chosen.sock, operation, job, fds)
            except OSError:
                self._discard(chosen)  # Stopped or dying; another one takes the job.
                if fresh:
                    raise
                continue
            chosen.task = task
            return chosen

    def trim(self, keep: int) -> None:
        """End idle runners beyond `keep`, oldest first."""
        while len(self._idle) > keep:
            self._discard(self._idle.pop(0))

    def dismiss(self, unwanted: Runner) -> None:
        """End a runner whatever it is busy with; its task hears of nothing any more."""
        unwanted.task = None
        self._discard(unwanted)

    def _discard(self, unwanted: Runner) -> None:
        self._close(unwanted)
        linux.signal_all([unwanted.pid], _signal.SIGKILL)

    def _close(self, closed: Runner) -> None:
        if closed.sock.fileno() >= 0:
            self._unwatch(closed.sock.fileno())
            closed.sock.close()

    def _release(self, free: Runner) -> None:
        free.task = None
        if len(self._idle) < IDLE_LIMIT:
            self._idle.append(free)
        else:
            self._discard(free)

    def _on_report(self, source: Runner) -> None:
        while source.sock.fileno() >= 0:
            try:
                received = messages.receive_report(source.sock)
            except BlockingIOError:
                return
            except OSError:
                received = None
            if received is None:
                # It is gone. What became of its command is known once it is reaped, not before: see `reap`.
                self._close(source)
                if source in self._idle:
                    self._idle.remove(source)
                return
            kind, first, second, fds = received
            task = source.task
            if task is None:
                for fd in fds:
                    os.close(fd)
            elif kind == messages.STARTED:
                task.on_started(first, fds)
            elif kind == messages.REFUSED:
                self._release(source)
                task.on_refused(first, second)
            elif kind == messages.ENDED:
                if second:
                    self._release(source)
                task.on_ended(first, bool(second))
            elif kind == messages.IDLE:
                self._release(source)
                task.on_idle(first, second)
            elif kind in (messages.MOVED, messages.TUNNELS_ENDED):
                task.on_tunnels(kind, first, second)

    def reap(self) -> None:
        """Collect every child of PID 1 that has ended; on SIGCHLD."""
        lost: list[Runner] = []
        unknown: dict[int, int] = {}
        adopted = False
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            gone = self._runners.pop(pid, None)
            task = self._adopted.pop(pid, None)
            if gone is not None:
                lost.append(gone)
            elif task is not None:
                adopted = True
                task.on_ended(status, True)
            else:
                unknown[pid] = status  # A stray, or a command that is adopted and reaped in the same round.
        for one in lost:
            self._after(one, unknown)
        if lost or adopted or unknown:
            self.kill_strays()

    def _after(self, lost: Runner, reaped: dict[int, int]) -> None:
        """Adopt what a lost runner was busy with, where the kernel gave it to us."""
        self._on_report(lost)  # What it still said before it died.
        self._close(lost)
        if lost in self._idle:
            self._idle.remove(lost)
        task = lost.task
        lost.task = None
        if task is None:
            return
        pid = task.pid
        if pid and not task.ended:
            if pid in reaped:
                task.on_ended(reaped[pid], True)
                return
            # Being ours or not is the truth here: a child that the runner had reaped but not reported is
            # nobody's.
            if linux.parent_of(pid) == os.getpid():
                self._adopted[pid] = task
                task.on_adopted()
                return
        task.on_runner_lost()

    def kill_strays(self) -> None:
        """Kill what was orphaned onto PID 1 and belongs to no command that is known."""
        me = os.getpid()
        strays = [
            pid
            for pid, parent in linux.parents().items()
            if parent == me and pid not in self._runners and pid not in self._adopted
        ]
        linux.signal_all(strays, _signal.SIGKILL)

    def close(self) -> None:
        """Kill everything below PID 1, at once, and return when nothing is left or 2 s have passed."""
        until = time.monotonic() + 2
        while time.monotonic() < until:
            below = linux.descendants(os.getpid())
            linux.signal_all(below, _signal.SIGKILL)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return
            time.sleep(0.002)

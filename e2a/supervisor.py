"""Runs children: prefixed output, restart when one dies, a clean stop, and none left when the parent is killed.

The Procfile runners on PyPI end everything when one child ends; the well-kept supervisors want a configuration file and
leave their children behind when they are killed. This is what is needed of both.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Final

_PR_SET_PDEATHSIG: Final = 1
_libc: Final = ctypes.CDLL(None, use_errno=True)
_COLOURS: Final = (36, 33, 32, 35, 34, 31, 96)


def _die_with_parent() -> None:
    """In the child, before exec: be killed when the thread that spawned us ends (prctl(2)), whatever ends it."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass(slots=True)
class _Child:
    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    restarts: int = 0
    start_at: float = 0.0
    reader: threading.Thread | None = field(default=None, repr=False)


class Supervisor:
    """Start with `add`, then `run` until `stop` is asked for. Use it from the main thread only: a child's life hangs on
    the thread that spawned it."""

    LONGEST_BACKOFF: Final = 10.0
    STEADY_SECONDS: Final = 30.0

    def __init__(self, *, output: IO[str] | None = None, stop_seconds: float = 10.0) -> None:
        self._children: list[_Child] = []
        self._output = output or sys.stdout
        self._stop_seconds = stop_seconds
        self._stopping = False
        self._lock = threading.Lock()

    def add(self, name: str, argv: tuple[str, ...], environment: Mapping[str, str]) -> None:
        """Start a child now and keep it running."""
        child = _Child(name, argv, environment)
        self._children.append(child)
        self._start(child)

    def say(self, name: str, line: str) -> None:
        """One line of output under `name`."""
        colour = ""
        with contextlib.suppress(ValueError, OSError):
            if os.isatty(self._output.fileno()):
                index = next((i for i, c in enumerate(self._children) if c.name == name), 6)
                colour = f"\033[{_COLOURS[index % len(_COLOURS)]}m"
        reset = "\033[0m" if colour else ""
        with self._lock:
            self._output.write(f"{colour}{name:<8}{reset}| {line}\n")
            self._output.flush()

    def _start(self, child: _Child) -> None:
        child.process = subprocess.Popen(
            child.argv,
            env=dict(child.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,  # Ctrl-C reaches the parent only, which stops them in order.
            preexec_fn=_die_with_parent,
        )
        child.started = time.monotonic()
        child.reader = threading.Thread(
            target=self._copy, args=(child.name, child.process.stdout), daemon=True
        )
        child.reader.start()

    def _copy(self, name: str, stream: IO[bytes]) -> None:
        for raw in stream:
            self.say(name, raw.decode(errors="replace").rstrip("\n"))

    def run(self, on_tick: Callable[[], None] | None = None) -> None:
        """Watch the children until a stop is asked for, then stop them. Returns when all are gone."""
        try:
            while not self._stopping:
                for child in self._children:
                    self._watch(child)
                if on_tick is not None:
                    on_tick()
                time.sleep(0.2)
        finally:
            self._stop_all()

    def stop(self) -> None:
        """Ask for the end; safe in a signal handler."""
        self._stopping = True

    def _watch(self, child: _Child) -> None:
        process = child.process
        if process is None:
            if time.monotonic() >= child.start_at:
                self._start(child)
            return
        code = process.poll()
        if code is None:
            return
        if time.monotonic() - child.started > self.STEADY_SECONDS:
            child.restarts = 0
        wait = min(self.LONGEST_BACKOFF, 0.5 * 2.0**child.restarts) if child.restarts else 0.0
        child.restarts += 1
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        self.say(child.name, f"-- {how}; starts again{f' in {wait:g} s' if wait else ''}")
        child.process = None
        child.start_at = time.monotonic() + wait

    def _stop_all(self) -> None:
        """TERM the last started first, each with time to finish; KILL what stays."""
        for child in reversed(self._children):
            if child.process is not None and child.process.poll() is None:
                child.process.terminate()
                if child.name in ("valkey",):
                    continue
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(self._stop_seconds if child.name == "web" else 2.0)
        deadline = time.monotonic() + self._stop_seconds
        for child in reversed(self._children):
            if child.process is None:
                continue
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.1, deadline - time.monotonic()))
            if child.process.poll() is None:
                self.say(child.name, f"-- did not stop within {self._stop_seconds:g} s; killed")
                child.process.kill()
                child.process.wait()
            if child.reader is not None:
                child.reader.join(1.0)

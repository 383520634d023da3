"""What is said to and by a guest, typed.

A guest's JSON is a stranger's: each field is checked when it is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast, get_args

from e2a.core.errors import GuestError

ProcessState = Literal["running", "exited", "unknown"]
FileType = Literal["file", "directory", "symlink", "other"]
OnFull = Literal["drop", "block"]
Stream = Literal["stdout", "stderr"]

PROCESS_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class PtySize:
    cols: int
    rows: int


@dataclass(frozen=True, slots=True)
class RedactedValue:
    """A value that must not leave the sandbox; its place is taken by `[redacted:name]`."""

    name: str
    value: str

    def __repr__(self) -> str:
        return f"RedactedValue(name={self.name!r})"


@dataclass(frozen=True, slots=True, repr=False)
class ProcessSpec:
    """What to start. `id` is the caller's; the same id again is the same process, never a second start.

    Exactly one of `command` (for bash) and `argv`. `stdin` is its first input; the input ends there unless
    `keep_stdin_open`. `timeout_seconds`, `log_bytes` None: no limit, the guest's default. `on_full` says what
    happens when `log_bytes` are unread: the oldest are dropped, or the process waits.
    """

    id: str
    command: str | None = None
    argv: tuple[str, ...] | None = None
    cwd: str | None = None
    env: Mapping[str, str] | None = None
    stdin: bytes | None = None
    keep_stdin_open: bool = False
    timeout_seconds: float | None = None
    pty: PtySize | None = None
    on_full: OnFull = "drop"
    log_bytes: int | None = None
    kill_on_disconnect: bool = False

    def __post_init__(self) -> None:
        if PROCESS_ID.fullmatch(self.id) is None:
            raise ValueError(f"{self.id!r} is not a process id")
        if (self.command is None) == (self.argv is None):
            raise ValueError("a process has a command or an argv")

    def __repr__(self) -> str:
        # Command, environment and input may hold secrets, and specs end up in tracebacks.
        return f"ProcessSpec(id={self.id!r})"


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """A process as its guest sees it.

    `exit_code` None: still running, or unknown. Times are seconds since the epoch. `pty`: it has a terminal.
    `background`: it has ended, something that it started still runs.
    """

    id: str
    state: ProcessState
    exit_code: int | None
    signal: str | None
    timed_out: bool
    oom: bool
    started_at: float | None
    ended_at: float | None
    output_bytes: int
    first_offset: int
    stdin_open: bool
    pty: bool
    background: bool


@dataclass(frozen=True, slots=True)
class Completed:
    """A process that has ended. `exit_code` None: how it ended is not known (never to be read as 0).

    `stdout` and `stderr` are what was kept, `*_bytes` how much there was; `truncated` when they differ or the
    guest dropped output. `duration_ms` is what the caller waited.
    """

    exit_code: int | None
    signal: str | None
    stdout: bytes
    stderr: bytes
    stdout_bytes: int
    stderr_bytes: int
    truncated: bool
    duration_ms: int
    oom: bool
    timed_out: bool


@dataclass(frozen=True, slots=True)
class GuestHealth:
    guest: str
    configured: bool
    uptime_ms: int
    processes: int


@dataclass(frozen=True, slots=True)
class GuestStats:
    """Counters of a sandbox. None: the guest cannot read it here (no cgroup of its own).

    `resting_terminals` of those `running` are shells at their prompt; `longest_running_seconds` is how long the oldest
    of the others has run. `last_moved_seconds`: since bytes moved, or a process started or ended.
    """

    memory_bytes: int | None
    memory_peak_bytes: int | None
    memory_limit_bytes: int | None
    oom_kills: int | None
    running: int
    last_activity_seconds: float
    bytes_out: int
    bytes_in: int
    last_moved_seconds: float = 0.0
    resting_terminals: int = 0
    longest_running_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class FileInfo:
    """`mode` are the permission bits, `mtime` seconds since the epoch, `target` what a symlink says."""

    path: str
    name: str
    type: FileType
    size: int
    mode: int
    mtime: float
    target: str | None = None


@dataclass(frozen=True, slots=True)
class FolderListing:
    """What a folder holds, by name; `truncated` when it holds more than a guest lists (10,000)."""

    entries: tuple[FileInfo, ...]
    truncated: bool

    def __iter__(self) -> Iterator[FileInfo]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


@dataclass(frozen=True, slots=True)
class FileWritten:
    path: str
    size: int


@dataclass(frozen=True, slots=True)
class ArchiveWritten:
    """What was unpacked: how many files, and how many bytes they have."""

    path: str
    files: int
    size: int


def _bad(name: str) -> GuestError:
    return GuestError(f"the guest's answer has no good {name!r}", code="bad_answer", guest_status=502)


def _field(answer: Mapping[str, Any], name: str, kind: type[_T]) -> _T:
    value = answer.get(name)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:  # Not isinstance: True is no number.
        raise _bad(name)
    return value


def _optional(answer: Mapping[str, Any], name: str, kind: type[_T]) -> _T | None:
    return None if answer.get(name) is None else _field(answer, name, kind)


def process_info(answer: Mapping[str, Any]) -> ProcessInfo:
    """Raises GuestError (`bad_answer`), like all readers here."""
    state = _field(answer, "state", str)
    if state not in get_args(ProcessState):
        raise _bad("state")
    return ProcessInfo(
        id=_field(answer, "id", str),
        state=cast(ProcessState, state),
        exit_code=_optional(answer, "exit_code", int),
        signal=_optional(answer, "signal", str),
        timed_out=_field(answer, "timed_out", bool),
        oom=_field(answer, "oom", bool),
        started_at=_optional(answer, "started_at", float),
        ended_at=_optional(answer, "ended_at", float),
        output_bytes=_field(answer, "output_bytes", int),
        first_offset=_field(answer, "first_offset", int),
        stdin_open=_field(answer, "stdin_open", bool),
        pty=_field(answer, "pty", bool),
        background=answer.get("background") is True,
    )


def guest_health(answer: Mapping[str, Any]) -> GuestHealth:
    return GuestHealth(
        guest=_field(answer, "guest", str),
        configured=_field(answer, "configured", bool),
        uptime_ms=_field(answer, "uptime_ms", int),
        processes=_field(answer, "processes", int),
    )


def guest_stats(answer: Mapping[str, Any]) -> GuestStats:
    return GuestStats(
        memory_bytes=_optional(answer, "memory_bytes", int),
        memory_peak_bytes=_optional(answer, "memory_peak_bytes", int),
        memory_limit_bytes=_optional(answer, "memory_limit_bytes", int),
        oom_kills=_optional(answer, "oom_kills", int),
        running=_field(answer, "running", int),
        last_activity_seconds=_field(answer, "last_activity_seconds", float),
        bytes_out=_field(answer, "bytes_out", int),
        bytes_in=_field(answer, "bytes_in", int),
        last_moved_seconds=_field(answer, "last_moved_seconds", float),
        resting_terminals=_field(answer, "resting_terminals", int),
        longest_running_seconds=_field(answer, "longest_running_seconds", float),
    )


def file_info(answer: Mapping[str, Any]) -> FileInfo:
    kind = _field(answer, "type", str)
    if kind not in get_args(FileType):
        raise _bad("type")
    return FileInfo(
        path=_field(answer, "path", str),
        name=_field(answer, "name", str),
        type=cast(FileType, kind),
        size=_field(answer, "size", int),
        mode=_mode(answer.get("mode")),
        mtime=_field(answer, "mtime", float),
        target=_optional(answer, "target", str),
    )


def folder_listing(answer: Mapping[str, Any]) -> FolderListing:
    return FolderListing(
        entries=tuple(file_info(row) for row in listed(answer, "entries")),
        truncated=answer.get("truncated") is True,
    )


def _mode(value: object) -> int:
    """Permission bits, which guests write as octal text."""
    if isinstance(value, str) and re.fullmatch("[0-7]{1,5}", value):
        return int(value, 8)
    if type(value) is int:
        return value
    raise _bad("mode")


def file_written(answer: Mapping[str, Any]) -> FileWritten:
    return FileWritten(path=_field(answer, "path", str), size=_field(answer, "size", int))


def archive_written(answer: Mapping[str, Any]) -> ArchiveWritten:
    return ArchiveWritten(
        path=_field(answer, "path", str), files=_field(answer, "files", int), size=_field(answer, "size", int)
    )


def not_redacted(answer: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the values that are too short to be redacted."""
    names = answer.get("not_redacted", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _bad("not_redacted")
    return tuple(names)


def listed(answer: Mapping[str, Any], name: str) -> Iterable[Mapping[str, Any]]:
    """The list of objects called `name`."""
    rows = _field(answer, name, list)
    if not all(isinstance(row, dict) for row in rows):
        raise _bad(name)
    return cast("list[Mapping[str, Any]]", rows)

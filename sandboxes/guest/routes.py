"""What each path does; PROTOCOL.md says it in full."""

import time

from . import linux, messages, wire
from .follow import Follower
from .process import SIGNALS
from .redaction import Patterns
from .spec import Spec, encoded, environment, seconds, size_of, wrong
from .tunnels import Tunnels
from .wire import Refused, Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .connection import Connection
    from .process import Process
    from .server import Server
    from .table import Table

PROTOCOL_VERSION = "1"
FILE_JOBS_LIMIT = 16
FILE_JOB_SECONDS = 900.0
WATCHES_LIMIT = 8


class FileJob:
    """A file request that a runner serves; what the pool tells about it."""

    pid = 0
    ended = False

    def __init__(self, routes: "Routes", *, is_use: bool) -> None:
        self._routes = routes
        self._is_use = is_use

    def on_started(self, pid: int, fds: list[int]) -> None:
        raise AssertionError("a file request starts no command")

    def on_refused(self, stage: int, number: int) -> None:
        self._routes.file_done(self)

    def on_ended(self, status: int, alone: bool) -> None:
        self._routes.file_done(self)

    def on_tunnels(self, kind: int, first: int, second: int) -> None:
        raise AssertionError("a file request carries no tunnel")

    def on_adopted(self) -> None:
        self._routes.file_done(self)

    def on_idle(self, taken: int, sent: int) -> None:
        if self._is_use:
            self._routes.table.note_moved(taken, sent)
        self._routes.file_done(self)

    def on_runner_lost(self) -> None:
        self._routes.file_done(self)


class Routes:
    """Dispatches requests. A handler answers through the connection, at once or later, or raises Refused."""

    def __init__(self, server: "Server", table: "Table") -> None:
        self.table = table
        self._server = server
        self._file_jobs: dict[FileJob, None] = {}
        self._watches: dict[FileJob, None] = {}
        self._tunnels = Tunnels(server.loop, table)
        self._fixed: dict[tuple[str, str], Callable[[Connection, Request, bytes], None]] = {
            ("GET", "/health"): self._health,
            ("PUT", "/configure"): self._configure,
            ("GET", "/stats"): self._stats,
            ("GET", "/processes"): self._list_processes,
            ("POST", "/processes"): self._start,
            ("GET", "/files"): self._read_file,
            ("PUT", "/files"): self._write_file,
            ("DELETE", "/files"): self._delete_file,
            ("GET", "/archive"): lambda c, r, b: self._file(c, "pack", self._path(r)),
            ("PUT", "/archive"): lambda c, r, b: self._file(c, "unpack", self._path(r), request=r),
            ("GET", "/snapshot"): self._save,
            ("PUT", "/snapshot"): lambda c, r, b: self._file(c, "restore", ".", request=r),
            ("GET", "/files/stat"): lambda c, r, b: self._file(c, "stat", self._path(r)),
            ("GET", "/files/list"): self._list_folder,
            ("GET", "/files/watch"): self._watch_folder,
            ("POST", "/files/move"): self._move_file,
            ("POST", "/files/mkdir"): self._make_folder,
        }
        self._of_process: dict[tuple[str, str], Callable[[Connection, Request, bytes, Process], None]] = {
            ("GET", ""): lambda c, r, b, p: c.respond(200, p.describe()),
            ("DELETE", ""): self._forget,
            ("GET", "output"): self._output,
            ("POST", "stdin"): self._stdin,
            ("POST", "signal"): self._signal,
            ("POST", "resize"): self._resize,
        }

    def handle(self, connection: "Connection", request: Request, body: bytes) -> None:
        handler = self._fixed.get((request.method, request.path))
        if handler is not None:
            handler(connection, request, body)
            return
        parts = request.path.split("/")
        if parts[1] == "processes" and 3 <= len(parts) <= 4:
            action = parts[3] if len(parts) == 4 else ""
            about = self._of_process.get((request.method, action))
            if about is not None:
                about(connection, request, body, self.table.get(parts[2]))
                return
            if any(action == known for _, known in self._of_process):
                raise Refused(405, "method_not_allowed", f"{request.method} is not for this path")
        if parts[1] == "tunnels" and len(parts) == 3:
            self._tunnel(connection, request, parts[2])
            return
        if any(request.path == known for _, known in self._fixed):
            raise Refused(405, "method_not_allowed", f"{request.method} is not for this path")
        raise Refused(404, "no_such_path", "the guest has no such path")

    # The sandbox.

    def _health(self, connection: "Connection", request: Request, body: bytes) -> None:
        connection.respond(
            200,
            {
                "guest": PROTOCOL_VERSION,
                "configured": self.table.configured,
                "uptime_ms": int((time.monotonic() - self._server.started) * 1000),
                "processes": self.table.running,
            },
        )

    def _configure(self, connection: "Connection", request: Request, body: bytes) -> None:
        wanted = wire.from_json(body)
        unknown = wanted.keys() - {"env", "redact", "deadline_seconds"}
        if unknown:
            raise wrong(f"unknown field {sorted(unknown)[0]!r}")
        env = environment(wanted.get("env"))
        redact = wanted.get("redact") or []
        if not isinstance(redact, list):
            raise wrong("redact is a list of {name, value}")
        values = []
        for item in redact:
            if not isinstance(item, dict) or item.keys() != {"name", "value"}:
                raise wrong("redact is a list of {name, value}")
            name, value = item["name"], encoded("a value to redact", item["value"])
            if not isinstance(name, str) or not 1 <= len(name) <= 128 or not name.isprintable():
                raise wrong("a name to redact is 1 to 128 printable characters")
            encoded("a name to redact", name)
            values.append((name, value))
        deadline = seconds("deadline_seconds", wanted.get("deadline_seconds"))
        patterns = Patterns(values)
        self.table.configure(env, patterns)
        self._server.set_deadline(deadline)
        connection.respond(200, {"configured": True, "not_redacted": patterns.skipped})

    def _stats(self, connection: "Connection", request: Request, body: bytes) -> None:
        connection.respond(200, self.table.stats())

    # Processes.

    def _list_processes(self, connection: "Connection", request: Request, body: bytes) -> None:
        connection.respond(200, {"processes": [process.describe() for process in self.table.all()]})

    def _start(self, connection: "Connection", request: Request, body: bytes) -> None:
        follow, after = request.flag("follow"), request.number("after")
        process, created = self.table.start(Spec(wire.from_json(body)))

        def answer(refused: Refused | None) -> None:
            if refused is not None:
                connection.refuse(refused)
            elif not follow:
                connection.respond(201 if created else 200, process.describe())
            else:
                try:
                    begin = 0 if created else after
                    follower = Follower(connection, process, after=begin, live=True, created=created)
                except Refused as bad_offset:
                    connection.refuse(bad_offset)
                    return
                if kill_on_disconnect:
                    follower.end_process_when_gone()

        kill_on_disconnect = follow and created and process.kill_on_disconnect
        process.when_started(answer)

    def _output(self, connection: "Connection", request: Request, body: bytes, process: "Process") -> None:
        Follower(
            connection, process, after=request.number("after"), live=request.flag("follow"), created=False
        )

    def _stdin(self, connection: "Connection", request: Request, body: bytes, process: "Process") -> None:
        process.write_stdin(body, request.flag("close"))
        connection.respond(200, {"accepted": len(body)})

    def _signal(self, connection: "Connection", request: Request, body: bytes, process: "Process") -> None:
        name = wire.from_json(body).get("signal")
        number = SIGNALS.get(name.removeprefix("SIG")) if isinstance(name, str) else None
        if number is None:
            raise wrong("signal is a name like TERM, INT or KILL")
        if process.alone:
            raise Refused(409, "not_running", "nothing of this process is left")
        process.signal(number)
        connection.respond(200, process.describe())

    def _resize(self, connection: "Connection", request: Request, body: bytes, process: "Process") -> None:
        process.resize(*size_of(wire.from_json(body)))
        connection.respond(200, process.describe())

    def _forget(self, connection: "Connection", request: Request, body: bytes, process: "Process") -> None:
        self.table.forget(process)
        connection.respond(200, process.describe())

    # Tunnels.

    def _tunnel(self, connection: "Connection", request: Request, port: str) -> None:
        if request.method != "POST":
            raise Refused(405, "method_not_allowed", f"{request.method} is not for this path")
        if request.headers.get("upgrade", "").lower() != "e2a-tunnel":
            raise Refused(426, "upgrade_required", "a tunnel is asked for with Upgrade: e2a-tunnel")
        if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535):
            raise Refused(400, "bad_port", "a port is 1 to 65535")
        fd, begun = connection.hand_over()
        self._tunnels.add(int(port), fd, begun)
        connection.let_go()

    # Files.

    @staticmethod
    def _path(request: Request, name: str = "path") -> str:
        path = request.query.get(name, "")
        if not path or "\0" in path or len(path) > 4096:
            raise Refused(400, "bad_path", f"{name} has 1 to 4096 characters and no NUL")
        return path

    def _read_file(self, connection: "Connection", request: Request, body: bytes) -> None:
        self._file(connection, "read", self._path(request), window=_window(request.headers.get("range")))

    def _save(self, connection: "Connection", request: Request, body: bytes) -> None:
        limit = request.number("limit")
        self._file(connection, "save", ".", window=(limit, limit))

    def _write_file(self, connection: "Connection", request: Request, body: bytes) -> None:
        mode = request.query.get("mode")
        if mode is not None and not (1 <= len(mode) <= 4 and set(mode) <= set("01234567")):
            raise wrong("mode is octal, like 0644")
        bits = None if mode is None else int(mode, 8) & 0o777
        self._file(connection, "write", self._path(request), mode=bits, request=request)

    def _delete_file(self, connection: "Connection", request: Request, body: bytes) -> None:
        action = "delete_tree" if request.flag("recursive") else "delete"
        self._file(connection, action, self._path(request))

    def _move_file(self, connection: "Connection", request: Request, body: bytes) -> None:
        wanted = wire.from_json(body)
        source, target = wanted.get("from"), wanted.get("to")
        if not isinstance(source, str) or not isinstance(target, str) or wanted.keys() != {"from", "to"}:
            raise wrong("move takes {from, to}")
        self._file(connection, "move", source, other=target)

    def _make_folder(self, connection: "Connection", request: Request, body: bytes) -> None:
        path = wire.from_json(body).get("path")
        if not isinstance(path, str):
            raise wrong("mkdir takes {path}")
        self._file(connection, "mkdir", path)

    def _list_folder(self, connection: "Connection", request: Request, body: bytes) -> None:
        after = self._path(request, "after") if "after" in request.query else ""
        self._file(connection, "list", self._path(request), other=after)

    def _watch_folder(self, connection: "Connection", request: Request, body: bytes) -> None:
        self._file(connection, "watch", self._path(request), mode=int(request.flag("recursive")))

    def _file(
        self,
        connection: "Connection",
        action: str,
        path: str,
        *,
        other: str = "",
        mode: int | None = None,
        window: tuple[int, int] | None = None,
        request: Request | None = None,
    ) -> None:
        is_watch = action == "watch"
        if is_watch and len(self._watches) >= WATCHES_LIMIT:
            raise Refused(409, "too_many_watches", f"a sandbox has at most {WATCHES_LIMIT} watches at once")
        if not is_watch and len(self._file_jobs) >= FILE_JOBS_LIMIT:
            raise Refused(503, "busy", f"at most {FILE_JOBS_LIMIT} file requests are served at once")
        encoded("path", path)
        encoded("path", other)
        fd, begun = connection.hand_over()
        length = request.length if request else 0
        waits = bool(request and request.expects_continue and not begun)
        arguments = (action, path, other, mode, window, length, waits, begun if request else b"")
        job = FileJob(self, is_use=action != "save")  # Being saved keeps nothing alive.
        try:
            chosen = self.table.pool.give(messages.FILES, arguments, [fd], job)
        except OSError as error:
            raise Refused(503, "no_resources", f"no runner can be started: {error.strerror}") from None
        if is_watch:
            self._watches[job] = None  # Until its client goes.
        else:
            self._file_jobs[job] = None
            self._server.loop.call_in(job, FILE_JOB_SECONDS, lambda: _kill(chosen.pid))
        connection.let_go()

    def file_done(self, job: FileJob) -> None:
        self._server.loop.cancel(job)
        self._file_jobs.pop(job, None)
        self._watches.pop(job, None)


def _kill(pid: int) -> None:
    linux.signal_all([pid], 9)


def _window(value: str | None) -> tuple[int, int] | None:
    """Return (first, last) of a Range header with one range, the first negative for the form `bytes=-n`; None:
    the whole.
    """
    if value is None or not value.startswith("bytes="):
        return None
    first, dash, last = value[6:].partition("-")
    if dash and not first and last.isdecimal() and len(last) <= 15:
        return (-int(last), 1 << 62) if int(last) else (1 << 62, 1 << 62)  # None at all is not satisfiable.
    if not dash or not first.isdecimal() or not (last.isdecimal() or not last) or len(first + last) > 30:
        return None
    stop = int(last) if last else (1 << 62)
    return (int(first), stop) if stop >= int(first) else None

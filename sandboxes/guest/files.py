"""File requests, served by a runner as the sandbox's uid, straight between the client's connection and the
file.

PID 1 has read the head of the request; the runner reads the body, does the work, answers and closes. Memory
is bounded by one buffer in each direction. Nothing but regular files is ever opened: a FIFO or device would
block or act.
"""

import _socket
import _struct
import errno
import os
import stat as modes

from . import watch, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from .runner import Identity

FILE_LIMIT = 512 * 1024 * 1024
LIST_LIMIT = 10_000
_BUFFER = 256 * 1024
_STALLED_SECONDS = 60
"""A client that moves nothing for so long is given up."""

_CODES = {
    errno.ENOENT: (404, "not_found"),
    errno.EACCES: (403, "forbidden"),
    errno.EPERM: (403, "forbidden"),
    errno.EROFS: (403, "forbidden"),
    errno.EISDIR: (400, "is_a_directory"),
    errno.ENOTEMPTY: (409, "not_empty"),
    errno.EEXIST: (400, "not_a_directory"),
    errno.ENOTDIR: (400, "not_a_directory"),
    errno.EXDEV: (400, "cross_device"),
    errno.ENOSPC: (507, "no_space"),
    errno.EDQUOT: (507, "no_space"),
    errno.EFBIG: (413, "too_large"),
    errno.EMFILE: (503, "no_resources"),
    errno.ENOMEM: (503, "no_resources"),
}


def serve(fd: int, identity: "Identity", arguments: tuple[object, ...]) -> tuple[int, int]:
    """Answer one file request on a connection and close it. Returns (bytes taken in, bytes sent of file
    content).
    """
    action, path, other, mode, window, length, expects_continue, begun = arguments
    sock = _socket.socket(fileno=fd)
    sock.settimeout(None)
    limit = _struct.pack("ll", _STALLED_SECONDS, 0)
    sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_RCVTIMEO, limit)
    sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, limit)
    body = _Body(sock, int(length), bool(expects_continue), bytes(begun))  # type: ignore[call-overload]
    sent = 0
    try:
        try:
            place = _place(str(path), identity)
            if action == "read":
                sent = _read(sock, place, window)  # type: ignore[arg-type]
                return body.taken, sent
            if action == "pack" or action == "unpack":
                from . import archive  # Two milliseconds and 3 MiB that only archives cost.

                archive.serve(sock, action, place, body)
                return body.taken, 0
            if action == "save" or action == "restore":
                from . import snapshot

                most: int = window[0] if window else 0  # type: ignore[index]
                snapshot.serve(sock, str(action), identity.workspace, identity.home, most, body)
                return body.taken, 0
            if action == "watch":
                watch.serve(sock, place, bool(mode))
                return 0, 0
            if action == "write":
                answer = _write(place, body, mode)  # type: ignore[arg-type]
            elif action == "list":
                answer = _list(place, str(other))
            elif action == "move":
                answer = _move(place, _place(str(other), identity))
            else:
                answer = _ACTIONS[str(action)](place)
            sock.sendall(wire.response(200, answer, keep_alive=False))
        except wire.Refused as refused:
            sock.sendall(wire.response(refused.status, refused.body(), keep_alive=False))
        except OSError as error:
            status, code = _CODES.get(error.errno or 0, (400, "bad_path"))
            told = {"code": code, "detail": os.strerror(error.errno or errno.EIO)}
            sock.sendall(wire.response(status, told, keep_alive=False))
        # A connection closed with unread bytes is reset, and its answer lost: take the rest first.
        sock.shutdown(_socket.SHUT_WR)
        body.drain()
    except OSError:
        pass  # The client is gone or stalled; whoever looks at the file sees what happened.
    except wire.Refused:
        pass  # The rest of a body that was refused already.
    finally:
        sock.close()
    return body.taken, sent


def _place(path: str, identity: "Identity") -> str:
    if not path or "\0" in path or len(path) > 4096:
        raise wire.Refused(400, "bad_path", "a path has 1 to 4096 characters and no NUL")
    if not identity.isolated and (path + "/").startswith("/workspace/"):
        path = path[len("/workspace/") :]  # The same path names the same folder on the process engine.
    return os.path.normpath(os.path.join(identity.workspace, path)) if path else identity.workspace


class _Body:
    """What is left of a request body, by its length or in chunks (length -1)."""

    def __init__(self, sock: _socket.socket, length: int, expects_continue: bool, begun: bytes) -> None:
        self.length = length
        self.taken = 0
        self._sock = sock
        self._left = length
        self._expects_continue = expects_continue and length != 0
        self._begun = begun
        self._stream = self._generate()

    def pieces(self) -> "Iterator[bytes]":
        """Return the rest of the body, always the same iterator; it raises Refused when the body ends
        early.
        """
        return self._stream

    def drain(self) -> None:
        """Take and drop the rest, unless the client still waits to be asked for it."""
        if not self._expects_continue:
            for _ in self._stream:
                pass

    def _generate(self) -> "Iterator[bytes]":
        if self._expects_continue:
            self._expects_continue = False
            self._sock.sendall(wire.CONTINUE)
        if self.length < 0:
            yield from self._chunks()
            return
        while self._left > 0:
            piece = self._some(min(self._left, _BUFFER))
            self._left -= len(piece)
            self.taken += len(piece)
            yield piece

    def _some(self, size: int) -> bytes:
        if self._begun:
            piece, self._begun = self._begun[:size], self._begun[size:]
            return piece
        piece = self._sock.recv(size)
        if not piece:
            raise wire.Refused(400, "bad_request", "the body ended early")
        return piece

    def _line(self) -> bytes:
        while b"\r\n" not in self._begun:
            if len(self._begun) > 1024:
                raise wire.Refused(400, "bad_request", "a chunk has no size line")
            piece = self._sock.recv(_BUFFER)
            if not piece:
                raise wire.Refused(400, "bad_request", "the body ended early")
            self._begun += piece
        line, _, self._begun = self._begun.partition(b"\r\n")
        return line

    def _chunks(self) -> "Iterator[bytes]":
        while self._left:
            digits = self._line().partition(b";")[0].strip()
            if not digits.isalnum() or len(digits) > 8:
                raise wire.Refused(400, "bad_request", "a chunk size is malformed")
            try:
                size = int(digits, 16)
            except ValueError:
                raise wire.Refused(400, "bad_request", "a chunk size is malformed") from None
            while size:
                piece = self._some(min(size, _BUFFER))
                size -= len(piece)
                self.taken += len(piece)
                yield piece
                if not size and self._line():
                    raise wire.Refused(400, "bad_request", "a chunk is longer than its size")
            if digits.strip(b"0") == b"":
                while self._line():
                    pass
                self._left = 0


def _open_regular(place: str) -> tuple[int, os.stat_result]:
    _regular(os.stat(place))  # Before it is opened: opening some devices has effects.
    fd = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        _regular(found)
    except BaseException:
        os.close(fd)
        raise
    return fd, found


def _regular(found: os.stat_result) -> None:
    if modes.S_ISDIR(found.st_mode):
        raise wire.Refused(400, "is_a_directory", "the path is a directory")
    if not modes.S_ISREG(found.st_mode):
        raise wire.Refused(400, "not_a_file", "the path is a device, socket or FIFO")


def _read(sock: _socket.socket, place: str, window: tuple[int, int] | None) -> int:
    """Send a file, or bytes window[0] to window[1] of it; negative: the last so many. A file that shrinks
    meanwhile ends the connection early.
    """
    fd, found = _open_regular(place)
    try:
        size = found.st_size
        start, stop, status, extra = 0, size, 200, ""
        if window is not None:
            start = window[0] if window[0] >= 0 else max(0, size + window[0])
            stop = min(window[1] + 1, size)
            if start >= size:
                raise wire.Refused(416, "bad_range", f"the file has {size} bytes")
            status, extra = 206, f"Content-Range: bytes {start}-{stop - 1}/{size}\r\n"
        extra += f"X-E2A-Mode: {modes.S_IMODE(found.st_mode):04o}\r\nAccept-Ranges: bytes\r\n"
        sock.sendall(
            wire.head(status, "application/octet-stream", stop - start, keep_alive=False, extra=extra)
        )
        at = start
        while at < stop:
            count = os.sendfile(sock.fileno(), fd, at, min(stop - at, 1 << 20))
            if not count:
                break
            at += count
        return at - start
    finally:
        os.close(fd)


def _write(place: str, body: _Body, mode: int | None) -> dict[str, object]:
    """Write a file next to its place and rename it there: readers see the old content or the new one."""
    if body.length > FILE_LIMIT:
        raise wire.Refused(413, "too_large", f"a file has at most {FILE_LIMIT} bytes")
    target = os.path.realpath(place)  # Through symlinks, as a program that opens the path would write.
    try:
        found = os.lstat(target)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(target), exist_ok=True)
    else:
        if modes.S_ISLNK(found.st_mode):
            raise OSError(errno.ELOOP, "a symlink that leads to itself")
        _regular(found)
        if mode is None:
            mode = modes.S_IMODE(found.st_mode)
    folder = os.path.dirname(target)
    room = os.statvfs(folder)
    if body.length > room.f_bavail * room.f_frsize:
        raise OSError(errno.ENOSPC, "no space")  # Said before 512 MiB were sent, not after.
    temporary = f"{folder}/.e2a-{os.urandom(8).hex()}"  # Without its name, which may have 255 bytes.
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            for piece in body.pieces():
                if body.taken > FILE_LIMIT:
                    raise wire.Refused(413, "too_large", f"a file has at most {FILE_LIMIT} bytes")
                view = memoryview(piece)
                while view:
                    view = view[os.write(fd, view) :]
            os.fchmod(fd, 0o644 if mode is None else mode)
        finally:
            os.close(fd)
        os.rename(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    return {"path": place, "size": body.taken}


def _delete(place: str) -> dict[str, object]:
    """Remove a file, a symlink (not what it names) or an empty directory."""
    if modes.S_ISDIR(os.lstat(place).st_mode):
        os.rmdir(place)
    else:
        os.unlink(place)
    return {"path": place, "deleted": True}


def _delete_tree(place: str) -> dict[str, object]:
    """Remove a path with everything below it."""
    if modes.S_ISDIR(os.lstat(place).st_mode):
        pending = [place]
        while pending:
            folder = pending[-1]
            below = []
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        below.append(entry.path)
                    else:
                        os.unlink(entry.path)
            if below:
                pending.extend(below)
            else:
                pending.pop()
                os.rmdir(folder)
    else:
        os.unlink(place)
    return {"path": place, "deleted": True}


def _stat(place: str) -> dict[str, object]:
    return _described(place, os.path.basename(place) or "/", os.lstat(place))


def _described(place: str, name: str, found: os.stat_result) -> dict[str, object]:
    kind = "other"
    for kind_name, test in (
        ("file", modes.S_ISREG),
        ("directory", modes.S_ISDIR),
        ("symlink", modes.S_ISLNK),
    ):
        if test(found.st_mode):
            kind = kind_name
    answer: dict[str, object] = {
        "path": place,
        "name": name,
        "type": kind,
        "size": found.st_size,
        "mode": f"{modes.S_IMODE(found.st_mode):04o}",
        "mtime": found.st_mtime,
    }
    if kind == "symlink":
        answer["target"] = os.readlink(place)
    return answer


def _list(place: str, after: str) -> dict[str, object]:
    """Return the entries of a directory by name that come after a name, the first LIST_LIMIT of them."""
    names: list[str] = []
    truncated = False
    with os.scandir(place) as found:
        for entry in found:
            if entry.name > after:
                names.append(entry.name)
            if len(names) > 2 * LIST_LIMIT:
                names.sort()
                del names[LIST_LIMIT:]
                truncated = True
    names.sort()
    if len(names) > LIST_LIMIT:
        del names[LIST_LIMIT:]
        truncated = True
    entries = []
    for name in names:
        path = os.path.join(place, name)
        try:
            entries.append(_described(path, name, os.lstat(path)))
        except FileNotFoundError:
            continue  # Removed while we looked.
    return {"path": place, "entries": entries, "truncated": truncated}


def _mkdir(place: str) -> dict[str, object]:
    """Make a directory and its parents; one that is there already is fine."""
    try:
        os.makedirs(place, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise wire.Refused(400, "not_a_directory", "a file is in the way") from None
    return {"path": place}


def _move(source: str, target: str) -> dict[str, object]:
    """Rename; a file on another file system is copied next to its new place first."""
    os.lstat(source)
    if target.startswith(source + "/"):
        raise wire.Refused(400, "bad_path", "a folder does not move into itself")
    os.makedirs(os.path.dirname(target), exist_ok=True)
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy_over(source, target)
    return {"from": source, "path": target}


def _copy_over(source: str, target: str) -> None:
    if not modes.S_ISREG(os.lstat(source).st_mode):
        raise wire.Refused(400, "cross_device", "only regular files move between file systems")
    fd, found = _open_regular(source)
    temporary = f"{os.path.dirname(target)}/.e2a-{os.urandom(6).hex()}"
    try:
        out = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            while os.sendfile(out, fd, None, 1 << 20):
                pass
            os.fchmod(out, modes.S_IMODE(found.st_mode))
            os.utime(out, ns=(found.st_atime_ns, found.st_mtime_ns))
            os.rename(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
        finally:
            os.close(out)
    finally:
        os.close(fd)
    os.unlink(source)


_ACTIONS = {
    "delete": _delete,
    "delete_tree": _delete_tree,
    "stat": _stat,
    "mkdir": _mkdir,
}

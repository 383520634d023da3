"""A folder as a tar, and a tar into a folder, streamed.

In a child of the runner, so that what `tarfile` costs goes with it. What is unpacked is made below the folder
one name at a time from open directories, never through a symlink: neither a name in the archive nor a link
that is there already leads anywhere else.
"""

import _socket
import contextlib
import errno
import os
import stat as modes
import tarfile

from . import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .files import _Body

TOTAL_LIMIT = 512 * 1024 * 1024
_PIECE = 128 * 1024
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def serve(sock: _socket.socket, action: str, place: str, body: "_Body") -> None:
    """Answer the request and close, in a child; returns when that has ended."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        if action == "pack":
            answered(sock, body, lambda: _pack(sock, place))
        else:
            answered(sock, body, lambda: _unpack(place, body))
    finally:
        os._exit(0)


def answered(sock: _socket.socket, body: "_Body", act: "Callable[[], dict[str, object] | None]") -> None:
    """Answer with what `act` returns, or with why it could not; None: it has answered itself."""
    from . import files

    try:
        said = act()
        if said is None:
            return
        answer = wire.response(200, said, keep_alive=False)
    except wire.Refused as refused:
        answer = wire.response(refused.status, refused.body(), keep_alive=False)
    except (tarfile.TarError, EOFError, ValueError, ImportError) as error:
        told: dict[str, object] = {"code": "bad_archive", "detail": f"this is no tar: {error}"[:200]}
        answer = wire.response(400, told, keep_alive=False)
    except OSError as error:
        status, code = files._CODES.get(error.errno or 0, (400, "bad_archive"))
        told = {"code": code, "detail": os.strerror(error.errno) if error.errno else str(error)[:200]}
        answer = wire.response(status, told, keep_alive=False)
    sock.sendall(answer)
    sock.shutdown(_socket.SHUT_WR)
    body.drain()


# Out.


class _Chunks:
    """What tarfile writes, as chunks on a socket."""

    def __init__(self, sock: _socket.socket) -> None:
        self._sock = sock

    def write(self, data: bytes) -> int:
        if data:
            self._sock.sendall(b"%x\r\n" % len(data) + data + b"\r\n")
        return len(data)


class _Padded:
    """A file of exactly the size that its header says: one that shrinks meanwhile ends in zeros."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self, size: int) -> bytes:
        data = os.read(self._fd, min(size, _PIECE)) if size else b""
        while len(data) < size:
            more = os.read(self._fd, min(size - len(data), _PIECE))
            data += more or bytes(size - len(data))
        return data


def _pack(sock: _socket.socket, place: str) -> None:
    """Raises Refused or OSError only while nothing was sent; later the connection just ends."""
    total = 0
    for _path, _name, found in _below(place):
        total += found.st_size if modes.S_ISREG(found.st_mode) else 0
    if total > TOTAL_LIMIT:
        raise wire.Refused(413, "too_large", f"an archive has at most {TOTAL_LIMIT} bytes of files")
    extra = "Transfer-Encoding: chunked\r\n"
    sock.sendall(wire.head(200, "application/x-tar", None, keep_alive=False, extra=extra))
    try:
        tar = tarfile.open(  # noqa: SIM115  # Closed only when it is whole.
            fileobj=_Chunks(sock),
            mode="w|",
            bufsize=_PIECE,
            format=tarfile.PAX_FORMAT,  # type: ignore[call-overload]
        )
        for path, name, found in _below(place):
            total -= _add(tar, path, name, found)
            tar.members = []  # It remembers each one, without need.
            if total < -TOTAL_LIMIT:
                return  # Grown while it was read, and still growing.
        tar.close()
        sock.sendall(b"0\r\n\r\n")
    except OSError:
        return  # Cut: the last chunk is missing.


def _below(place: str) -> "Iterator[tuple[str, str, os.stat_result]]":
    """Files, folders and symlinks, each folder before what it holds; (path, name in the archive, state)."""
    found = os.stat(place)
    if not modes.S_ISDIR(found.st_mode):
        if not modes.S_ISREG(found.st_mode):
            raise wire.Refused(400, "not_a_file", "the path is a device, socket or FIFO")
        yield place, os.path.basename(place), found
        return
    pending = [(place, "")]
    while pending:
        folder, prefix = pending.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    found = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # Removed while we looked.
                name = prefix + entry.name
                if modes.S_ISDIR(found.st_mode):
                    pending.append((entry.path, name + "/"))
                elif not (modes.S_ISREG(found.st_mode) or modes.S_ISLNK(found.st_mode)):
                    continue
                yield entry.path, name, found


def _add(tar: tarfile.TarFile, path: str, name: str, found: os.stat_result) -> int:
    """Write one member; returns the bytes of its content."""
    info = tarfile.TarInfo(name)
    info.mode = modes.S_IMODE(found.st_mode) & 0o777
    info.mtime = found.st_mtime
    if modes.S_ISDIR(found.st_mode):
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
        return 0
    if modes.S_ISLNK(found.st_mode):
        try:
            info.type, info.linkname = tarfile.SYMTYPE, os.readlink(path)
        except FileNotFoundError:
            return 0
        tar.addfile(info)
        return 0
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        opened = os.fstat(fd)
        if not modes.S_ISREG(opened.st_mode):
            return 0
        info.size = opened.st_size
        tar.addfile(info, _Padded(fd))  # type: ignore[arg-type]
        return info.size
    finally:
        os.close(fd)


# In.


class _Member(tarfile.TarInfo):
    """Says of a header in the middle that is broken or cut, where tarfile takes it for the end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(tar)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from None


class _Incoming:
    """A request body as tarfile reads one."""

    def __init__(self, body: "_Body") -> None:
        self._pieces = body.pieces()
        self._kept = b""

    def read(self, size: int) -> bytes:
        while len(self._kept) < size:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._kept += piece
        data, self._kept = self._kept[:size], self._kept[size:]
        return data


def _unpack(place: str, body: "_Body") -> dict[str, object]:
    if body.length > TOTAL_LIMIT:
        raise wire.Refused(413, "too_large", f"an archive has at most {TOTAL_LIMIT} bytes")
    os.makedirs(place, exist_ok=True)
    base = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    count = size = 0
    with tarfile.open(fileobj=_Incoming(body), mode="r|*", bufsize=_PIECE, tarinfo=_Member) as tar:  # type: ignore[call-overload]
        while (member := tar.next()) is not None:
            tar.members = []
            names = _names(member.name)
            if member.isfile() or member.islnk():
                count += 1
                size += member.size
            if size > TOTAL_LIMIT:
                raise wire.Refused(413, "too_large", f"an archive has at most {TOTAL_LIMIT} bytes of files")
            if names:
                _make(base, names, member, tar)
            elif not member.isdir():
                raise _bad(f"{member.name!r} is no name")
    for _ in body.pieces():
        pass  # What is behind the archive's end.
    return {"path": place, "files": count, "size": size}


def _bad(why: str) -> wire.Refused:
    return wire.Refused(400, "bad_archive", why[:300])


def _names(path: str) -> list[str]:
    """Return the names on the way; a leading slash does not count."""
    names = [name for name in path.split("/") if name not in ("", ".")]
    if ".." in names or "\0" in path or len(path) > 4096:
        raise _bad(f"{path!r} leads out of the archive")
    return names


def _folder(base: int, names: list[str], *, make: bool) -> int:
    """Open a folder below `base`, never through a symlink. The caller closes it."""
    at = os.dup(base)
    try:
        for name in names:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o755, dir_fd=at)
            try:
                below = os.open(name, _FOLDER, dir_fd=at)
            except OSError as error:
                if error.errno in (errno.ENOTDIR, errno.ELOOP):
                    raise _bad(f"{name!r} is in the way and no folder") from None
                raise
            os.close(at)
            at = below
    except BaseException:
        os.close(at)
        raise
    return at


def _make(base: int, names: list[str], member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
    mode = member.mode & 0o777
    if member.isdir():
        at = _folder(base, names, make=True)
        os.fchmod(at, mode | 0o700)
        os.close(at)
        return
    at = _folder(base, names[:-1], make=True)
    name = names[-1]
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=at)
        if member.issym():
            os.symlink(member.linkname, name, dir_fd=at)
        elif member.islnk():
            source = _names(member.linkname)
            if not source:
                raise _bad(f"{member.linkname!r} is no name")
            other = _folder(base, source[:-1], make=False)
            try:
                os.link(source[-1], name, src_dir_fd=other, dst_dir_fd=at, follow_symlinks=False)
            finally:
                os.close(other)
        elif member.isreg():
            _make_file(at, name, mode, member, tar)
        else:
            raise _bad(f"{member.name!r} is a device or FIFO")
    finally:
        os.close(at)


def _make_file(at: int, name: str, mode: int, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
    source = tar.extractfile(member)
    if source is None:
        raise _bad(f"{member.name!r} has no content")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, 0o600, dir_fd=at)
    try:
        while piece := source.read(_PIECE):
            view = memoryview(piece)
            while view:
                view = view[os.write(fd, view) :]
        os.fchmod(fd, mode)
        if 0 <= member.mtime < 1 << 40:
            os.utime(fd, (member.mtime, member.mtime))
    finally:
        os.close(fd)

"""Workspace and home as one tar, exactly as they are, and back.

Where `archive` moves a folder for people, this keeps all of it: modes, times to the nanosecond, hard links, empty
folders, files that their owner cannot read. Sockets, FIFOs and devices are left out, and counted. Each file is as
it was at some moment while it was read; nothing holds the others still meanwhile.
"""

import _socket
import contextlib
import errno
import os
import stat as modes
import tarfile

from . import archive, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from .files import _Body

    Links = dict[tuple[int, int], str]

_GROWTH = 64 * 1024 * 1024
"""What the files may grow beyond the limit while they are read."""
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_HOLE = 64 * 1024
_ZEROS = bytes(_HOLE)


def serve(sock: _socket.socket, action: str, workspace: str, home: str, limit: int, body: "_Body") -> None:
    """Answer the request and close, in a child; returns when that has ended. `limit`: bytes of files, 0 for none."""
    roots = {"workspace": workspace}
    if home != workspace and not (home + "/").startswith(workspace + "/"):
        roots["home"] = home
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        if action == "save":
            archive.answered(sock, body, lambda: _save(sock, roots, limit))
        else:
            archive.answered(sock, body, lambda: _restore(roots, body))
    finally:
        os._exit(0)


# Out.


def _save(sock: _socket.socket, roots: "dict[str, str]", limit: int) -> None:
    """Raises Refused or OSError only while nothing was sent; later the connection just ends."""
    files = size = skipped = 0
    for _path, _name, found in _everything(roots):
        if modes.S_ISREG(found.st_mode):
            files += 1
            size += found.st_size
        elif not (modes.S_ISDIR(found.st_mode) or modes.S_ISLNK(found.st_mode)):
            skipped += 1
    if limit and size > limit:
        raise wire.Refused(413, "too_large", f"the files have {size} bytes, {limit} are allowed")
    extra = f"X-E2A-Files: {files}\r\nX-E2A-Bytes: {size}\r\nX-E2A-Skipped: {skipped}\r\n"
    extra += "Transfer-Encoding: chunked\r\n"
    sock.sendall(wire.head(200, "application/x-tar", None, keep_alive=False, extra=extra))
    left = (limit or 1 << 62) + _GROWTH
    links: Links = {}
    try:
        tar = tarfile.open(  # noqa: SIM115  # Closed only when it is whole.
            fileobj=archive._Chunks(sock),
            mode="w|",
            bufsize=archive._PIECE,
            format=tarfile.PAX_FORMAT,  # type: ignore[call-overload]
        )
        for path, name, found in _everything(roots):
            left -= _add(tar, path, name, found, links)
            tar.members = []
            if left < 0:
                return  # Grown while it was read, and still growing.
        tar.close()
        sock.sendall(b"0\r\n\r\n")
    except OSError:
        return  # Cut: the last chunk is missing.


def _everything(roots: "dict[str, str]") -> "Iterator[tuple[str, str, os.stat_result]]":
    """All there is, each folder before what it holds; (path, name in the archive, state).

    A folder that its owner cannot read is made readable until the walk is over.
    """
    opened: list[tuple[str, int]] = []
    try:
        for root, place in roots.items():
            yield place, root, os.stat(place)
            pending = [(place, root + "/")]
            while pending:
                folder, prefix = pending.pop()
                try:
                    entries = _listed(folder, opened)
                except (FileNotFoundError, NotADirectoryError):
                    continue  # Removed while we looked.
                for name in entries:
                    path = f"{folder}/{name}"
                    try:
                        found = os.lstat(path)
                    except (FileNotFoundError, NotADirectoryError):
                        continue
                    if modes.S_ISDIR(found.st_mode):
                        pending.append((path, f"{prefix}{name}/"))
                    yield path, prefix + name, found
    finally:
        for path, mode in reversed(opened):
            with contextlib.suppress(OSError):
                os.chmod(path, mode)


def _listed(folder: str, opened: "list[tuple[str, int]]") -> "list[str]":
    if not os.access(folder, os.R_OK | os.X_OK):
        mode = modes.S_IMODE(os.lstat(folder).st_mode)
        os.chmod(folder, mode | 0o500)
        opened.append((folder, mode))
    return os.listdir(folder)


def _add(tar: tarfile.TarFile, path: str, name: str, found: os.stat_result, links: "Links") -> int:
    """Write one member; returns the bytes of its content. One that is gone meanwhile is left out."""
    info = tarfile.TarInfo(name)
    info.mode = modes.S_IMODE(found.st_mode)
    _time(info, found)
    if modes.S_ISDIR(found.st_mode):
        info.type = tarfile.DIRTYPE
    elif modes.S_ISLNK(found.st_mode):
        try:
            info.type, info.linkname = tarfile.SYMTYPE, os.readlink(path)
        except OSError:
            return 0
    elif modes.S_ISREG(found.st_mode):
        return _add_file(tar, path, info, found, links)
    else:
        return 0
    tar.addfile(info)
    return 0


def _time(info: tarfile.TarInfo, found: os.stat_result) -> None:
    whole, rest = divmod(found.st_mtime_ns, 1_000_000_000)
    info.mtime = max(0, whole)
    if whole >= 0 and rest:
        info.pax_headers = {"mtime": f"{whole}.{rest:09d}"}  # A float has not the digits.


def _add_file(
    tar: tarfile.TarFile, path: str, info: tarfile.TarInfo, found: os.stat_result, links: "Links"
) -> int:
    try:
        fd = _opened(path, found)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        if error.errno == errno.ELOOP:  # A symlink took its place.
            return 0
        raise
    try:
        opened = os.fstat(fd)
        if not modes.S_ISREG(opened.st_mode):
            return 0
        if opened.st_nlink > 1:
            key = (opened.st_dev, opened.st_ino)
            first = links.setdefault(key, info.name)
            if first != info.name:
                info.type, info.linkname = tarfile.LNKTYPE, first
                tar.addfile(info)
                return 0
        info.size = opened.st_size
        tar.addfile(info, archive._Padded(fd))  # type: ignore[arg-type]
        return info.size
    finally:
        os.close(fd)


def _opened(path: str, found: os.stat_result) -> int:
    """Open a file to read it, also where its owner may not."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except PermissionError:
        if modes.S_ISLNK(os.lstat(path).st_mode):
            raise
        mode = modes.S_IMODE(found.st_mode)
        os.chmod(path, mode | 0o400)
        try:
            return os.open(path, flags)
        finally:
            os.chmod(path, mode)


# In.


def _restore(roots: "dict[str, str]", body: "_Body") -> "dict[str, object]":
    """Make workspace and home what the archive says; what they held before is gone."""
    bases = {}
    for root, place in roots.items():
        os.makedirs(place, exist_ok=True)
        bases[root] = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        _empty(bases[root])
    folders: list[tuple[str, list[str], int, int]] = []
    files = size = 0
    with tarfile.open(  # type: ignore[call-overload]
        fileobj=archive._Incoming(body), mode="r|", bufsize=archive._PIECE, tarinfo=archive._Member
    ) as tar:
        while (member := tar.next()) is not None:
            tar.members = []
            root, *names = archive._names(member.name) or [""]
            base = bases.get(root)
            if base is None:
                continue  # Home, where there is none.
            if member.isdir():
                os.close(archive._folder(base, names, make=True))
                folders.append((root, names, member.mode & 0o7777, _nanoseconds(member)))
                continue
            if not names:
                raise archive._bad(f"{member.name!r} is no folder")
            files += not member.issym()
            size += member.size
            _make(bases, base, names, member, tar)
    for _ in body.pieces():
        pass  # What is behind the archive's end.
    # Last, and the inner ones first: whatever is made in a folder changes its time, and may need rights on it.
    for root, names, mode, moment in reversed(folders):
        at = archive._folder(bases[root], names, make=False)
        with contextlib.suppress(PermissionError):  # Another one's: the root itself.
            os.utime(at, ns=(moment, moment))
            os.fchmod(at, mode)
        os.close(at)
    return {"path": roots["workspace"], "files": files, "size": size}


def _empty(base: int) -> None:
    """Remove what is in a folder, not the folder."""
    levels = [(os.dup(base), "", os.listdir(base))]
    while levels:
        at, own_name, names = levels[-1]
        if not names:
            os.close(at)
            levels.pop()
            if levels:
                os.rmdir(own_name, dir_fd=levels[-1][0])
            continue
        name = names.pop()
        try:
            os.unlink(name, dir_fd=at)
        except IsADirectoryError:
            os.chmod(name, 0o700, dir_fd=at)
            below = os.open(name, _FOLDER, dir_fd=at)
            levels.append((below, name, os.listdir(below)))


def _nanoseconds(member: tarfile.TarInfo) -> int:
    text = str(member.pax_headers.get("mtime", ""))
    whole, _, rest = text.partition(".")
    if whole.isdecimal() and (not rest or rest.isdecimal()) and len(whole) < 12:
        return int(whole) * 1_000_000_000 + int(rest[:9].ljust(9, "0"))
    return int(member.mtime) * 1_000_000_000 if 0 <= member.mtime < 1 << 33 else 0


def _make(
    bases: "dict[str, int]", base: int, names: "list[str]", member: tarfile.TarInfo, tar: tarfile.TarFile
) -> None:
    at = archive._folder(base, names[:-1], make=True)
    name = names[-1]
    moment = _nanoseconds(member)
    try:
        if member.issym():
            os.symlink(member.linkname, name, dir_fd=at)
            os.utime(name, ns=(moment, moment), dir_fd=at, follow_symlinks=False)
        elif member.islnk():
            root, *source = archive._names(member.linkname) or [""]
            if not source or root not in bases:
                raise archive._bad(f"{member.linkname!r} is no name")
            other = archive._folder(bases[root], source[:-1], make=False)
            try:
                os.link(source[-1], name, src_dir_fd=other, dst_dir_fd=at, follow_symlinks=False)
            finally:
                os.close(other)
        elif member.isreg():
            _make_file(at, name, member, tar, moment)
        else:
            raise archive._bad(f"{member.name!r} is a device or FIFO")
    finally:
        os.close(at)


def _make_file(at: int, name: str, member: tarfile.TarInfo, tar: tarfile.TarFile, moment: int) -> None:
    source = tar.extractfile(member)
    if source is None:
        raise archive._bad(f"{member.name!r} has no content")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, 0o600, dir_fd=at)
    try:
        written = 0
        while piece := source.read(_HOLE):
            if len(piece) == _HOLE and piece == _ZEROS:
                os.lseek(fd, _HOLE, os.SEEK_CUR)  # A hole stays one.
            else:
                view = memoryview(piece)
                while view:
                    view = view[os.write(fd, view) :]
            written += len(piece)
        os.ftruncate(fd, written)
        os.fchmod(fd, member.mode & 0o7777)
        os.utime(fd, ns=(moment, moment))
    finally:
        os.close(fd)

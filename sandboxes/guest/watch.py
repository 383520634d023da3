"""Watching a folder with inotify, served by a runner as the sandbox's uid on the client's own connection.

The kernel's queue is the only one: while the client does not read, nothing is taken from it, and when it
overflows the client is told to look for itself. Symlinks below the folder are never followed.
"""

import _ctypes
import _socket
import _struct
import errno
import os
import select
import time

from . import linux, wire

FOLDERS_LIMIT = 4096
"""Watched at once by one watch; the kernel counts them against the sandbox's uid."""
KEEP_ALIVE_SECONDS = 10.0
_MOVE_SECONDS = 0.05
"""How long the second half of a move is waited for."""
_OUTBOX = 64 * 1024
_EVENT = _struct.Struct("iIII")

_MODIFY, _MOVED_FROM, _MOVED_TO, _CREATE = 0x2, 0x40, 0x80, 0x100
_DELETE, _DELETE_SELF, _MOVE_SELF = 0x200, 0x400, 0x800
_UNMOUNT, _OVERFLOW, _IGNORED, _ISDIR = 0x2000, 0x4000, 0x8000, 0x40000000
_ONLYDIR, _DONT_FOLLOW, _EXCL_UNLINK = 0x1000000, 0x2000000, 0x4000000
_MASK = _MODIFY | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE | _DELETE_SELF | _MOVE_SELF | _EXCL_UNLINK


class TooManyFolders(Exception):
    """More than FOLDERS_LIMIT, or than the kernel allows this uid."""


class PathGone(Exception):
    """The folder itself was removed, renamed or unmounted."""


def serve(sock: _socket.socket, place: str, recursive: bool) -> None:
    """Watch until the client is gone or the folder is; answers the head, or raises Refused or OSError before
    that.
    """
    watch = _Watch(place, recursive)
    try:
        try:
            watch.begin()
        except TooManyFolders:
            detail = f"one watch covers at most {FOLDERS_LIMIT} folders, fewer where the kernel says so"
            raise wire.Refused(409, "too_many_folders", detail) from None
        sock.setblocking(False)
        watch.outbox = bytearray(wire.head(200, "application/x-ndjson", None, keep_alive=False))
        watch.tell({"type": "ready", "path": place, "folders": len(watch.folders)})
        try:
            _pump(watch, sock)
            return
        except TooManyFolders:
            watch.tell({"type": "end", "reason": "too_many_folders"})
        except PathGone:
            watch.tell({"type": "end", "reason": "path_gone"})
        except OSError:
            return  # It is cut: a second head would look like events.
        sock.settimeout(None)
        sock.sendall(watch.outbox)
    finally:
        os.close(watch.fd)


def _pump(watch: "_Watch", sock: _socket.socket) -> None:
    """Hand events on at the client's pace. Returns when it is gone."""
    poll = select.poll()
    last_sent = time.monotonic()
    while True:
        poll.register(sock, select.POLLIN | (select.POLLOUT if watch.outbox else 0))
        if len(watch.outbox) < _OUTBOX:
            poll.register(watch.fd, select.POLLIN)
        else:
            poll.register(watch.fd, 0)
        wait = _MOVE_SECONDS if watch.departed else KEEP_ALIVE_SECONDS
        ready = dict(poll.poll(wait * 1000))
        if ready.get(sock.fileno(), 0) & (select.POLLIN | select.POLLHUP | select.POLLERR):
            return  # It has nothing more to say: it went.
        if ready.get(watch.fd):
            watch.take()
        now = time.monotonic()
        watch.settle(now - _MOVE_SECONDS)
        if not watch.outbox and now - last_sent >= KEEP_ALIVE_SECONDS:
            watch.outbox += b"\n"
        if watch.outbox:
            try:
                sent = sock.send(watch.outbox)
            except BlockingIOError:
                continue
            del watch.outbox[:sent]
            last_sent = now


class _Watch:
    """The kernel's watches of a tree, and what their events mean."""

    def __init__(self, place: str, recursive: bool) -> None:
        self.place = place
        self.recursive = recursive
        self.folders: dict[int, str] = {}  # By watch descriptor.
        self.outbox = bytearray()
        self.departed: dict[int, tuple[str, bool, float]] = {}  # Moved away, by cookie, and when.
        self._announced: set[str] = set()  # Found by a scan while its event may still be queued.
        self._root = 0
        self.fd = linux.inotify_init(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            number = _ctypes.get_errno()
            if number == errno.EMFILE:
                raise wire.Refused(409, "too_many_watches", "the kernel allows this user no more watches")
            raise OSError(number, os.strerror(number))

    def begin(self) -> None:
        """Watch the folder and what is below; raises OSError where there is no folder to be read."""
        try:
            self._root = self._add(self.place, _ONLYDIR)
        except NotADirectoryError:
            raise wire.Refused(400, "not_a_directory", "the path is not a directory") from None
        if self.recursive:
            self._descend(self.place)

    def tell(self, event: dict[str, object]) -> None:
        self.outbox += wire.to_json(event) + b"\n"

    def take(self) -> None:
        """Read what the kernel has, about 32 KiB of it, and say what it means."""
        try:
            data = os.read(self.fd, 32 * 1024)
        except BlockingIOError:
            return
        at = 0
        modified = ""
        while at < len(data):
            number, mask, cookie, length = _EVENT.unpack_from(data, at)
            name = data[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0")
            at += _EVENT.size + length
            if mask & _OVERFLOW:
                self._look_again()
                modified = ""
                continue
            if mask & _IGNORED:
                self.folders.pop(number, None)
                continue
            if mask & (_DELETE_SELF | _MOVE_SELF | _UNMOUNT):
                if number == self._root:
                    raise PathGone
                continue
            folder = self.folders.get(number)
            if folder is None:
                continue  # Of a folder that was moved out of the tree.
            path = os.path.join(folder, os.fsdecode(name))
            if mask & _MODIFY:
                if path != modified:
                    self._tell("modified", path, False)
                modified = path
            else:
                self._changed(mask, cookie, path)
                modified = ""
        if not self._is_waiting():
            self._announced.clear()  # What a scan found has no event left in the queue.

    def settle(self, before: float) -> None:
        """What moved away before then, and came nowhere, is gone for this tree."""
        for cookie, (path, is_folder, at) in list(self.departed.items()):
            if at <= before:
                del self.departed[cookie]
                self._leave(path)
                self._tell("deleted", path, is_folder)

    def _changed(self, mask: int, cookie: int, path: str) -> None:
        is_folder = bool(mask & _ISDIR)
        if mask & _MOVED_FROM:
            self.departed[cookie] = (path, is_folder, time.monotonic())
        elif mask & _MOVED_TO and cookie in self.departed:
            source = self.departed.pop(cookie)[0]
            if is_folder:
                self._rename(source, path)
            self._tell("moved", path, is_folder, source)
        elif mask & (_MOVED_TO | _CREATE):
            if path in self._announced:
                self._announced.discard(path)
                return
            self._tell("created", path, is_folder)
            if is_folder and self.recursive:
                self._enter(path)
        elif mask & _DELETE:
            self._announced.discard(path)
            self._tell("deleted", path, is_folder)

    def _tell(self, kind: str, path: str, is_folder: bool, source: str = "") -> None:
        event: dict[str, object] = {"type": kind, "path": path, "is_directory": is_folder}
        if source:
            event["from"] = source
        self.tell(event)

    def _is_waiting(self) -> bool:
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(0))

    def _add(self, path: str, flags: int) -> int:
        if len(self.folders) >= FOLDERS_LIMIT:
            raise TooManyFolders
        number: int = linux.inotify_add_watch(self.fd, os.fsencode(path), _MASK | flags)
        if number < 0:
            wrong = _ctypes.get_errno()
            if wrong == errno.ENOSPC:
                raise TooManyFolders
            raise OSError(wrong, os.strerror(wrong))
        self.folders[number] = path
        return number

    def _enter(self, path: str) -> None:
        """Watch a folder that is new here, and tell what came into it before it was watched."""
        seen = self._descend(path, enter=True)
        if len(seen) > FOLDERS_LIMIT:
            self.tell({"type": "overflow"})
            return
        for found, is_folder in seen:
            self._announced.add(found)
            self._tell("created", found, is_folder)

    def _descend(self, path: str, *, enter: bool = False) -> list[tuple[str, bool]]:
        """Watch all folders below a path; with `enter` itself too, and return what is there, FOLDERS_LIMIT + 1 at
        most.

        Raises TooManyFolders. One that is gone, replaced or not readable has nothing to be watched.
        """
        pending = [path]
        seen: list[tuple[str, bool]] = []
        while pending:
            folder = pending.pop()
            try:
                if enter or folder != path:
                    self._add(folder, _ONLYDIR | _DONT_FOLLOW)
                with os.scandir(folder) as entries:
                    for entry in entries:
                        is_folder = entry.is_dir(follow_symlinks=False)
                        if enter and len(seen) <= FOLDERS_LIMIT:
                            seen.append((entry.path, is_folder))
                        if is_folder:
                            pending.append(entry.path)
                            if len(pending) > FOLDERS_LIMIT:
                                raise TooManyFolders
            except OSError:
                continue
        return seen

    def _rename(self, source: str, target: str) -> None:
        for number, path in self.folders.items():
            if path == source or path.startswith(source + "/"):
                self.folders[number] = target + path[len(source) :]

    def _leave(self, path: str) -> None:
        for number, folder in list(self.folders.items()):
            if folder == path or folder.startswith(path + "/"):
                del self.folders[number]
                linux.inotify_rm_watch(self.fd, number)

    def _look_again(self) -> None:
        """Events were lost: watch what is there now, and say that the client must look, too."""
        self.departed.clear()
        self._announced.clear()
        before, self.folders = self.folders, {}
        self.folders[self._root] = self.place
        if self.recursive:
            self._descend(self.place)  # The same folder has the same number.
        for number in before.keys() - self.folders.keys():
            linux.inotify_rm_watch(self.fd, number)
        self.tell({"type": "overflow"})

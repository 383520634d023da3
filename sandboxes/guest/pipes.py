"""The ends of a command's standard streams that PID 1 holds."""

import _struct
import fcntl
import os

from .redaction import Redactor
from .wire import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .process import Process
    from .table import Table

READ = 64 * 1024
STDIN_LIMIT = 1 << 20
_EPOLLOUT = 4
_TIOCSWINSZ = 0x5414


class Output:
    """One output end: redacted into the log; once the process is over it is only kept from filling up."""

    __slots__ = ("_owner", "_paused", "fd", "kind", "redactor")

    def __init__(self, owner: "Process", fd: int, kind: int) -> None:
        self._owner = owner
        self._paused = False
        self.fd = fd
        self.kind = kind
        self.redactor = Redactor(owner.table.patterns)
        os.set_blocking(fd, False)
        owner.table.loop.watch(fd, self._on_ready)

    def _on_ready(self, events: int) -> None:
        if self.read() and not self._owner.over:
            self._owner.on_output()

    def read(self) -> bool:
        """Take what is there, once; return whether anything was there. Closes at the end of the stream."""
        try:
            piece = os.read(self.fd, READ)
        except BlockingIOError:
            return False
        except OSError:  # EIO: nobody has the terminal open any more.
            piece = b""
        if not piece:
            self.close()
            self._owner.on_output_closed(self)
            return False
        if not self._owner.over:
            self._owner.log.append(self.kind, self.redactor.feed(piece))
            self._owner.table.note_moved(0, len(piece))
        return True

    def pause(self, paused: bool) -> None:
        """Leave what comes in the pipe, so that the command has to wait."""
        if self.fd >= 0 and paused != self._paused:
            self._paused = paused
            if paused:
                self._owner.table.loop.unwatch(self.fd)
            else:
                self._owner.table.loop.watch(self.fd, self._on_ready)

    def close(self) -> None:
        if self.fd >= 0:
            self._owner.table.loop.unwatch(self.fd)
            os.close(self.fd)
            self.fd = -1


class Input:
    """Standard input: what the command does not take yet is kept, up to a limit."""

    def __init__(self, table: "Table", fd: int, first: bytes, *, closing: bool, terminal: bool) -> None:
        self._table = table
        self._fd = fd
        self._terminal = terminal
        self._closing = closing and not terminal
        self._queue = [first] if first else []
        self._watched = False
        os.set_blocking(fd, False)
        self._flush()

    @property
    def open(self) -> bool:
        """True while more may be written."""
        return self._fd >= 0 and not self._closing

    def write(self, data: bytes, *, close: bool) -> None:
        """Queue input; raises Refused when nobody reads it any more or too much waits already."""
        if not self.open:
            raise Refused(409, "stdin_closed", "the process takes no input")
        if self._queue and sum(map(len, self._queue)) + len(data) > STDIN_LIMIT:
            raise Refused(409, "stdin_full", "the process does not read its input")
        if close and self._terminal:
            data += b"\x04"  # What a terminal has instead of an end.
        elif close:
            self._closing = True
        if data:
            self._queue.append(data)
        self._flush()

    def _flush(self, events: int = 0) -> None:
        while self._queue:
            try:
                written = os.write(self._fd, self._queue[0][: READ * 4])
            except BlockingIOError:
                self._watch(True)
                return
            except OSError:  # EPIPE, EIO: nobody reads.
                self.close()
                return
            self._table.note_moved(written, 0)
            self._queue[0] = self._queue[0][written:]
            if not self._queue[0]:
                self._queue.pop(0)
        self._watch(False)
        if self._closing:
            self.close()

    def _watch(self, wanted: bool) -> None:
        if wanted != self._watched:
            self._watched = wanted
            if wanted:
                self._table.loop.watch(self._fd, self._flush, _EPOLLOUT)
            else:
                self._table.loop.unwatch(self._fd)

    def resize(self, cols: int, rows: int) -> None:
        """Tell the terminal its size; raises Refused when it is gone."""
        if self._fd < 0:
            raise Refused(409, "no_terminal", "the terminal is closed")
        fcntl.ioctl(self._fd, _TIOCSWINSZ, _struct.pack("HHHH", rows, cols, 0, 0))

    def foreground(self) -> int:
        """The process group that reads from the terminal; 0 when nobody knows."""
        try:
            return os.tcgetpgrp(self._fd) if self._fd >= 0 else 0
        except OSError:
            return 0

    def close(self) -> None:
        self._queue.clear()
        if self._fd >= 0:
            self._watch(False)
            os.close(self._fd)
            self._fd = -1

"""Streams of output frames: a follower reads a process's log at its connection's own pace."""

from . import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .connection import Connection
    from .process import Process

PIECE = 64 * 1024
KEEP_ALIVE_SECONDS = 10.0


class Follower:
    """One reader of one log. Its memory is one piece: what it does not read stays in the log, or falls out
    of it.
    """

    __slots__ = ("_connection", "_done", "_ends_process", "_live", "_offset", "_process")

    def __init__(
        self, connection: "Connection", process: "Process", *, after: int, live: bool, created: bool
    ) -> None:
        if after > process.log.end:
            raise wire.Refused(400, "bad_offset", f"the log ends at {process.log.end}, before {after}")
        self._connection = connection
        self._process = process
        self._offset = after
        self._live = live
        self._ends_process = False
        self._done = False
        process.followers.append(self)
        connection.begin_stream(201 if created else 200, self.pump, self._on_gone)
        process.on_read(after)
        if live:
            process.table.loop.call_in(self, KEEP_ALIVE_SECONDS, self._keep_alive)

    def end_process_when_gone(self) -> None:
        """The process is not wanted without this reader (kill_on_disconnect)."""
        self._ends_process = True

    def pump(self) -> None:
        """Send what the connection takes now."""
        process = self._process
        while not self._done and self._connection.flush():
            process.on_read(self._offset)
            frames, self._offset = process.log.frames(self._offset, PIECE)
            if frames and (self._offset < process.log.end or not process.over):
                self._connection.queue(frames)
                continue
            if process.over:
                told = wire.to_json(process.describe())
                frames += wire.FRAME.pack(wire.EXIT, self._offset, len(told)) + told
            elif self._live:
                return
            self._leave()
            self._connection.queue(frames)
            self._connection.finish()

    def _keep_alive(self) -> None:
        if self._connection.flush():
            self._connection.queue(wire.FRAME.pack(wire.KEEP_ALIVE, self._offset, 0))
            self._connection.flush()
        if not self._done:
            self._process.table.loop.call_in(self, KEEP_ALIVE_SECONDS, self._keep_alive)

    def _leave(self) -> None:
        self._done = True
        self._process.table.loop.cancel(self)
        if self in self._process.followers:
            self._process.followers.remove(self)
            self._process.on_read(self._offset)

    def _on_gone(self) -> None:
        self._leave()
        if self._ends_process:
            self._process.stop()

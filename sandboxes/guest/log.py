"""One process's combined output log: bytes by offset, stdout and stderr in arrival order, bounded memory."""

import _bisect

from . import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .tail import Tail

HISTORY = 512 * 1024
"""What a lossless log keeps of what was already sent, at least: a reader that died may not have read it."""

RUNS = 8192
"""How often stdout and stderr may alternate in what is kept; more counts as full."""


class OutputLog:
    """Offsets count redacted bytes of both streams together.

    `lossless` (on_full=block): nothing unread is dropped; `full` asks the owner to stop feeding. Otherwise a
    ring.
    """

    __slots__ = ("_data", "_kinds", "_starts", "_tail", "capacity", "end", "first", "lossless", "read_to")

    def __init__(self, capacity: int, lossless: bool, tail: "Tail | None" = None) -> None:
        self._tail = tail
        self.capacity = capacity
        self.lossless = lossless
        self.first = 0
        self.end = 0
        self.read_to = 0
        self._data = bytearray()
        self._starts: list[int] = []
        self._kinds = bytearray()

    @property
    def size(self) -> int:
        return len(self._data)

    @property
    def full(self) -> bool:
        """True when a lossless log wants no more until somebody reads."""
        return self.lossless and (self.end - self.read_to >= self.capacity or len(self._starts) >= RUNS)

    def append(self, kind: int, piece: bytes) -> None:
        if not piece:
            return
        if self._tail is not None:
            self._tail.append(piece)
        if not self._kinds or self._kinds[-1] != kind:
            self._starts.append(self.end)
            self._kinds.append(kind)
        self._data += piece
        self.end += len(piece)
        if self.lossless:
            self._trim_read()
        elif len(self._data) > self.capacity or len(self._starts) > RUNS:
            oldest = self._starts[1] if len(self._starts) > RUNS else 0
            self.trim(max(oldest, self.end - self.capacity))

    def mark_read(self, offset: int) -> None:
        """Note how far the furthest reader is."""
        if offset > self.read_to:
            self.read_to = min(offset, self.end)
            if self.lossless:
                self._trim_read()

    def _trim_read(self) -> None:
        keep = self.read_to - max(self.capacity, HISTORY)
        # In steps: cutting a little off the front with every append would cost more than it saves.
        if keep - self.first >= 65536:
            self.trim(keep)
        while len(self._starts) >= RUNS and self._starts[1] <= self.read_to:
            self.trim(self._starts[min(RUNS // 4, len(self._starts) - 1)])

    def seal(self) -> None:
        """Give back what was allocated for more: nothing will be appended."""
        self._data = bytearray(self._data)

    def trim(self, offset: int) -> None:
        """Forget what is before `offset`."""
        if offset <= self.first:
            return
        offset = min(offset, self.end)
        del self._data[: offset - self.first]
        self.first = offset
        past = _bisect.bisect_right(self._starts, offset) - 1
        if past > 0:
            del self._starts[:past]
            del self._kinds[:past]
        if self._starts:
            self._starts[0] = offset
        if not self._data:
            self._starts.clear()
            self._kinds.clear()

    def frames(self, offset: int, limit: int) -> tuple[bytes, int]:
        """Return frames of about `limit` bytes from `offset` on, a gap frame first where bytes are gone, and
        the next offset. Empty when there is nothing new."""
        out: list[bytes] = []
        if offset < self.first:
            gap = wire.to_json({"dropped": self.first - offset})
            out += (wire.FRAME.pack(wire.GAP, self.first, len(gap)), gap)
            offset = self.first
        run = _bisect.bisect_right(self._starts, offset) - 1
        while offset < self.end and limit > 0:
            stop = self._starts[run + 1] if run + 1 < len(self._starts) else self.end
            size = min(stop - offset, limit)
            at = offset - self.first
            out += (wire.FRAME.pack(self._kinds[run], offset, size), bytes(self._data[at : at + size]))
            offset += size
            limit -= size + wire.FRAME.size
            run += 1
        return b"".join(out), offset

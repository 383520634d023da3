"""The end of what all processes printed, in a file next to the socket: whoever finds the guest dead reads it there.

Eight bytes, how much there ever was, then a ring of 64 KiB. Output comes here redacted. Two writes to memory (the
folder is a tmpfs) for each piece of output.
"""

import os

SIZE = 64 * 1024
NAME = "printed"


class Tail:
    """A file that cannot be written (a full disk of the process engine) is done without."""

    def __init__(self, folder: str) -> None:
        self._total = 0
        self._fd = -1
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(os.path.join(folder, NAME), flags, 0o600)
            # Taken now, so that no output can fail for want of room later.
            os.posix_fallocate(self._fd, 0, 8 + SIZE)
        except OSError:
            self._close()

    def append(self, piece: bytes) -> None:
        if self._fd < 0 or not piece:
            return
        self._total += len(piece)
        piece = piece[-SIZE:]
        at = (self._total - len(piece)) % SIZE
        room = SIZE - at
        try:
            os.pwrite(self._fd, piece[:room], 8 + at)
            if len(piece) > room:
                os.pwrite(self._fd, piece[room:], 8)
            os.pwrite(self._fd, self._total.to_bytes(8, "big"), 0)
        except OSError:
            self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

"""What PID 1 and its runners tell each other over their socket pair, one packet a message.

To a runner: an operation byte and a marshalled tuple (a packet too large for a socket buffer: only its
operation, the rest in a memory file that comes along). From a runner: one fixed struct that PID 1 can read
without trusting it.
"""

import _socket
import _struct
import marshal
import os

SPAWN, FILES, TUNNEL = 1, 2, 3
STARTED, REFUSED, ENDED, IDLE, MOVED, TUNNELS_ENDED = 1, 2, 3, 4, 5, 6
AT_FOLDER, AT_PROGRAM, AT_SETUP = 1, 2, 3

REPORT = _struct.Struct("=Bqq")
_PACKET_LIMIT = 64 * 1024


def send_job(sock: _socket.socket, operation: int, job: tuple[object, ...], fds: list[int]) -> None:
    """Hand a job to an idle runner without waiting; raises OSError when the runner is not able to take it."""
    payload = marshal.dumps(job)  # type: ignore[arg-type]
    if len(payload) <= _PACKET_LIMIT:
        _send(sock, bytes((operation, 0)) + payload, fds)
        return
    memory = os.memfd_create("job", os.MFD_CLOEXEC)
    try:
        write_all(memory, payload)
        _send(sock, bytes((operation, 1)), [memory, *fds])
    finally:
        os.close(memory)


def receive_job(sock: _socket.socket) -> tuple[int, tuple[object, ...], list[int]] | None:
    """Wait for the next job; None when PID 1 is gone or wants no more."""
    packet, ancillary, _, _ = sock.recvmsg(_PACKET_LIMIT + 2, _socket.CMSG_SPACE(8))
    if not packet:
        return None
    fds = fds_of(ancillary)
    payload = packet[2:]
    if packet[1]:
        memory = fds.pop(0)
        size = os.lseek(memory, 0, os.SEEK_END)
        payload = os.pread(memory, size, 0)
        os.close(memory)
    return packet[0], marshal.loads(payload), fds  # noqa: S302 - PID 1 made it


def report(
    sock: _socket.socket, kind: int, first: int = 0, second: int = 0, fds: list[int] | None = None
) -> None:
    _send(sock, REPORT.pack(kind, first, second), fds or [])


def receive_report(sock: _socket.socket) -> tuple[int, int, int, list[int]] | None:
    """Return (kind, first, second, fds); None when the runner is gone. Raises BlockingIOError when there is
    none.
    """
    packet, ancillary, _, _ = sock.recvmsg(
        REPORT.size, _socket.CMSG_SPACE(16), _socket.MSG_DONTWAIT | _socket.MSG_CMSG_CLOEXEC
    )
    if len(packet) != REPORT.size:
        return None
    kind, first, second = REPORT.unpack(packet)
    return kind, first, second, fds_of(ancillary)


def fds_of(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds: list[int] = []
    for level, kind, data in ancillary:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            fds += _struct.unpack(f"={len(data) // 4}i", data[: len(data) & ~3])
    return fds


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _send(sock: _socket.socket, packet: bytes, fds: list[int]) -> None:
    rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, _struct.pack(f"={len(fds)}i", *fds))] if fds else []
    sock.sendmsg([packet], rights, _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)

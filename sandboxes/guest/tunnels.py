"""Tunnels to loopback ports of the sandbox: PID 1 counts them, one runner of the sandbox's uid carries them all.

PID 1 never connects anywhere. It hands each client's connection to the runner, which connects to the port, answers
101 or why not, and then moves bytes both ways. A direction holds one piece of `PIECE` bytes at most, so a side that
does not read stops the other side's sending.
"""

import _socket
import errno
import os
import select
import time

from . import messages, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from .loop import Loop
    from .pool import Runner
    from .table import Table

TUNNELS_LIMIT = 128
CONNECT_SECONDS = 5.0
UNUSED_SECONDS = 30.0
"""The runner is kept so long after its last tunnel."""
REPORT_SECONDS = 1.0
PIECE = 32 * 1024

_IN, _OUT, _HUP, _ERR = select.EPOLLIN, select.EPOLLOUT, select.EPOLLHUP, select.EPOLLERR
_SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: e2a-tunnel\r\n\r\n"
_CLIENT, _SERVER = 0, 1


class Carrying:
    """What the pool tells of a runner that carries bytes and runs no command: all but its loss is no news."""

    pid = 0
    ended = False

    def on_runner_lost(self) -> None:
        raise NotImplementedError

    def on_started(self, pid: int, fds: list[int]) -> None:
        raise AssertionError("a carrier starts no command")

    def on_refused(self, stage: int, number: int) -> None:
        self.on_runner_lost()

    def on_ended(self, status: int, alone: bool) -> None:
        self.on_runner_lost()

    def on_adopted(self) -> None:
        self.on_runner_lost()

    def on_idle(self, taken: int, sent: int) -> None:
        self.on_runner_lost()


class Tunnels(Carrying):
    """All tunnels, as PID 1 sees them: how many there are, and whose they are. Told by the pool what happens."""

    def __init__(self, loop: "Loop", table: "Table") -> None:
        self._loop = loop
        self._table = table
        self._runner: Runner | None = None
        self._open = 0

    def add(self, port: int, fd: int, begun: bytes) -> None:
        """Hand a client's connection to the runner. Raises Refused at the limit, or without a runner."""
        if self._open >= TUNNELS_LIMIT:
            raise wire.Refused(503, "busy", f"at most {TUNNELS_LIMIT} tunnels are open at once")
        self._loop.cancel(self)
        try:
            if self._runner is not None:
                try:
                    messages.send_job(self._runner.sock, messages.TUNNEL, (port, begun), [fd])
                except OSError:
                    self._dismiss()  # Stopped, or dying: another one takes over.
            if self._runner is None:
                self._runner = self._table.pool.give(messages.TUNNEL, (port, begun), [fd], self)
        except OSError as error:
            raise wire.Refused(503, "no_resources", f"no runner can be started: {error.strerror}") from None
        self._open += 1

    def _dismiss(self) -> None:
        if self._runner is not None:
            self._table.pool.dismiss(self._runner)
        self._runner = None
        self._open = 0

    def on_tunnels(self, kind: int, first: int, second: int) -> None:
        if kind == messages.MOVED:
            self._table.note_moved(first, second)
            return
        self._open = max(0, self._open - first)
        if not self._open:
            self._loop.call_in(self, UNUSED_SECONDS, self._dismiss)

    def on_runner_lost(self) -> None:
        self._loop.cancel(self)
        self._runner = None
        self._open = 0


class _Tunnel:
    """Two sockets, and for each: what waits to be sent to it, whether it sends no more, whether it was told so.

    A server may answer and close before it has read everything (an upload it refuses). Then it is deaf: what is still
    sent to it is dropped, and what it said is passed on to its end.
    """

    __slots__ = ("addresses", "ended", "is_deaf", "port", "registered", "shut", "sockets", "until", "waiting")

    def __init__(self, client: _socket.socket, port: int, begun: bytes) -> None:
        self.sockets: list[_socket.socket | None] = [client, None]
        self.waiting = [b"", begun]
        self.ended = [False, False]
        self.shut = [False, False]
        self.is_deaf = False
        self.registered = [0, 0]
        self.port = port
        # A server that says `localhost` may listen on either.
        self.addresses = [(_socket.AF_INET6, "::1"), (_socket.AF_INET, "127.0.0.1")]
        self.until: float | None = time.monotonic() + CONNECT_SECONDS


class Carrier:
    """The runner's loop. Ends with PID 1's end of the socket pair."""

    def __init__(self, sock: _socket.socket) -> None:
        self._sock = sock
        self._epoll = select.epoll()
        self._sides: dict[int, tuple[_Tunnel, int]] = {}
        self._connecting: dict[_Tunnel, None] = {}
        self._ended = 0
        self._taken = 0
        self._sent = 0
        self._report_at = 0.0

    def run(self, port: int, begun: bytes, fd: int) -> "NoReturn":
        """Carry this tunnel, and those that come, until PID 1 wants no more; does not return."""
        self._sock.setblocking(False)
        self._epoll.register(self._sock.fileno(), _IN)
        self._begin(port, begun, fd)
        while True:
            if self._serve_events(self._patience()):
                self._take_job()
            now = time.monotonic()
            for tunnel in [one for one in self._connecting if one.until is not None and now > one.until]:
                self._refuse(tunnel, 504, "port_silent", "accepts no connection")
            self._report(now)

    def _serve_events(self, patience: float) -> list[int]:
        """Serve the tunnels that something happened to; returns what else is ready, for the caller to serve after them.

        Whose events they are is settled first: one tunnel may close what a later event is about, and another open
        something that gets its number.
        """
        ready = [(fd, events, self._sides.get(fd)) for fd, events in self._epoll.poll(patience)]
        for fd, events, side in ready:
            if side is not None and self._sides.get(fd) is side:
                self._on_event(*side, events)
        return [fd for fd, _, side in ready if side is None]

    def _patience(self) -> float:
        """Seconds to wait: until something that is timed is due, or (-1) for good."""
        moments = [one.until for one in self._connecting if one.until is not None]
        if self._taken or self._sent:
            moments.append(self._report_at)
        return max(0.0, min(moments) - time.monotonic()) if moments else -1.0

    def _report(self, now: float) -> None:
        """Tell PID 1 what moved, once a second, and at once what ended."""
        if (self._taken or self._sent) and (now >= self._report_at or self._ended):
            messages.report(self._sock, messages.MOVED, self._taken, self._sent)
            self._taken = self._sent = 0
            self._report_at = now + REPORT_SECONDS
        if self._ended:
            messages.report(self._sock, messages.TUNNELS_ENDED, self._ended)
            self._ended = 0

    def _take_job(self) -> None:
        try:
            job = messages.receive_job(self._sock)
        except BlockingIOError:
            return
        if job is None:
            os._exit(0)
        _, arguments, fds = job
        self._begin(int(arguments[0]), bytes(arguments[1]), fds[0])  # type: ignore[call-overload]

    def _begin(self, port: int, begun: bytes, fd: int) -> None:
        client = _socket.socket(fileno=fd)
        client.setblocking(False)
        tunnel = _Tunnel(client, port, begun)
        self._connecting[tunnel] = None
        self._connect(tunnel, errno.ECONNREFUSED)

    def _connect(self, tunnel: _Tunnel, failed: int) -> None:
        """Try the next address; `failed` is why the last one was not it."""
        while tunnel.addresses:
            family, host = tunnel.addresses.pop()
            try:
                server = _socket.socket(family, _socket.SOCK_STREAM)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENOMEM, errno.EAFNOSUPPORT):
                    raise
                continue  # No IPv6 here, or no more descriptors.
            server.setblocking(False)
            server.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
            try:
                server.connect((host, tunnel.port))
            except BlockingIOError:
                pass
            except OSError as error:
                server.close()
                failed = error.errno or failed
                continue
            tunnel.sockets[_SERVER] = server
            self._watch(tunnel, _SERVER, _OUT)
            return
        self._refuse(tunnel, 409, "port_closed", "nothing listens")

    def _refuse(self, tunnel: _Tunnel, status: int, code: str, why: str) -> None:
        client = tunnel.sockets[_CLIENT]
        assert client is not None
        try:  # noqa: SIM105  (contextlib is not loaded in the guest)
            client.send(self._refusal(tunnel, status, code, why), _socket.MSG_NOSIGNAL)
        except OSError:
            pass  # The client is gone, or its empty socket takes not even this.
        self._close(tunnel)

    def _refusal(self, tunnel: _Tunnel, status: int, code: str, why: str) -> bytes:
        told = {"code": code, "detail": f"{why} on port {tunnel.port} of the sandbox"}
        return wire.response(status, told, keep_alive=False)

    def _answer_begun(self) -> bytes:
        """What a client is sent before anything of the server's."""
        return _SWITCHED

    def _connected(self, tunnel: _Tunnel) -> None:
        server = tunnel.sockets[_SERVER]
        assert server is not None
        failed = server.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR)
        if failed:
            self._watch(tunnel, _SERVER, 0)
            server.close()
            tunnel.sockets[_SERVER] = None
            self._connect(tunnel, failed)
            return
        del self._connecting[tunnel]
        tunnel.until = None
        tunnel.waiting[_CLIENT] = self._answer_begun()
        self._advance(tunnel)

    def _on_event(self, tunnel: _Tunnel, side: int, events: int) -> None:
        if tunnel.until is not None:
            self._connected(tunnel)
            return
        try:
            if events & _IN or (events & (_HUP | _ERR) and tunnel.registered[side] & _IN):
                self._read(tunnel, side)
            elif events & (_HUP | _ERR) and not events & _OUT:
                self._hung_up(tunnel, side)
                return
        except OSError:
            self._close(tunnel)  # The client is gone.
            return
        self._advance(tunnel)

    def _deafen(self, tunnel: _Tunnel) -> None:
        tunnel.is_deaf = tunnel.shut[_SERVER] = True
        tunnel.waiting[_SERVER] = b""

    def _hung_up(self, tunnel: _Tunnel, side: int) -> None:
        """A side that is not read now is gone altogether."""
        if side == _CLIENT and not tunnel.waiting[_SERVER]:
            self._close(tunnel)
        else:
            self._watch(tunnel, side, 0)  # It would be told again and again; what it sent is read later.

    def _read(self, tunnel: _Tunnel, side: int) -> None:
        source = tunnel.sockets[side]
        assert source is not None
        try:
            piece = source.recv(PIECE)
        except BlockingIOError:
            return
        except OSError:
            if side == _CLIENT:
                raise
            self._deafen(tunnel)  # Reset: what it has said is all there is.
            piece = b""
        if piece:
            if not (side == _CLIENT and tunnel.is_deaf):
                tunnel.waiting[1 - side] += piece
            if side == _CLIENT:
                self._taken += len(piece)
            else:
                self._sent += len(piece)
        else:
            tunnel.ended[side] = True

    def _advance(self, tunnel: _Tunnel) -> None:
        """Send what waits, pass ends on, and wait for what comes next."""
        for side in (_CLIENT, _SERVER):
            try:
                self._send(tunnel, side)
            except OSError:
                if side == _CLIENT:
                    self._close(tunnel)
                    return
                self._deafen(tunnel)
        if all(tunnel.shut):
            self._close(tunnel)
            return
        for side in (_CLIENT, _SERVER):
            wanted = _OUT if tunnel.waiting[side] else 0
            if not tunnel.ended[side] and not tunnel.waiting[1 - side]:
                wanted |= _IN
            self._watch(tunnel, side, wanted)

    def _send(self, tunnel: _Tunnel, side: int) -> None:
        target = tunnel.sockets[side]
        assert target is not None
        if tunnel.waiting[side]:
            try:
                count = target.send(tunnel.waiting[side], _socket.MSG_NOSIGNAL)
            except BlockingIOError:
                count = 0
            tunnel.waiting[side] = tunnel.waiting[side][count:]
        if tunnel.ended[1 - side] and not tunnel.waiting[side] and not tunnel.shut[side]:
            tunnel.shut[side] = True
            target.shutdown(_socket.SHUT_WR)

    def _watch(self, tunnel: _Tunnel, side: int, wanted: int) -> None:
        """Wait for these events; for none, and a client: that it hangs up."""
        sock = tunnel.sockets[side]
        assert sock is not None
        fd, before = sock.fileno(), tunnel.registered[side]
        if wanted == before and (fd in self._sides) == bool(wanted):
            return
        if wanted and fd in self._sides:
            self._epoll.modify(fd, wanted)
        elif wanted:
            self._epoll.register(fd, wanted)
            self._sides[fd] = (tunnel, side)
        elif fd in self._sides:
            self._epoll.unregister(fd)
            del self._sides[fd]
        tunnel.registered[side] = wanted

    def _close(self, tunnel: _Tunnel) -> None:
        self._connecting.pop(tunnel, None)
        for side in (_CLIENT, _SERVER):
            sock = tunnel.sockets[side]
            if sock is not None:
                self._watch(tunnel, side, 0)
                sock.close()
        self._ended += 1

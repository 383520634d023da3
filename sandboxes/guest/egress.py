"""The way out: a proxy's address on loopback, every connection of which becomes one to the gateway's socket.

Nothing is parsed here. PID 1 listens, and hands the listening socket to a runner of the sandbox's uid at the first
connection; the runner accepts and carries. When it is killed, PID 1 listens again and the next one takes over.
"""

import _socket
import os
import select
import time

from . import messages, wire
from .tunnels import _SERVER, UNUSED_SECONDS, Carrier, Carrying, _Tunnel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from .loop import Loop
    from .table import Table

PROXY_PORT = 3128
"""On 127.0.0.1, the port of most HTTP proxies."""
CONNECTIONS_LIMIT = 256
AGAIN_SECONDS = 0.2


def proxy_environment() -> dict[bytes, bytes]:
    """What makes programs use the proxy. Both spellings: curl heeds only the small `http_proxy`."""
    address, local = b"http://127.0.0.1:%d" % PROXY_PORT, b"localhost,127.0.0.1,::1"
    env = {b"HTTP_PROXY": address, b"HTTPS_PROXY": address, b"NO_PROXY": local}
    return env | {name.lower(): value for name, value in env.items()}


class Egress(Carrying):
    """PID 1's part; told by the pool what becomes of the runner."""

    def __init__(self, loop: "Loop", table: "Table", path: str) -> None:
        self._loop = loop
        self._table = table
        self._path = path
        self._listener = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
        self._listener.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", PROXY_PORT))
        self._listener.listen(CONNECTIONS_LIMIT)
        self._listener.setblocking(False)
        self._listen()

    def _listen(self) -> None:
        self._loop.watch(self._listener.fileno(), self._on_client)

    def _on_client(self, events: int) -> None:
        fd = self._listener.fileno()
        self._loop.unwatch(fd)
        try:
            self._table.pool.give(messages.FORWARD, (self._path,), [fd], self)
        except OSError:
            self.on_runner_lost()  # At a limit of the sandbox: tried again.

    def on_runner_lost(self) -> None:
        self._loop.call_in(self, AGAIN_SECONDS, self._listen)

    def on_tunnels(self, kind: int, first: int, second: int) -> None:
        if kind == messages.MOVED:
            self._table.note_moved(first, second)


class Forwarding(Carrier):
    """The runner's part: a carrier whose tunnels begin at a listening socket and lead to a unix socket."""

    def serve(self, path: str, fd: int) -> "NoReturn":
        """Accept and carry until nothing was open for a while, or PID 1 is gone; does not return."""
        self._path = path
        self._listener = _socket.socket(fileno=fd)
        self._listener.setblocking(False)
        self._count = 0
        self._listening = False
        self._unused_since = time.monotonic()
        self._sock.setblocking(False)
        self._epoll.register(self._sock.fileno(), select.EPOLLIN)
        self._accept_when(True)
        while True:
            patience = self._patience()
            ready = self._serve_events(UNUSED_SECONDS if patience < 0 else min(patience, UNUSED_SECONDS))
            if self._sock.fileno() in ready:
                os._exit(0)  # PID 1 says nothing more to us: it is gone.
            if fd in ready:
                self._accept()
            now = time.monotonic()
            for tunnel in [one for one in self._connecting if one.until is not None and now > one.until]:
                self._refuse(tunnel, 504, "gateway_silent", "the gateway accepts no connection")
            self._report(now)
            if self._count:
                self._unused_since = now
            elif now - self._unused_since >= UNUSED_SECONDS:
                os._exit(0)  # Who comes now waits in the socket's queue: PID 1 listens again.

    def _accept_when(self, wanted: bool) -> None:
        if wanted != self._listening:
            self._listening = wanted
            if wanted:
                self._epoll.register(self._listener.fileno(), select.EPOLLIN)
            else:
                self._epoll.unregister(self._listener.fileno())

    def _accept(self) -> None:
        try:
            fd, _ = self._listener._accept()  # type: ignore[attr-defined]
        except OSError:
            return  # It is gone again, or there are no descriptors: the next round tries anew.
        client = _socket.socket(fileno=fd)
        client.setblocking(False)
        client.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
        tunnel = _Tunnel(client, 0, b"")
        self._count += 1
        self._accept_when(self._count < CONNECTIONS_LIMIT)
        self._connecting[tunnel] = None
        self._connect(tunnel, 0)

    def _connect(self, tunnel: _Tunnel, failed: int) -> None:
        try:
            gateway = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        except OSError:
            self._refuse(tunnel, 503, "no_resources", "no more descriptors")
            return
        gateway.setblocking(False)
        try:
            gateway.connect(self._path)
        except OSError:  # A unix socket connects at once or not at all.
            gateway.close()
            self._refuse(
                tunnel, 503, "gateway_down", "the gateway is not there; nothing gets out until it is"
            )
            return
        tunnel.sockets[_SERVER] = gateway
        self._watch(tunnel, _SERVER, select.EPOLLOUT)

    def _answer_begun(self) -> bytes:
        return b""

    def _refusal(self, tunnel: _Tunnel, status: int, code: str, why: str) -> bytes:
        return wire.response(status, {"code": code, "detail": why}, keep_alive=False)

    def _close(self, tunnel: _Tunnel) -> None:
        super()._close(tunnel)
        self._count -= 1
        self._accept_when(self._count < CONNECTIONS_LIMIT)

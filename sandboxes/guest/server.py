"""PID 1: listens, keeps house, and ends everything at its deadline or on a signal."""

import _signal  # type: ignore[import-not-found]
import _socket
import gc
import os
import time

from .cgroup import MemoryCgroup
from .connection import BODY_SECONDS, HEAD_SECONDS, Connection
from .egress import Egress, proxy_environment
from .loop import Loop
from .routes import Routes
from .table import Table
from .tail import Tail

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .runner import Identity

CONNECTIONS_LIMIT = 200
DEADLINE_STATUS = 124
HOUSE_SECONDS = 5.0
FROZEN_SECONDS = 3.0
"""A deadline that is noticed so late was passed while everything was frozen."""
THAWED_SECONDS = 10.0
"""Then a new one is waited for so long."""


class Server:
    """The guest of one sandbox."""

    def __init__(
        self,
        *,
        address: str,
        identity: "Identity",
        home: str,
        path: str,
        lifetime: float | None,
        own_env: dict[bytes, bytes],
        egress: str | None = None,
    ) -> None:
        self.started = time.monotonic()
        self.loop = Loop()
        self.connections: set[Connection] = set()
        self.table = Table(self.loop, MemoryCgroup(), identity, home, path, own_env)
        self.table.tail = Tail(os.path.dirname(address) or ".")
        self.routes = Routes(self, self.table)
        self.now = time.monotonic
        self._identity = identity
        self._status = 0
        self._last_moment = None if lifetime is None else self.started + lifetime
        self._due = self.started
        self._address = address
        self._listener = listen(address)
        if egress is not None:
            self.table.set_base_environment(proxy_environment())
            Egress(self.loop, self.table, egress)

    def run(self) -> int:
        """Serve until the deadline or a TERM; returns the exit status."""
        waker, wakened = _socket.socketpair()
        for sock in (waker, wakened, self._listener):
            sock.setblocking(False)
        _signal.set_wakeup_fd(wakened.fileno(), warn_on_full_buffer=False)
        for number in (_signal.SIGCHLD, _signal.SIGINT, _signal.SIGTERM):
            _signal.signal(number, _noted)

        def on_signal(events: int) -> None:
            numbers = waker.recv(256)
            if _signal.SIGTERM in numbers or _signal.SIGINT in numbers:
                self.loop.stopped = True
            if _signal.SIGCHLD in numbers:
                self.table.reap()

        self.loop.watch(waker.fileno(), on_signal)
        self.loop.watch(self._listener.fileno(), self._accept)
        self.set_deadline(None)
        gc.collect()
        gc.freeze()
        self.table.pool.fork()  # Before the first request, not as part of it.
        self.loop.run()
        self._end()
        return self._status

    def set_deadline(self, seconds: float | None) -> None:
        """End everything in so many seconds, and never later than the lifetime given at the start; None:
        only then.
        """
        moments = [] if self._last_moment is None else [self._last_moment]
        if seconds is not None:
            moments.append(time.monotonic() + seconds)
        self.loop.cancel("deadline")
        if moments:
            self._due = min(moments)
            self.loop.call_at("deadline", self._due, self._on_deadline)

    def _on_deadline(self) -> None:
        """End, unless we were frozen when it was due: whoever thaws us may have moved it, and tells us now."""
        late = time.monotonic() - self._due
        if late > FROZEN_SECONDS:
            self._due = time.monotonic() + THAWED_SECONDS
            self.loop.call_at("deadline", self._due, self._on_deadline)
            return
        self._status = DEADLINE_STATUS
        self.loop.stopped = True

    def _end(self) -> None:
        if os.access(self._address, os.F_OK):
            os.unlink(self._address)
        if os.getpid() != 1:
            self.table.pool.close()  # As PID 1 the kernel does it, faster and without a race.

    def _accept(self, events: int) -> None:
        try:
            fd, _ = self._listener._accept()  # type: ignore[attr-defined]
        except BlockingIOError:
            return
        except OSError as error:
            os.write(2, f"e2a guest: accept: {error}\n".encode())
            self._pause_accepting()
            return
        connection = Connection(self, _socket.socket(fileno=fd), time.monotonic())
        self.connections.add(connection)
        if len(self.connections) >= CONNECTIONS_LIMIT:
            self._pause_accepting()
        if not self.loop.has("house"):
            self.loop.call_in("house", HOUSE_SECONDS, self._keep_house)
        connection.receive()  # Usually the request is there already.

    def _pause_accepting(self) -> None:
        self.loop.unwatch(self._listener.fileno())
        self.loop.call_in("accept", 0.1, self._resume_accepting)

    def _resume_accepting(self) -> None:
        if len(self.connections) >= CONNECTIONS_LIMIT:
            self._keep_house()
            self.loop.call_in("accept", 0.1, self._resume_accepting)
        else:
            self.loop.watch(self._listener.fileno(), self._accept)

    def _keep_house(self) -> None:
        """Close connections that have kept us waiting."""
        now = time.monotonic()
        for connection in list(self.connections):
            if connection.since is None:
                continue
            limit = BODY_SECONDS if connection.in_body else HEAD_SECONDS
            if now - connection.since > limit:
                connection.close()
        if self.connections:
            self.loop.call_in("house", HOUSE_SECONDS, self._keep_house)


def listen(address: str) -> _socket.socket:
    """Listen on a unix socket that only its owner can connect to; a stale one is replaced."""
    if os.path.lexists(address):
        os.unlink(address)
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    # Not connectable for a moment is better than connectable by others for a moment.
    mask = os.umask(0o177)
    try:
        listener.bind(address)
    finally:
        os.umask(mask)
    listener.listen(1024)
    return listener


def _noted(number: int, frame: object) -> None:
    """Do nothing: the number has been written to the wakeup descriptor."""

"""The event loop of PID 1: one thread, epoll, a handful of timers."""

import os
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

IN, OUT, HUP, ERR = select.EPOLLIN, select.EPOLLOUT, select.EPOLLHUP, select.EPOLLERR


class Loop:
    """Calls handlers when their descriptor is ready. A handler may be called once too often and must not
    block.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._timers: dict[object, tuple[float, Callable[[], None]]] = {}
        self._later: list[Callable[[], None]] = []
        self.stopped = False

    def watch(self, fd: int, handler: "Callable[[int], None]", mask: int = IN) -> None:
        self._handlers[fd] = handler
        self._epoll.register(fd, mask)

    def change(self, fd: int, mask: int) -> None:
        self._epoll.modify(fd, mask)

    def unwatch(self, fd: int) -> None:
        """Forget a descriptor; call before it is closed."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call_at(self, key: object, when: float, handler: "Callable[[], None]") -> None:
        """Call once at a monotonic time; the same key again replaces it."""
        self._timers[key] = (when, handler)

    def call_in(self, key: object, seconds: float, handler: "Callable[[], None]") -> None:
        self._timers[key] = (time.monotonic() + seconds, handler)

    def cancel(self, key: object) -> None:
        self._timers.pop(key, None)

    def has(self, key: object) -> bool:
        return key in self._timers

    def call_later(self, handler: "Callable[[], None]") -> None:
        """Call once when everything that is ready now has been handled."""
        self._later.append(handler)

    def run(self) -> None:
        """Run until `stopped`."""
        while not self.stopped:
            timeout = -1.0
            if self._timers:
                first = min([when for when, _ in self._timers.values()])
                timeout = max(0.0, first - time.monotonic())
            # Whose events they are is settled first: a handler may close what a later event is about, and another
            # one open something that gets its number, which would be told of an end that is not its own.
            ready = [(fd, events, self._handlers.get(fd)) for fd, events in self._epoll.poll(timeout)]
            for fd, events, handler in ready:
                if handler is not None and self._handlers.get(fd) is handler:
                    self._call(handler, events)
            if self._timers:
                now = time.monotonic()
                for key, (when, due) in list(self._timers.items()):
                    if when <= now and self._timers.pop(key, None) is not None:
                        self._call(due)
            while self._later:
                waiting, self._later = self._later, []
                for one in waiting:
                    self._call(one)

    def _call(self, handler: "Callable[..., None]", *arguments: int) -> None:
        try:
            handler(*arguments)
        except Exception as error:  # PID 1 must not die of one request: it is told and goes on.
            at = error.__traceback__
            while at is not None and at.tb_next is not None:
                at = at.tb_next
            place = f"{at.tb_frame.f_code.co_filename}:{at.tb_lineno}" if at else "?"
            os.write(2, f"e2a guest: {type(error).__name__}: {error} at {place}\n".encode())

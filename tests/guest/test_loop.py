"""The event loops of PID 1 and of what carries tunnels: each hears of its own descriptors only."""

from __future__ import annotations

import os
import select
import socket

from sandboxes.guest.loop import HUP, Loop
from sandboxes.guest.tunnels import Carrier, _Tunnel


def test_who_got_the_number_of_a_closed_descriptor_hears_nothing_of_its_end() -> None:
    """Two pipes end at once. Whichever is served first closes the other, whose number goes to something new, as when a
    command ends (its pipes are closed) and a client connects in the same round: the client was hung up on."""
    loop = Loop()
    readers = []
    for _ in range(2):
        reader, writer = os.pipe()
        readers.append(reader)
        os.close(writer)
    fresh, keeps_open = os.pipe()
    served: list[int] = []
    told: list[int] = []

    def on_end(mine: int) -> None:
        other = readers[1 - mine]
        served.append(mine)
        loop.unwatch(readers[mine])
        loop.unwatch(other)
        os.dup2(fresh, other)
        loop.watch(other, told.append)
        loop.call_later(stop)

    def stop() -> None:
        loop.stopped = True

    loop.watch(readers[0], lambda events: on_end(0))
    loop.watch(readers[1], lambda events: on_end(1))
    loop.run()
    assert (len(served), told) == (1, [])

    # It hears of itself.
    loop.stopped = False
    os.close(keeps_open)
    os.close(fresh)
    loop.call_in("limit", 5.0, stop)
    loop.call_later(stop)
    loop.run()
    assert told == [HUP]
    for reader in readers:
        os.close(reader)


def test_a_tunnel_that_got_the_number_of_a_closed_one_hears_nothing_of_its_end() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pairs = [socket.socketpair() for _ in range(2)]
    fresh, keeps_open = socket.socketpair()
    tunnels = [_Tunnel(fresh, 0, b"") for _ in range(3)]
    told: list[_Tunnel] = []

    class Watched(Carrier):
        def _on_event(self, tunnel: _Tunnel, side: int, events: int) -> None:
            told.append(tunnel)
            if tunnel is not tunnels[2]:
                other = pairs[1 - tunnels.index(tunnel)][0].fileno()
                self._epoll.unregister(other)
                os.dup2(fresh.fileno(), other)
                self._epoll.register(other, select.EPOLLIN)
                self._sides[other] = (tunnels[2], 0)

    carrier = Watched(ours)
    for (mine, its), tunnel in zip(pairs, tunnels, strict=False):
        carrier._epoll.register(mine.fileno(), select.EPOLLIN)
        carrier._sides[mine.fileno()] = (tunnel, 0)
        its.close()
    assert carrier._serve_events(1.0) == []
    assert len(told) == 1
    assert told[0] is not tunnels[2]
    for one in (ours, theirs, fresh, keeps_open, *(mine for mine, _ in pairs)):
        one.close()

"""Where the model broker is, and connections to it: signed, one call at a time each, kept for the next call."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Final, Protocol, cast

from sandboxes.gateway.address import Address, UnixAddress, socket_path
from sandboxes.gateway.signing import signed_headers

MOST_IDLE: Final = 32
IDLE_SECONDS: Final = 60.0
"""Less than the broker's 120 s, so that it is seldom the one who ends it."""
WRITE_BYTES: Final = 256 * 1024
"""Of a request that wait for the broker; then no more is read of the program."""


class Call(Protocol):
    """Whoever uses a connection now."""

    def on_data(self, data: bytes) -> None:
        """Bytes of the answer."""

    def on_lost(self) -> None:
        """The connection is gone."""


class BrokerConnection(asyncio.Protocol):
    """`call` is None while it is idle."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self.is_fresh = True
        self.is_lost = False
        self.idle_since = 0.0
        self.transport: asyncio.Transport
        self._has_room = asyncio.Event()
        self._has_room.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=WRITE_BYTES)

    def data_received(self, data: bytes) -> None:
        if self.call is None:
            self.transport.abort()  # Nothing was asked.
        else:
            self.call.on_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        self._has_room.set()
        if self.call is not None:
            self.call.on_lost()

    def pause_writing(self) -> None:
        self._has_room.clear()

    def resume_writing(self) -> None:
        self._has_room.set()

    async def room(self) -> None:
        """Until it takes more, or is lost."""
        await self._has_room.wait()


@dataclass(slots=True)
class BrokerDoor:
    """The way to the broker, for one event loop. It holds no key of a vendor."""

    address: Address
    node_key: bytes = field(repr=False)
    _idle: list[BrokerConnection] = field(default_factory=list, repr=False)

    def signed(self, method: str, target: str, length: str) -> list[tuple[bytes, bytes]]:
        """The headers of a request that is sent now; its target names the sandbox that asks."""
        headers = signed_headers(node_key=self.node_key, method=method, target=target, length=length)
        return [(name.encode(), value.encode()) for name, value in headers]

    async def connected(self, *, fresh: bool = False) -> BrokerConnection:
        """A connection: one that was kept, or a new one. Raises OSError.

        A kept one may turn out to be lost when it is used: then ask for a `fresh` one.
        """
        while self._idle and not fresh:
            kept = self._idle.pop()
            if not kept.is_lost and time.monotonic() - kept.idle_since < IDLE_SECONDS:
                return kept
            kept.transport.abort()
        loop = asyncio.get_running_loop()
        if isinstance(self.address, UnixAddress):
            with socket_path(self.address.path) as name:
                return (await loop.create_unix_connection(BrokerConnection, name))[1]
        return (await loop.create_connection(BrokerConnection, self.address.host, self.address.port))[1]

    def keep(self, connection: BrokerConnection) -> None:
        """Its call is over, and it may serve another one."""
        connection.call = None
        connection.is_fresh = False
        connection.idle_since = time.monotonic()
        if connection.is_lost or len(self._idle) >= MOST_IDLE:
            connection.transport.abort()
        else:
            self._idle.append(connection)

    def close(self) -> None:
        """End what is idle."""
        while self._idle:
            self._idle.pop().transport.abort()

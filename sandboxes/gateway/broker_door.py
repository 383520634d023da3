"""Where the model broker is, and how the gateway speaks with it: one connection a call, signed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Final

from sandboxes.gateway.address import Address, UnixAddress, socket_path
from sandboxes.gateway.signing import signed_headers

_PIECE: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class BrokerDoor:
    """The way to the broker. It holds no key of a vendor."""

    address: Address
    node_key: bytes = field(repr=False)

    def signed(self, method: str, target: str, length: str) -> list[tuple[bytes, bytes]]:
        """The headers of a request that is sent now; its target names the sandbox that asks."""
        headers = signed_headers(node_key=self.node_key, method=method, target=target, length=length)
        return [(name.encode(), value.encode()) for name, value in headers]

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A fresh connection. Raises OSError."""
        if isinstance(self.address, UnixAddress):
            with socket_path(self.address.path) as name:
                return await asyncio.open_unix_connection(name, limit=_PIECE)
        return await asyncio.open_connection(self.address.host, self.address.port, limit=_PIECE)

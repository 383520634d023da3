"""The gateway process: it listens, looks after its connections, stops cleanly.

Inward it relays to guests, outward it is the sandboxes' proxy (`egress`), one listening socket each.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Collection
from pathlib import Path

from e2a.core.descriptors import descriptors_raise
from sandboxes.gateway.address import Address
from sandboxes.gateway.broker_door import BrokerDoor
from sandboxes.gateway.egress import EgressHost
from sandboxes.gateway.listening import BACKLOG, listening_socket
from sandboxes.gateway.relay import ClientSide, RelayContext
from sandboxes.gateway.signing import SignatureCheck

log = logging.getLogger(__name__)

LARGEST_CONNECTIONS = 4000
SWEEP_SECONDS = 1.0
STOP_SECONDS = 3.0
"""At SIGTERM, answers under way may end within this time. Streams are cut: their readers attach again."""

_DESCRIPTORS_BESIDES = 64


class Gateway:
    """A relay for the guests below `<data_dir>/sandboxes`."""

    def __init__(
        self,
        *,
        data_dir: Path,
        node_key: bytes,
        address: Address,
        allow_private: Collection[str] = (),
        broker: Address | None = None,
    ) -> None:
        self._address = address
        descriptors = descriptors_raise(2 * LARGEST_CONNECTIONS + _DESCRIPTORS_BESIDES)  # Two a connection.
        self._egress = EgressHost(
            data_dir / "sandboxes",
            allow_private=allow_private,
            broker=None if broker is None else BrokerDoor(broker, node_key),
        )
        self._context = RelayContext(
            sandboxes=data_dir / "sandboxes",
            signatures=SignatureCheck(node_key),
            egress=self._egress,
            largest_number=min(LARGEST_CONNECTIONS, (descriptors - _DESCRIPTORS_BESIDES) // 2),
        )

    async def serve(self, *, stop: asyncio.Event, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop` is set. Raises AddressTaken. `on_ready` is called once connections are taken."""
        loop = asyncio.get_running_loop()
        with listening_socket(self._address) as listener:
            server = await loop.create_server(
                lambda: ClientSide(self._context), sock=listener, backlog=BACKLOG
            )
            sweeping = loop.create_task(self._sweep())
            egress = loop.create_task(self._egress.run())
            egress.add_done_callback(_egress_ended)
            try:
                log.info("gateway serves %s for %s", self._address, self._context.sandboxes)
                on_ready()
                await stop.wait()
            finally:
                server.close()
                await self._drain()
                sweeping.cancel()
                egress.cancel()
                await asyncio.gather(sweeping, egress, return_exceptions=True)
        log.info("gateway stopped")

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            now = loop.time()
            for connection in list(self._context.connections):
                connection.cut_if_late(now)

    async def _drain(self) -> None:
        give_up_at = asyncio.get_running_loop().time() + STOP_SECONDS
        while self._context.connections and asyncio.get_running_loop().time() < give_up_at:
            await asyncio.sleep(0.02)
        for connection in list(self._context.connections):
            connection.abort()
        await asyncio.sleep(0)


def _egress_ended(task: asyncio.Task[None]) -> None:
    """Nothing gets out of any sandbox any more: better to be started anew."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("egress failed", exc_info=error)
        os.kill(os.getpid(), signal.SIGTERM)


async def run_until_signalled(gateway: Gateway, *, on_ready: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await gateway.serve(stop=stop, on_ready=on_ready)

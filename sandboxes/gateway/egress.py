"""The way out of every sandbox of this host: one listening socket each, an HTTP proxy that obeys its rules.

Who is speaking is known by the socket, which lies in a folder that only that sandbox sees. Without rules nothing gets
out. Rules come signed through the relay and are kept beside the sandbox, so a gateway that restarts goes on with them;
while it is down nothing gets out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from e2a.core.addresses import Resolver, system_resolver
from sandboxes.egress.rules import EgressRules
from sandboxes.gateway.address import socket_path
from sandboxes.gateway.broker_call import Program
from sandboxes.gateway.broker_door import BrokerDoor
from sandboxes.gateway.egress_proxy import Dial, ProxyConnection, dial_tcp
from sandboxes.gateway.egress_seen import Seen
from sandboxes.gateway.guest_socket import SANDBOX_ID, NoSuchSandbox

log = logging.getLogger(__name__)

SCAN_SECONDS: Final = 0.5
"""How soon a sandbox that nobody has spoken with can get out, and one that is gone is forgotten."""
SAVE_SECONDS: Final = 0.1
"""How often what was seen is written down at most: its node, which has no key to ask, reads it when it takes a sandbox
away. What comes after a pause is written at once."""
CONNECTIONS_A_SANDBOX: Final = 500
"""SECURITY 5.8. More are closed at once."""
RULES_FILE: Final = "egress.json"
HOST_FOLDER: Final = "host"
EGRESS_SOCKET: Final = "egress.sock"
_LOOKUP_THREADS: Final = 32


@dataclass(slots=True)
class SandboxEgress:
    """One sandbox's way out."""

    sandbox_id: str
    folder: Path
    rules: EgressRules
    seen: Seen
    server: asyncio.Server | None = None
    connections: set[ProxyConnection] = field(default_factory=set)
    saved_at: float = 0.0
    """Of the monotonic clock."""

    def save_if_due(self) -> None:
        """Write down what was seen, unless that was done a moment ago; then the next look does it."""
        if self.seen.is_dirty and time.monotonic() - self.saved_at >= SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write down what was seen."""
        self.saved_at = time.monotonic()
        with contextlib.suppress(OSError):  # It is being taken away.
            self.seen.save(self.folder)

    def rules_change(self, rules: EgressRules) -> None:
        """From now on; what is open and not allowed any more is cut."""
        self.rules = rules
        for connection in list(self.connections):
            connection.recheck()


class EgressHost:
    """All sandboxes below `sandboxes` (`<data>/sandboxes`).

    `allow_private` are hosts that the operator lets be reached although they are not public
    (`E2A_EGRESS_ALLOW_PRIVATE`); a rule must allow them besides. `broker` takes the sandboxes' model calls, which need
    no rule; without one there are none.
    """

    def __init__(
        self,
        sandboxes: Path,
        *,
        allow_private: Collection[str] = (),
        broker: BrokerDoor | None = None,
        resolver: Resolver = system_resolver,
        dial: Dial = dial_tcp,
    ) -> None:
        self._sandboxes = sandboxes
        self.broker = broker
        self.allow_private = allow_private
        self.resolver = resolver
        self.dial = dial
        self.lookups = ThreadPoolExecutor(_LOOKUP_THREADS, thread_name_prefix="egress lookup")
        self._found: dict[str, SandboxEgress] = {}
        self._beginning: set[str] = set()

    async def run(self) -> None:
        """Look after the sandboxes until cancelled."""
        try:
            while True:
                await self._scan()
                for _ in range(round(SCAN_SECONDS / SAVE_SECONDS)):
                    for egress in self._found.values():
                        egress.save_if_due()
                    await asyncio.sleep(SAVE_SECONDS)
        finally:
            for egress in list(self._found.values()):
                egress.save()
                self._forget(egress)
            if self.broker is not None:
                self.broker.close()
            self.lookups.shutdown(wait=False, cancel_futures=True)

    def rules_set(self, sandbox_id: str, document: object) -> dict[str, Any]:
        """Take a sandbox's rules (`EgressRules.as_json`), and keep them. Raises NoSuchSandbox, ValueError, OSError."""
        if not isinstance(document, Mapping):
            raise ValueError("rules are an object")
        rules = EgressRules.stored(document)
        folder = self._folder(sandbox_id)
        draft = folder / f".{RULES_FILE}.new"
        draft.write_text(json.dumps(rules.as_json()))
        os.replace(draft, folder / RULES_FILE)
        egress = self._found.get(sandbox_id)
        if egress is not None:
            egress.rules_change(rules)
        return {"rules": rules.as_json()}

    def shown(self, sandbox_id: str) -> dict[str, Any]:
        """Rules, and what became of connections, newest first. Raises NoSuchSandbox."""
        folder = self._folder(sandbox_id)
        egress = self._found.get(sandbox_id)
        if egress is None:
            return {"rules": rules_read(folder).as_json(), "seen": Seen.load(folder).as_json(), "open": 0}
        return {
            "rules": egress.rules.as_json(),
            "seen": egress.seen.as_json(),
            "open": len(egress.connections),
        }

    def _folder(self, sandbox_id: str) -> Path:
        folder = self._sandboxes / sandbox_id
        if not SANDBOX_ID.fullmatch(sandbox_id) or not folder.is_dir():
            raise NoSuchSandbox
        return folder

    async def _scan(self) -> None:
        try:
            there = {entry.name for entry in os.scandir(self._sandboxes) if SANDBOX_ID.fullmatch(entry.name)}
        except FileNotFoundError:
            there = set()  # No sandbox was ever made here.
        for name in self._found.keys() - there:
            self._forget(self._found.pop(name))
        for name in there - self._found.keys():
            await self.ensure(name)

    async def ensure(self, sandbox_id: str) -> None:
        """Its way out is there from now on. Whoever first speaks with a new sandbox asks for it,
        before it runs a command."""
        if sandbox_id in self._found or sandbox_id in self._beginning or not SANDBOX_ID.fullmatch(sandbox_id):
            return
        if not (self._sandboxes / sandbox_id / HOST_FOLDER).is_dir():
            return
        self._beginning.add(sandbox_id)
        try:
            with contextlib.suppress(OSError):  # It is being taken away; or the next scan says it again.
                await self._serve(sandbox_id)
        finally:
            self._beginning.discard(sandbox_id)

    async def _serve(self, sandbox_id: str) -> None:
        folder = self._sandboxes / sandbox_id
        egress = SandboxEgress(sandbox_id, folder, rules_read(folder), Seen.load(folder))
        listener = egress_listener(folder / HOST_FOLDER / EGRESS_SOCKET)

        async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert isinstance(reader, Program)
            if len(egress.connections) >= CONNECTIONS_A_SANDBOX:
                writer.transport.abort()
                return
            connection = ProxyConnection(self, egress, reader, writer)
            egress.connections.add(connection)
            try:
                await connection.serve()
            finally:
                egress.connections.discard(connection)

        egress.server = await asyncio.get_running_loop().create_unix_server(
            lambda: asyncio.StreamReaderProtocol(Program(), take), sock=listener
        )
        self._found[sandbox_id] = egress

    def _forget(self, egress: SandboxEgress) -> None:
        if egress.server is not None:
            egress.server.close()
        for connection in list(egress.connections):
            connection.cut()


def rules_read(folder: Path) -> EgressRules:
    """The rules that were kept for a sandbox; none, so nothing gets out, when there are none to be read."""
    try:
        kept = json.loads((folder / RULES_FILE).read_text())
        if isinstance(kept, Mapping):
            return EgressRules.stored(kept)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.error("sandbox %s: its egress rules cannot be read, so it has none: %s", folder.name, error)
    return EgressRules()


def egress_listener(path: Path) -> socket.socket:
    """A listening socket in a sandbox's read-only folder, in place of what an earlier gateway left.

    Everybody inside may connect: it is the same way out as the guest's proxy address, and as bounded.
    """
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with socket_path(draft) as name:
            listener.bind(name)
        draft.chmod(0o666)
        listener.listen(128)
        listener.setblocking(False)
        draft.rename(path)
    except BaseException:
        listener.close()
        raise
    return listener

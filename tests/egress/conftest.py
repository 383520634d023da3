"""An egress host over a folder with two sandboxes, whose public names lead to servers of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvloop

from e2a.core.addresses import IPAddress
from sandboxes.gateway.address import socket_path
from sandboxes.gateway.egress import EgressHost, SandboxEgress

ONE, TWO = "sbx_" + "a2" * 13, "sbx_" + "b3" * 13
PUBLIC = "93.184.215.14"


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that gateway and broker run on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
def _empty_redis() -> None:
    """No test here speaks with Redis."""


@dataclass
class World:
    """Names and their addresses, and where a dial to any of them really leads."""

    names: dict[str, list[str]] = field(default_factory=dict)
    ports: dict[int, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    dialled: list[tuple[str, int]] = field(default_factory=list)

    def resolve(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        if host not in self.names:
            raise OSError("no such name")
        return self.names[host]

    async def dial(self, address: IPAddress, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        self.dialled.append((str(address), port))
        if port not in self.ports:
            raise ConnectionRefusedError
        return await asyncio.open_connection("127.0.0.1", self.ports[port])


@dataclass
class Running:
    host: EgressHost
    folder: Path

    def socket(self, sandbox: str = ONE) -> Path:
        return self.folder / sandbox / "host" / "egress.sock"

    def allow(self, *rules: str, deny: tuple[str, ...] = (), sandbox: str = ONE) -> None:
        self.host.rules_set(sandbox, {"allow": list(rules), "deny": list(deny)})

    def seen(self, sandbox: str = ONE) -> list[tuple[str, int, bool, str, int]]:
        """(host, port, is_allowed, reason, count), newest first."""
        return [
            (one["host"], one["port"], one["is_allowed"], one["reason"], one["count"])
            for one in self.host.shown(sandbox)["seen"]
        ]

    def state(self, sandbox: str = ONE) -> SandboxEgress:
        return self.host._found[sandbox]


async def until(condition: Callable[[], Any], what: str, seconds: float = 15.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)  # Between two looks; the wait itself has a limit.


@pytest.fixture
def world() -> World:
    return World()


Start = Callable[..., Awaitable[Running]]


@pytest.fixture
async def start(tmp_path: Path, world: World) -> AsyncIterator[Start]:
    """Start a host over the folder; the one before is ended, as when a gateway is restarted."""
    folder = tmp_path / "sandboxes"
    for sandbox in (ONE, TWO):
        (folder / sandbox / "host").mkdir(parents=True)
    running: list[asyncio.Task[None]] = []

    async def end() -> None:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        running.clear()

    async def begin(**more: Any) -> Running:
        await end()
        host = EgressHost(folder, resolver=world.resolve, dial=world.dial, **more)
        running.append(asyncio.create_task(host.run()))
        await until(lambda: len(host._found) == 2, "both sandboxes are served")
        return Running(host, folder)

    yield begin
    await end()


@pytest.fixture
async def egress(start: Start) -> Running:
    return await start()


@dataclass
class Heard:
    """What a server was sent."""

    port: int
    requests: list[bytes] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    raw: bytes = b""
    connections: int = 0


Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter, Heard], Awaitable[None]]


@contextlib.asynccontextmanager
async def serving(answer: Answer, *, tls: Any = None) -> AsyncIterator[Heard]:
    """A server of this machine."""
    heard = Heard(0)

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.connections += 1
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await answer(reader, writer, heard)
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0, ssl=tls)
    heard.port = server.sockets[0].getsockname()[1]
    try:
        yield heard
    finally:
        server.close()


async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: Heard) -> None:
    """A web server: one request, one answer with its length."""
    head = await reader.readuntil(b"\r\n\r\n")
    heard.requests.append(head)
    body = json.dumps({"at": head.split()[1].decode()}).encode()
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nX-Theirs: 1\r\n\r\n" % len(body) + body)
    await writer.drain()


@dataclass
class Client:
    """A connection of the sandbox to its proxy."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers of an answer."""
        async with asyncio.timeout(15):
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:-2])}
        return int(lines[0].split()[1]), headers

    async def answer(self) -> tuple[int, bytes]:
        """Status and body of an answer that says its length."""
        status, headers = await self.head()
        async with asyncio.timeout(15):
            return status, await self.reader.readexactly(int(headers["content-length"]))

    async def rest(self) -> bytes:
        """Everything until the other side closes."""
        async with asyncio.timeout(15):
            try:
                return await self.reader.read()
            except ConnectionResetError:
                return b""

    async def connect(self, target: str) -> tuple[int, bytes]:
        """CONNECT; the answer's status, and its body when it is a refusal."""
        await self.send(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        status, headers = await self.head()
        return status, await self.reader.readexactly(int(headers.get("content-length", 0)))

    async def get(self, url: str, *, host: str | None = None, more: str = "") -> tuple[int, bytes]:
        shown = host or url.split("/")[2]
        await self.send(f"GET {url} HTTP/1.1\r\nHost: {shown}\r\n{more}\r\n".encode())
        return await self.answer()


@contextlib.asynccontextmanager
async def client(path: Path) -> AsyncIterator[Client]:
    one = await opened(path)
    try:
        yield one
    finally:
        one.writer.close()


async def opened(path: Path) -> Client:
    """A connection that the caller closes."""
    with socket_path(path) as name:
        return Client(*await asyncio.open_unix_connection(name))


def refusing_early(refused: asyncio.Event) -> Answer:
    """Answers 413 after the head, and closes over what is still coming, which resets the connection."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: Heard) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Large\r\ncontent-length: 2\r\nconnection: close\r\n\r\nno")
        await writer.drain()
        refused.set()
        writer.close()

    return refuse

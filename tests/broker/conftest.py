"""A gateway and a broker in one loop, a sandbox that is a row and a folder, and a scripted vendor behind them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11
import pytest
import uvloop
from django.conf import settings
from django.db import connections

from e2a.core.outbound_transport import Timeouts
from sandboxes.gateway.address import UnixAddress
from sandboxes.gateway.broker_door import BrokerDoor
from sandboxes.gateway.egress import EgressHost
from sandboxes.gateway.listening import listening_socket
from sandboxes.models import Sandbox, SandboxState, Template
from secrets_vault.services import bundle_create, bundles_attach
from sessions_app.broker.server import Broker
from sessions_app.models import Session, SessionStatus
from tests.egress.conftest import opened, until
from tests.model_server import ModelServer, say

SANDBOX = "sbx_" + "c4" * 13
KEY = "sk-ant-the-true-key-of-alice"
NODE_KEY = b"n" * 32

# Threads share the database here, so it is a file: SQLite's shared memory knows no waiting.
if connections["default"].vendor == "sqlite":
    connections["default"].settings_dict["TEST"]["NAME"] = str(settings.E2A.data_dir / "test.sqlite3")


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that gateway and broker run on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
def vendor(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelServer]:
    """Both vendors' own end point is a scripted server."""
    with ModelServer(lambda body, headers: say("Hello from the model.")) as server:
        urls = settings.E2A.vendor_urls | {"anthropic": server.url, "openai": server.url}
        monkeypatch.setattr(settings, "E2A", dataclasses.replace(settings.E2A, vendor_urls=urls))
        yield server


@pytest.fixture
def sandbox(transactional_db: None, alice: Any) -> Sandbox:
    """A running sandbox of alice's, with her key."""
    from e2a.core.clock import now, seconds

    moment = now()
    row = Sandbox.objects.create(
        public_id=SANDBOX, tenant=alice.tenant, template=Template.objects.get(name="standard"),
        state=SandboxState.RUNNING, created_at=moment, last_active_at=moment,
        expires_at=moment + seconds(3600),
    )  # fmt: skip
    bundle_create(tenant=alice.tenant, name="main", values={"LLM_API_KEY": KEY})
    bundles_attach(tenant=alice.tenant, names=["main"], holder=SANDBOX)
    return row


@pytest.fixture
def session(sandbox: Sandbox, alice: Any) -> Session:
    """A `claude-code` session of alice's in that sandbox, with the same key."""
    from e2a.core.clock import now, seconds

    moment = now()
    row = Session.objects.create(
        tenant=alice.tenant, user_id="u1", agent_kind="claude-code", template_name="standard", sandbox=sandbox,
        llm_vendor="anthropic", status=SessionStatus.IDLE, created_at=moment, last_active_at=moment,
        expires_at=moment + seconds(3600),
    )  # fmt: skip
    Sandbox.objects.filter(pk=sandbox.pk).update(owner=row.public_id)
    bundles_attach(tenant=alice.tenant, names=["main"], holder=row.public_id)
    return row


@dataclass
class Answer:
    """What a program was answered. `pieces` as they came; `is_whole`: the end was said, not cut."""

    status: int
    headers: dict[str, str]
    pieces: list[bytes] = field(default_factory=list)
    is_whole: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    def json(self) -> Any:
        return json.loads(self.body)


class Program:
    """A program in the sandbox: one connection to its proxy."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._http = h11.Connection(h11.CLIENT)

    async def begin(
        self, target: str, body: bytes, headers: dict[str, str] | None = None, *, method: str = "POST"
    ) -> Answer:
        """Send a request; the answer's head."""
        self._one = await opened(self._path)
        given = {"host": "127.0.0.1:3128", "content-type": "application/json", **(headers or {})}
        if method == "POST" and "transfer-encoding" not in given:
            given.setdefault("content-length", str(len(body)))
        request = h11.Request(method=method, target=target, headers=list(given.items()))
        data = self._http.send(request) or b""
        for event in (h11.Data(data=body), h11.EndOfMessage()) if body else (h11.EndOfMessage(),):
            data += self._http.send(event) or b""
        await self._one.send(data)
        event = await self.next()
        assert isinstance(event, h11.Response)
        return Answer(event.status_code, {k.decode(): v.decode() for k, v in event.headers})

    async def next(self) -> Any:
        async with asyncio.timeout(15):
            while (event := self._http.next_event()) is h11.NEED_DATA:
                self._http.receive_data(await self._one.reader.read(65536))
        return event

    async def rest(self, answer: Answer) -> Answer:
        """The body to its end, or to where it was cut."""
        with contextlib.suppress(h11.RemoteProtocolError, OSError):
            while not isinstance(event := await self.next(), h11.EndOfMessage):
                answer.pieces.append(bytes(event.data))
            answer.is_whole = True
        return answer

    def leave(self) -> None:
        self._one.writer.transport.abort()


@dataclass
class Stack:
    """What is running."""

    folder: Path
    host: EgressHost
    broker: Broker
    stop: asyncio.Event
    task: asyncio.Task[None]

    @property
    def socket(self) -> Path:
        return self.folder / "sandboxes" / SANDBOX / "host" / "egress.sock"

    def program(self) -> Program:
        return Program(self.socket)

    async def call(
        self,
        body: Any,
        *,
        target: str = "/llm/anthropic/v1/messages",
        headers: dict[str, str] | None = None,
        method: str = "POST",
    ) -> Answer:
        """One call of a program, to its end."""
        program = self.program()
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"x-api-key": "e2a-sandbox", "anthropic-version": "2023-06-01", **(headers or {})}
        try:
            return await program.rest(await program.begin(target, data, given, method=method))
        finally:
            program.leave()

    async def end(self) -> None:
        """As SIGTERM does."""
        self.stop.set()
        async with asyncio.timeout(20):
            await self.task


@pytest.fixture
async def start(tmp_path: Path, sandbox: Sandbox) -> AsyncIterator[Callable[..., Any]]:
    """Start gateway and broker; a second start is a second broker at the same address, once the first has ended."""
    folder = tmp_path
    (folder / "sandboxes" / SANDBOX / "host").mkdir(parents=True)
    address = UnixAddress(folder / "run" / "broker.sock")
    host = EgressHost(folder / "sandboxes", broker=BrokerDoor(address, NODE_KEY))
    gateway = asyncio.create_task(host.run())
    stacks: list[Stack] = []

    async def begin(**more: Any) -> Stack:
        broker = Broker(node_key=NODE_KEY, timeouts=Timeouts(connect=2.0), **more)
        stop, ready = asyncio.Event(), asyncio.Event()

        async def serve() -> None:
            with listening_socket(address) as listener:
                await broker.run(listener, on_ready=ready.set, stop=stop)

        stacks.append(Stack(folder, host, broker, stop, asyncio.create_task(serve())))
        await asyncio.wait_for(ready.wait(), 10)
        await until(lambda: bool(host._found), "the sandbox has a way out")
        return stacks[-1]

    yield begin
    for stack in stacks:
        await stack.end()
    gateway.cancel()
    await asyncio.gather(gateway, return_exceptions=True)


@pytest.fixture
async def stack(start: Callable[..., Any], vendor: ModelServer) -> Stack:
    found: Stack = await start()
    return found


def asks(
    text: str = "hello", *, stream: bool = False, model: str = "claude-opus-5-5", **more: Any
) -> dict[str, Any]:
    """A request of Anthropic's Messages."""
    return {
        "model": model, "max_tokens": 100, "stream": stream, "messages": [{"role": "user", "content": text}], **more,
    }  # fmt: skip

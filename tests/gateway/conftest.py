from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop

from sandboxes.gateway.address import TcpAddress, UnixAddress
from tests.gateway.doubles import SANDBOX, FakeGuest, GatewayProcess, Script, gateway_in_thread


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that gateway and broker run on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
def _empty_redis() -> None:
    """No test here speaks with Redis."""


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "var"
    (folder / "sandboxes" / SANDBOX / "guest").mkdir(parents=True)
    return folder


@pytest.fixture
def guest_folder(data_dir: Path) -> Path:
    return data_dir / "sandboxes" / SANDBOX / "guest"


@pytest.fixture
def guest(guest_folder: Path) -> Iterator[Callable[[Script], FakeGuest]]:
    made: list[FakeGuest] = []

    def make(script: Script) -> FakeGuest:
        made.append(FakeGuest(guest_folder / "guest.sock", script))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def gateway(data_dir: Path) -> Iterator[str]:
    with gateway_in_thread(data_dir, UnixAddress(data_dir / "run" / "gateway.sock")) as address:
        yield address


@pytest.fixture
def tcp_gateway(data_dir: Path) -> Iterator[str]:
    with gateway_in_thread(data_dir, TcpAddress("127.0.0.1", free_port())) as address:
        yield address


@pytest.fixture
def gateway_process(data_dir: Path) -> Iterator[Callable[[], GatewayProcess]]:
    made: list[GatewayProcess] = []

    def make() -> GatewayProcess:
        made.append(GatewayProcess(data_dir, f"unix:{data_dir / 'run' / 'gateway.sock'}"))
        return made[-1]

    yield make
    for one in made:
        one.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

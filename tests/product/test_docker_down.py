"""With Docker down the API says so and recovers by itself (ARCHITECTURE 9.10)."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live import LiveStack, wait_for
from tests.sessions import sockets

pytestmark = [pytest.mark.docker, pytest.mark.timeout(400)]


class DockerRelay:
    """A socket that leads to the real daemon, and can go away with every connection that it carries."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pairs: list[socket.socket] = []
        self._listener: socket.socket | None = None

    def up(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(64)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def down(self) -> None:
        assert self._listener is not None
        self.path.unlink()
        self._listener.close()
        for one in self._pairs:
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # It had ended already.
        self._pairs.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                inner, _ = listener.accept()
            except OSError:
                return
            outer = socket.socket(socket.AF_UNIX)
            outer.connect("/var/run/docker.sock")
            self._pairs += [inner, outer]
            for source, target in ((inner, outer), (outer, inner)):
                threading.Thread(target=self._copy, args=(source, target), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return


@pytest.fixture
def relayed(tmp_path: Path) -> Iterator[tuple[LiveStack, DockerRelay]]:
    relay = DockerRelay(Path("/tmp") / f"e2a-docker-{os.getpid()}.sock")
    relay.up()
    try:
        with LiveStack(tmp_path, environment={"DOCKER_HOST": f"unix://{relay.path}"}) as stack:
            yield stack, relay
    finally:
        relay.path.unlink(missing_ok=True)


def test_docker_down_is_a_clear_503_without_a_hang_and_heals_by_itself(
    relayed: tuple[LiveStack, DockerRelay],
) -> None:
    stack, relay = relayed
    key = stack.api_key()
    session = sockets.shell_session(stack, key)
    where = f"/v1/sessions/{session['chat_session_id']}"
    wait_for(
        lambda: stack.request("GET", where, token=key).json()["status"] == "idle", what="the session is ready"
    )
    body = {"agent": {"kind": "shell"}, "user_id": "u1"}
    relay.down()

    def refused() -> Any:
        started = time.monotonic()
        answer = stack.request("POST", "/v1/sessions", body, token=key)
        assert time.monotonic() - started < 5
        return answer if answer.status == 503 else None

    answer = wait_for(refused, what="a 503", seconds=40, every=0.5)
    assert answer.json()["code"] == "no_node"
    assert "engine" in answer.json()["detail"]
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert int(answer.headers["Retry-After"]) >= 1
    assert stack.request("GET", "/readyz").status == 503
    assert stack.request("GET", "/healthz").status == 200
    frames = asyncio.run(sockets.run_task(session, "echo still here"))
    assert sockets.output_of(frames) == "still here\n", "a sandbox that runs needs no daemon"
    relay.up()
    wait_for(lambda: stack.request("GET", "/readyz").status == 200, what="ready again", seconds=60, every=0.5)
    again = stack.request("POST", "/v1/sessions", body, token=key)
    assert again.status == 201
    assert sockets.output_of(asyncio.run(sockets.run_task(again.json(), "echo healed"))) == "healed\n"

"""Where no Docker engine can be had: the `process` engine, which isolates nothing and says so."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.live import LiveStack, wait_for
from tests.sessions import sockets

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStack]:
    with LiveStack(tmp_path_factory.mktemp("noengine"), engine="process") as running:
        yield running


def test_the_journey_works_on_the_process_engine(stack: LiveStack) -> None:
    key = stack.api_key()
    session = sockets.shell_session(stack, key)
    frames = asyncio.run(sockets.run_task(session, "echo hello > note; cat note; exit 5"))
    assert sockets.output_of(frames) == "hello\n"
    assert frames[-1]["exit_code"] == 5
    below = sockets.shell_session(stack, key, agent={"kind": "shell", "cwd": "a/b"})
    assert sockets.output_of(asyncio.run(sockets.run_task(below, "pwd"))).endswith("/workspace/a/b\n")
    made = stack.request("POST", "/v1/sandboxes", {}, token=key)
    assert made.status == 201
    path = f"/v1/sandboxes/{made.json()['sandbox_id']}"
    run = stack.request("POST", f"{path}/exec", {"argv": ["/bin/echo", "a b"]}, token=key)
    assert run.json()["stdout"] == "a b\n"
    assert stack.request("DELETE", path, token=key).json()["status"] == "destroyed"


def test_it_says_loudly_that_nothing_is_isolated(stack: LiveStack) -> None:
    wait_for(lambda: "isolates NOTHING" in stack.log, what="the warning")
    assert stack.request("GET", "/v1/templates", token=stack.api_key("bob@example.com")).status == 200

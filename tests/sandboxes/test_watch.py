"""Watching a folder over the API: what changes comes as events, and the stream always says why it ends."""

from __future__ import annotations

import asyncio
import base64
import json
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import connections

from tests.fixtures import Api
from tests.sandboxes.running import RunningNode, wait_until
from tests.sandboxes.test_warm_and_cold import exec_in, made

pytestmark = pytest.mark.one_database

SECONDS = 60


@pytest.fixture
def sandbox(make_node: Callable[..., RunningNode], as_alice: Api) -> str:
    make_node(pool=1).wait_parked(1)
    return str(made(as_alice)["vm_id"])


class Watch:
    """A client that reads a watch in a thread of its own, until it ends or is left."""

    def __init__(self, answer: Any) -> None:
        assert answer.status_code == 200, answer.content
        assert answer["Content-Type"].startswith("text/event-stream")
        self._answer = answer
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._leave: Callable[[], object] = lambda: None
        self._is_reading = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        # Before that there is nothing to cancel, and `close` would wait for a stream that does not end.
        assert self._is_reading.wait(SECONDS)

    def _read(self) -> None:
        async def read() -> None:
            loop, task = asyncio.get_running_loop(), asyncio.current_task()
            assert task is not None
            self._leave = lambda: loop.call_soon_threadsafe(task.cancel)
            self._is_reading.set()
            text = b""
            try:
                async for piece in self._answer.streaming_content:
                    text += piece
                    *blocks, text = text.split(b"\n\n")
                    for block in blocks:
                        if not block.startswith(b":"):
                            self._take(block.decode())
            except asyncio.CancelledError:
                return
            finally:
                await self._answer.streaming_content.aclose()

        try:
            async_to_sync(read)()
        finally:
            connections.close_all()
            self._events.put(None)

    def _take(self, block: str) -> None:
        name, data = block.split("\n", 1)
        document = json.loads(data.removeprefix("data: "))
        assert name == f"event: {document['type']}"
        self._events.put(document)

    def next(self) -> dict[str, Any] | None:
        """None at the end of the stream."""
        return self._events.get(timeout=SECONDS)

    def until(self, kind: str) -> dict[str, Any]:
        while (event := self.next()) is not None:
            if event["type"] == kind:
                return event
        raise AssertionError(f"the stream ended without {kind}")

    def close(self) -> None:
        with suppress(RuntimeError):  # It has ended by itself.
            self._leave()
        self._thread.join(SECONDS)
        self._answer.close()


@contextmanager
def watching(api: Api, sandbox: str, path: str = ".", recursive: str = "true") -> Iterator[Watch]:
    watch = Watch(api.get(f"/v1/sandboxes/{sandbox}/files/watch?path={path}&recursive={recursive}"))
    try:
        assert watch.until("ready")["type"] == "ready"
        yield watch
    finally:
        watch.close()


def test_changes_come_as_events(as_alice: Api, sandbox: str) -> None:
    with watching(as_alice, sandbox) as watch:
        exec_in(as_alice, sandbox, "mkdir d; echo 1 > d/a; mv d/a d/b; rm d/b")
        assert watch.until("created")["path"].endswith("/d")
        moved = watch.until("moved")
        assert (moved["path"][-4:], moved["from"][-4:], moved["is_directory"]) == ("/d/b", "/d/a", False)
        assert watch.until("deleted")["path"].endswith("/d/b")


def test_a_name_that_is_no_text_is_shown_and_its_bytes_are_told(as_alice: Api, sandbox: str) -> None:
    with watching(as_alice, sandbox) as watch:
        exec_in(as_alice, sandbox, "touch $'caf\\xe9'")
        created = watch.until("created")
    assert created["path"].endswith("/caf\ufffd")
    assert base64.b64decode(created["path_base64"]).endswith(b"/caf\xe9")


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("", 400, "bad_path"),
        ("?path=missing", 404, "not_found"),
        ("?path=file", 400, "not_a_directory"),
        ("?path=.&recursive=perhaps", 400, "invalid"),
    ],
)
def test_what_cannot_be_watched_is_refused(
    as_alice: Api, sandbox: str, query: str, status: int, code: str
) -> None:
    as_alice.put(f"/v1/sandboxes/{sandbox}/files?path=file", b"x")
    answer = as_alice.get(f"/v1/sandboxes/{sandbox}/files/watch{query}")
    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_a_stranger_cannot_watch(as_mallory: Api, sandbox: str) -> None:
    assert as_mallory.get(f"/v1/sandboxes/{sandbox}/files/watch?path=.").status_code == 404


def test_watches_are_bounded_and_one_that_is_left_makes_room(as_alice: Api, sandbox: str) -> None:
    url = f"/v1/sandboxes/{sandbox}/files/watch?path=."
    watches = [Watch(as_alice.get(url)) for _ in range(8)]
    try:
        refused = as_alice.get(url)
        assert (refused.status_code, refused.json()["code"]) == (409, "too_many_watches")
    finally:
        for watch in watches:
            watch.close()

    def again() -> bool:
        answer = as_alice.get(url)
        if answer.status_code == 200:
            Watch(answer).close()
        return bool(answer.status_code == 200)

    wait_until(again, what="room for a watch")


def test_the_end_of_the_sandbox_ends_the_watch_with_its_cause(
    as_alice: Api, sandbox: str, worker: Any
) -> None:
    with watching(as_alice, sandbox) as watch:
        assert as_alice.delete(f"/v1/sandboxes/{sandbox}").status_code == 200
        assert watch.until("end") == {"type": "end", "reason": "user"}
        assert watch.next() is None


def test_a_pause_ends_the_watch_and_says_so(as_alice: Api, sandbox: str, worker: Any) -> None:
    with watching(as_alice, sandbox) as watch:
        assert as_alice.post(f"/v1/sandboxes/{sandbox}/pause", {}).status_code == 200
        assert watch.until("end") == {"type": "end", "reason": "paused"}
        assert watch.next() is None


@pytest.mark.docker
def test_a_watch_in_a_container(make_node: Callable[..., RunningNode], as_alice: Api) -> None:
    make_node(pool=1, engine="docker").wait_parked(1)
    sandbox = made(as_alice)["vm_id"]
    with watching(as_alice, sandbox, "/workspace") as watch:
        exec_in(as_alice, sandbox, "mkdir -p a/b; echo 1 > a/b/c; ln -s /etc a/l")
        wanted = {"/workspace/a", "/workspace/a/b", "/workspace/a/b/c", "/workspace/a/l"}
        paths: set[str] = set()
        while not wanted <= paths:
            event = watch.next()
            assert event is not None
            paths.add(event.get("path", ""))
        assert not any(path.startswith("/workspace/a/l/") for path in paths)
    refused = as_alice.get(f"/v1/sandboxes/{sandbox}/files/watch?path=/root")
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")

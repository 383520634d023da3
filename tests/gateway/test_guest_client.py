"""Both clients through a real gateway to a scripted guest: answers, refusals, streams, ends, deadlines."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from e2a.core.errors import DeadlineExceeded, GuestError, GuestUnreachable
from sandboxes.guest_client import (
    AsyncGuestClient,
    Completed,
    Exit,
    FileInfo,
    FolderListing,
    GuestClient,
    GuestHealth,
    Output,
    ProcessSpec,
    PtySize,
    RedactedValue,
    aio,
    sync,
)
from tests.gateway.doubles import (
    LIMIT_SECONDS,
    NODE_KEY,
    SANDBOX,
    FakeGuest,
    GuestSocket,
    Script,
    answered,
    description,
    exit_frame,
    frame,
    gateway_in_thread,
    until,
    until_still,
)

MakeGuest = Callable[[Script], FakeGuest]
SPEC = ProcessSpec(id="p1", command="true")


def _run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, LIMIT_SECONDS))


class Both:
    """The calls of both clients in one shape, so that a sentence holds for both."""

    def __init__(self, kind: str, address: str, key: bytes = NODE_KEY, **options: Any) -> None:
        self.kind = kind
        self.threads = GuestClient(SANDBOX, address, key, **options)
        self.loop = AsyncGuestClient(SANDBOX, address, key, **options)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.kind == "sync":
                return getattr(self.threads, name)(*args, **kwargs)
            return _run(getattr(self.loop, name)(*args, **kwargs))

        return call

    def collect(self, name: str, *args: Any, **kwargs: Any) -> list[Any]:
        """All that a stream gives."""
        if self.kind == "sync":
            return list(getattr(self.threads, name)(*args, **kwargs))

        async def gather() -> list[Any]:
            return [one async for one in await getattr(self.loop, name)(*args, **kwargs)]

        found = _run(gather())
        assert isinstance(found, list)
        return found

    def read_file(self, path: str) -> tuple[int | None, int | None, bytes]:
        """Size and mode as they are told, and the content."""
        if self.kind == "sync":
            with self.threads.file_read(path) as stream:
                return stream.size, stream.mode, b"".join(stream)

        async def read() -> tuple[int | None, int | None, bytes]:
            async with await self.loop.file_read(path) as stream:
                return stream.size, stream.mode, b"".join([piece async for piece in stream])

        size, mode, content = _run(read())
        return size, mode, content


@pytest.fixture(params=["sync", "async"])
def client(request: pytest.FixtureRequest, gateway: str) -> Both:
    return Both(request.param, gateway)


# -- asking


def test_health_is_typed(client: Both, guest: MakeGuest) -> None:
    guest(answered(200, {"guest": "1", "configured": False, "uptime_ms": 12, "processes": 0}))
    assert client.health() == GuestHealth("1", False, 12, 0)


def test_each_call_asks_what_the_protocol_says(client: Both, guest: MakeGuest) -> None:
    heard: list[tuple[str, Any]] = []

    def script(one: GuestSocket) -> None:
        line = one.read_head().split(b" HTTP/1.1")[0].decode()
        body = one.read_body()
        heard.append((line, json.loads(body) if one.header("content-type") == "application/json" else body))
        one.answer(200, {**description(), "processes": [], "entries": []})

    guest(script)
    client.configure(env={"A": "b"}, redact=[RedactedValue("KEY", "secret-value")], deadline_seconds=9.5)
    client.process_start(
        ProcessSpec(
            id="p1",
            argv=("a", "b c"),
            cwd="/x",
            env={"E": "é"},
            stdin=b"\xff",
            keep_stdin_open=True,
            timeout_seconds=1.5,
            pty=PtySize(80, 24),
            on_full="block",
            log_bytes=4096,
            kill_on_disconnect=True,
        )
    )
    client.process_get("p1")
    client.process_list()
    client.process_stdin("p1", b"\0in", close=True)
    client.process_signal("p1", "TERM")
    client.process_resize("p1", cols=100, rows=30)
    client.process_forget("p1")
    client.file_list("/a b&c=d/ü")
    client.file_delete("x\udcff")
    client.file_delete("d", recursive=True)
    client.file_move("a", "b")
    client.file_mkdir("d")
    assert heard == [
        (
            "PUT /configure",
            {
                "env": {"A": "b"},
                "redact": [{"name": "KEY", "value": "secret-value"}],
                "deadline_seconds": 9.5,
            },
        ),
        (
            "POST /processes",
            {
                "id": "p1",
                "argv": ["a", "b c"],
                "cwd": "/x",
                "env": {"E": "é"},
                "stdin": base64.b64encode(b"\xff").decode(),
                "keep_stdin_open": True,
                "timeout_seconds": 1.5,
                "pty": {"cols": 80, "rows": 24},
                "on_full": "block",
                "log_bytes": 4096,
                "kill_on_disconnect": True,
            },
        ),
        ("GET /processes/p1", b""),
        ("GET /processes", b""),
        ("POST /processes/p1/stdin?close=1", b"\0in"),
        ("POST /processes/p1/signal", {"signal": "TERM"}),
        ("POST /processes/p1/resize", {"cols": 100, "rows": 30}),
        ("DELETE /processes/p1", b""),
        ("GET /files/list?path=/a%20b%26c%3Dd/%C3%BC", b""),
        ("DELETE /files?path=x%FF", b""),
        ("DELETE /files?path=d&recursive=1", b""),
        ("POST /files/move", {"from": "a", "to": "b"}),
        ("POST /files/mkdir", {"path": "d"}),
    ]


def test_a_refusal_has_the_guest_s_code(client: Both, guest: MakeGuest) -> None:
    guest(answered(404, {"code": "not_found", "detail": "no process p9"}))
    with pytest.raises(GuestError, match="no process p9") as refused:
        client.process_get("p9")
    assert (refused.value.code, refused.value.guest_status) == ("not_found", 404)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nnot json",
        b"HTTP/1.1 200 OK\r\n\r\n" + b'{"a":' * 100_000,
        b"HTTP/1.1 200 OK\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"a" * 20_000 + b"\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
    ],
)
def test_nonsense_is_a_guest_error(answer: bytes, client: Both, guest: MakeGuest) -> None:
    def script(one: GuestSocket) -> None:
        one.read_head()
        one.send(answer)

    guest(script)
    with pytest.raises(GuestError) as refused:
        client.health()
    assert refused.value.code == "bad_answer"


def test_an_answer_without_end_is_not_kept(
    client: Both, guest: MakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandboxes.guest_client.exchange.LARGEST_JSON_BYTES", 100_000)

    def script(one: GuestSocket) -> None:
        one.read_head()
        one.answer_stream()
        while True:
            one.send(b" " * 65536)

    guest(script)
    with pytest.raises(GuestError, match="longer than 100000 bytes"):
        client.health()


# -- who does not answer


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("address", ["unix:{}/gateway.sock", "unix:{}/gateway.sock/x", "tcp:127.0.0.1:1"])
def test_a_gateway_that_is_down_is_named_at_once(kind: str, address: str, tmp_path: Path) -> None:
    (tmp_path / "gateway.sock").touch()
    client = Both(kind, address.format(tmp_path))
    began_at = time.monotonic()
    with pytest.raises(GuestUnreachable) as unreachable:
        client.health()
    assert time.monotonic() - began_at < 1
    assert unreachable.value.code == "gateway_unreachable"
    assert f"sandbox {SANDBOX}: gateway " in unreachable.value.detail
    assert unreachable.value.detail.endswith("; awaited its health")


def test_a_sandbox_that_is_not_here_is_named(client: Both) -> None:
    client.threads.sandbox_id = client.loop.sandbox_id = "sbx_" + "b" * 26
    with pytest.raises(GuestUnreachable, match="awaited its counters") as unreachable:
        client.stats()
    assert unreachable.value.code == "no_such_sandbox"


def test_a_guest_that_is_not_here_is_named(client: Both) -> None:
    with pytest.raises(GuestUnreachable, match=SANDBOX) as unreachable:
        client.run(SPEC)
    assert unreachable.value.code == "guest_unreachable"


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_wrong_key_is_told_so(kind: str, gateway: str) -> None:
    with pytest.raises(GuestUnreachable, match="not signed with this node's key") as unreachable:
        Both(kind, gateway, b"j" * 32).health()
    assert unreachable.value.code == "unauthenticated"


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_guest_that_does_not_answer_in_time_is_told_so(kind: str, gateway: str, guest: MakeGuest) -> None:
    one = guest(lambda one: one.read_head() + one.read_to_end())
    with pytest.raises(DeadlineExceeded) as late:
        Both(kind, gateway, timeout_seconds=0.1).health()
    assert late.value.detail == f"sandbox {SANDBOX}: its health not done after 0.1 s"
    until(lambda: one.finished, "the end of the guest's connection")


# -- processes


def _stream(*frames: bytes) -> Script:
    def script(one: GuestSocket) -> None:
        one.read_head()
        one.read_body()
        one.answer_stream(b"".join(frames))

    return script


def test_run_gives_output_and_end(client: Both, guest: MakeGuest) -> None:
    guest(
        _stream(frame(1, 0, b"out"), frame(5, 3), frame(2, 3, b"err"), exit_frame(6, exit_code=137, oom=True))
    )
    completed = client.run(SPEC)
    assert isinstance(completed, Completed)
    assert (completed.exit_code, completed.oom, completed.timed_out) == (137, True, False)
    assert (completed.stdout, completed.stderr, completed.truncated) == (b"out", b"err", False)
    assert 0 <= completed.duration_ms < 5000


def test_following_goes_on_from_an_offset(client: Both, guest: MakeGuest) -> None:
    one = guest(_stream(frame(1, 4, b"o"), exit_frame(5)))
    found = client.collect("process_follow", "p1", after=4)
    assert found[0] == Output("stdout", 4, b"o")
    assert isinstance(found[1], Exit)
    assert one.connections[0].head.startswith(b"GET /processes/p1/output?after=4&follow=1 ")


def test_what_is_there_now_may_end_without_an_exit(client: Both, guest: MakeGuest) -> None:
    guest(_stream(frame(1, 0, b"so far")))
    assert client.collect("process_follow", "p1", follow=False) == [Output("stdout", 0, b"so far")]


def test_a_stream_that_ends_before_the_process_is_an_error(client: Both, guest: MakeGuest) -> None:
    guest(_stream(frame(1, 0, b"half")))
    with pytest.raises(GuestUnreachable, match="ended before the process did; awaited the start"):
        client.run(SPEC)


def test_a_silent_stream_is_given_up(client: Both, guest: MakeGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sync, aio):
        monkeypatch.setattr(module, "SILENCE_SECONDS", 0.1)

    def script(one: GuestSocket) -> None:
        one.read_head()
        one.answer_stream(frame(1, 0, b"x"))
        one.read_to_end()

    guest(script)
    with pytest.raises(GuestUnreachable, match=r"silent for 0\.1 s; awaited the start of process p1"):
        client.run(SPEC)


def test_a_run_has_a_deadline_though_the_guest_gives_signs_of_life(client: Both, guest: MakeGuest) -> None:
    stopped = threading.Event()

    def script(one: GuestSocket) -> None:
        one.read_head()
        one.answer_stream()
        while not stopped.wait(0.01):
            one.send(frame(5, 0))

    one = guest(script)
    with pytest.raises(DeadlineExceeded, match=r"the start of process p1 not done after 0\.2 s"):
        client.run(SPEC, deadline_seconds=0.2)
    until(lambda: one.finished, "the end of the guest's connection")
    stopped.set()


def test_a_gateway_that_goes_away_in_the_middle_is_an_error(data_dir: Path, guest: MakeGuest) -> None:
    from sandboxes.gateway.address import UnixAddress

    def script(one: GuestSocket) -> None:
        one.read_head()
        one.answer_stream(frame(1, 0, b"x"))
        one.read_to_end()

    guest(script)
    with gateway_in_thread(data_dir, UnixAddress(data_dir / "g.sock")) as address:
        frames = iter(GuestClient(SANDBOX, address, NODE_KEY).process_follow(SPEC))
        assert next(frames) == Output("stdout", 0, b"x")
    with pytest.raises(GuestUnreachable, match="awaited the start of process p1"):
        next(frames)


def test_another_thread_may_end_a_stream(gateway: str, guest: MakeGuest) -> None:
    def script(one: GuestSocket) -> None:
        one.read_head()
        one.answer_stream(frame(1, 0, b"x"))
        one.read_to_end()

    one = guest(script)
    stream = GuestClient(SANDBOX, gateway, NODE_KEY).process_follow(SPEC)
    frames = iter(stream)
    assert next(frames) == Output("stdout", 0, b"x")
    threading.Timer(0.05, stream.close).start()
    assert list(frames) == []
    until(lambda: one.finished, "the end of the guest's connection", 2)


async def test_a_cancelled_run_ends_the_guest_s_connection(gateway: str, guest: MakeGuest) -> None:
    def script(one: GuestSocket) -> None:
        one.read_head()
        one.answer_stream(frame(1, 0, b"x"))
        one.read_to_end()

    one = guest(script)
    running = asyncio.ensure_future(AsyncGuestClient(SANDBOX, gateway, NODE_KEY).run(SPEC))
    await asyncio.to_thread(until, lambda: one.connections and one.connections[0].sent, "the stream")
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await asyncio.to_thread(until, lambda: one.finished, "the end of the guest's connection", 2)


async def test_another_task_may_end_a_stream(gateway: str, guest: MakeGuest) -> None:
    def script(one: GuestSocket) -> None:
        one.read_head()
        one.answer_stream(frame(1, 0, b"x"))
        one.read_to_end()

    guest(script)
    stream = await AsyncGuestClient(SANDBOX, gateway, NODE_KEY).process_follow(SPEC)
    first = asyncio.Event()

    async def read() -> list[Any]:
        found = []
        async for one in stream:
            found.append(one)
            first.set()
        return found

    reading = asyncio.ensure_future(read())
    await asyncio.wait_for(first.wait(), LIMIT_SECONDS)
    await stream.aclose()
    assert await asyncio.wait_for(reading, LIMIT_SECONDS) == [Output("stdout", 0, b"x")]


async def test_a_slow_reader_of_the_async_client_holds_the_guest_back(gateway: str, guest: MakeGuest) -> None:
    def script(one: GuestSocket) -> None:
        one.read_head()
        one.answer_stream()
        at = 0
        while at < 64 * 1024 * 1024:
            one.send(frame(1, at, b"x" * 65536))
            at += 65536
        one.send(exit_frame(at))

    one = guest(script)
    stream = await AsyncGuestClient(SANDBOX, gateway, NODE_KEY).process_follow(SPEC)
    sent = await asyncio.to_thread(until_still, lambda: one.connections[0].sent)
    assert 0 < sent < 4 * 1024 * 1024
    size = 0
    async for found in stream:
        size += len(found.data) if isinstance(found, Output) else 0
    assert size == 64 * 1024 * 1024


# -- files


def test_a_file_is_read_in_pieces(client: Both, guest: MakeGuest) -> None:
    content = bytes(range(256)) * 4096

    def script(one: GuestSocket) -> None:
        one.read_head()
        head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(content)}\r\nX-E2A-Mode: 0750\r\n\r\n"
        one.send(head.encode() + content)

    guest(script)
    assert client.read_file("/a") == (len(content), 0o750, content)


def test_a_file_that_breaks_off_is_an_error(client: Both, guest: MakeGuest) -> None:
    def script(one: GuestSocket) -> None:
        one.read_head()
        one.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")

    guest(script)
    with pytest.raises(GuestUnreachable, match="broke off; awaited file '/a'"):
        client.collect("file_read", "/a")


def _pieces(client: Both, *pieces: bytes) -> Any:
    if client.kind == "sync":
        return iter(pieces)

    async def give() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    return give()


@pytest.mark.parametrize("size", [6, None])
def test_a_file_is_written_in_pieces(size: int | None, client: Both, guest: MakeGuest) -> None:
    heard: list[bytes] = []

    def script(one: GuestSocket) -> None:
        one.read_head()
        heard.append(one.read_body())
        one.answer(200, {"path": "/workspace/a", "size": 6})

    one = guest(script)
    written = client.file_write("a", _pieces(client, b"abc", b"", b"def"), size=size, mode=0o600)
    assert written.size == 6
    assert heard == [b"abcdef" if size else b"3\r\nabc\r\n3\r\ndef\r\n0\r\n\r\n"]
    assert one.connections[0].head.startswith(b"PUT /files?path=a&mode=0600 ")


@pytest.mark.parametrize("size", [5, 7])
def test_a_file_of_another_size_than_was_said_is_not_written(
    size: int, client: Both, guest: MakeGuest
) -> None:
    heard: list[bytes] = []

    def script(one: GuestSocket) -> None:
        one.read_head()
        heard.append(one.read_to_end())

    one = guest(script)
    with pytest.raises(ValueError, match="bytes than the length that was given"):
        client.file_write("a", _pieces(client, b"abc", b"def"), size=size)
    until(lambda: one.finished, "the end of the guest's connection")
    assert len(heard[0]) < size


def test_a_refused_upload_stops_and_says_why(client: Both, guest: MakeGuest) -> None:
    given = []

    def script(one: GuestSocket) -> None:
        one.read_head()
        one.answer(507, {"code": "no_space", "detail": "the disk is full"})

    guest(script)

    def count(pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            given.append(len(piece))
            yield piece

    async def count_async(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for piece in pieces:
            given.append(len(piece))
            yield piece

    pieces = _pieces(client, *[bytes(65536)] * 2000)
    with pytest.raises(GuestError, match="the disk is full") as refused:
        client.file_write("a", (count if client.kind == "sync" else count_async)(pieces), size=2000 * 65536)
    assert refused.value.code == "no_space"
    assert len(given) < 2000


def test_a_folder_is_listed(client: Both, guest: MakeGuest) -> None:
    entry = {"path": "/a", "name": "a", "type": "symlink", "size": 1, "mode": "0777", "mtime": 1.25}
    guest(answered(200, {"entries": [{**entry, "target": "b"}], "truncated": True}))
    assert client.file_list("/") == FolderListing(
        (FileInfo("/a", "a", "symlink", 1, 0o777, 1.25, "b"),), True
    )

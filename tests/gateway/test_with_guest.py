"""Client, gateway and the guest itself, all real; the guest runs as a plain process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2a.core.errors import GuestError, GuestUnreachable
from sandboxes.gateway.address import UnixAddress
from sandboxes.guest_client import (
    AsyncGuestClient,
    Exit,
    GuestClient,
    Output,
    ProcessSpec,
    PtySize,
    RedactedValue,
)
from tests.gateway.doubles import NODE_KEY, ROOT, SANDBOX, gateway_in_thread, until


class RealGuest:
    def __init__(self, folder: Path) -> None:
        self.workspace = folder / "workspace"
        self.workspace.mkdir()
        self.socket = folder / "sandboxes" / SANDBOX / "guest" / "guest.sock"
        self.socket.parent.mkdir(parents=True)
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", "-B", str(ROOT / "sandboxes" / "guest"), "--no-isolation"),
                *("--listen", str(self.socket), "--workspace", str(self.workspace)),
            ],
            env={"PATH": "/usr/local/bin:/usr/bin:/bin"},
        )
        until(self.socket.exists, "the guest's socket")


@pytest.fixture
def real() -> Iterator[tuple[RealGuest, str]]:
    with tempfile.TemporaryDirectory(prefix="e2a-") as name:
        folder = Path(name)
        guest = RealGuest(folder)
        try:
            with gateway_in_thread(folder, UnixAddress(folder / "run" / "gateway.sock")) as address:
                yield guest, address
        finally:
            guest.process.terminate()
            guest.process.wait(10)


@pytest.fixture
def client(real: tuple[RealGuest, str]) -> GuestClient:
    return GuestClient(SANDBOX, real[1], NODE_KEY)


def test_a_command_runs_to_its_end(client: GuestClient) -> None:
    completed = client.run(ProcessSpec(id="p1", command="echo out; echo err >&2; cat; exit 7", stdin=b"in"))
    assert completed.exit_code == 7
    assert (completed.stdout, completed.stderr) == (b"out\nin", b"err\n")
    assert not completed.truncated
    again = client.process_get("p1")
    assert (again.state, again.exit_code, again.output_bytes) == ("exited", 7, 10)


def test_configuration_reaches_processes_and_their_output(client: GuestClient) -> None:
    skipped = client.configure(
        env={"TOKEN": "hunter2hunter2"},
        redact=[RedactedValue("TOKEN", "hunter2hunter2"), RedactedValue("PIN", "123")],
    )
    assert skipped == ("PIN",)
    assert client.health().configured
    completed = client.run(ProcessSpec(id="p1", command="echo $TOKEN; echo 123"))
    assert completed.stdout == b"[redacted:TOKEN]\n123\n"


def test_more_output_than_is_kept_is_drained_and_counted(client: GuestClient) -> None:
    spec = ProcessSpec(id="p1", command="head -c 20000000 /dev/zero; echo end >&2", on_full="block")
    completed = client.run(spec, max_output_bytes=1000)
    assert (completed.exit_code, len(completed.stdout), completed.stdout_bytes) == (0, 1000, 20_000_000)
    assert completed.stderr == b"end\n"
    assert completed.truncated


def test_a_time_limit_is_told(client: GuestClient) -> None:
    completed = client.run(ProcessSpec(id="p1", command="echo begun; sleep 60", timeout_seconds=0.3))
    assert (completed.exit_code, completed.timed_out, completed.stdout) == (124, True, b"begun\n")


def test_a_command_that_was_left_is_taken_up_where_it_was(client: GuestClient) -> None:
    spec = ProcessSpec(id="p1", command="echo one; read line; echo $line", keep_stdin_open=True)
    with client.process_follow(spec) as stream:
        first = next(iter(stream))
    assert first == Output("stdout", 0, b"one\n")
    client.process_stdin("p1", b"two\n", close=True)
    frames = list(client.process_follow(spec, after=4))  # The same spec again is the same process.
    assert frames[0] == Output("stdout", 4, b"two\n")
    assert isinstance(frames[1], Exit)
    assert len(frames) == 2


def test_a_reader_that_goes_away_kills_what_asked_for_it(
    client: GuestClient, real: tuple[RealGuest, str]
) -> None:
    pid_file = real[0].workspace / "pid"
    spec = ProcessSpec(id="p1", command="echo $$ > pid; echo up; sleep 60", kill_on_disconnect=True)
    with client.process_follow(spec) as stream:
        assert next(iter(stream)) == Output("stdout", 0, b"up\n")
    pid = int(pid_file.read_text())
    until(lambda: not Path(f"/proc/{pid}").exists(), "the end of the command", 5)
    assert client.process_get("p1").signal == "TERM"


def test_a_signal_ends_a_stream_in_another_thread(client: GuestClient) -> None:
    stream = client.process_follow(ProcessSpec(id="p1", argv=("sleep", "60")))
    threading.Timer(0.05, lambda: client.process_signal("p1", "INT")).start()
    (end,) = stream
    assert isinstance(end, Exit)
    assert (end.process.exit_code, end.process.signal) == (130, "INT")


def test_a_terminal_has_a_size(client: GuestClient) -> None:
    spec = ProcessSpec(id="p1", command="read x; stty size", pty=PtySize(cols=91, rows=17))
    with client.process_follow(spec) as stream:
        assert client.process_get("p1").pty
        client.process_resize("p1", cols=120, rows=40)
        client.process_stdin("p1", b"\n")
        output = b"".join(frame.data for frame in stream if isinstance(frame, Output))
    assert b"40 120" in output


def test_files_go_in_and_out(client: GuestClient, real: tuple[RealGuest, str]) -> None:
    content = bytes(range(256)) * 20_000
    pieces = [content[at : at + 70_001] for at in range(0, len(content), 70_001)]
    assert client.file_write("a/ü b", iter(pieces), mode=0o600).size == len(content)
    assert (real[0].workspace / "a" / "ü b").read_bytes() == content
    with client.file_read("a/ü b") as stream:
        assert (stream.size, stream.mode) == (len(content), 0o600)
        assert b"".join(stream) == content
    assert client.file_write("a/ü b", b"short").size == 5
    client.file_move("a/ü b", "a/c")
    client.file_mkdir("a/d")
    listing = client.file_list("a")
    assert [(entry.name, entry.type, entry.size) for entry in listing if entry.type == "file"] == [
        ("c", "file", 5)
    ]
    assert [entry.name for entry in listing] == ["c", "d"]
    assert client.file_stat("a/c").mode == 0o600
    client.file_delete("a", recursive=True)
    with pytest.raises(GuestError) as refused:
        client.file_stat("a")
    assert (refused.value.code, refused.value.guest_status) == ("not_found", 404)


def test_refusals_name_themselves(client: GuestClient) -> None:
    for call, code in (
        (lambda: client.process_get("p9"), "no_such_process"),
        (lambda: client.file_write("/proc/version/x", [b"a", b"b"]), "not_a_directory"),
        (lambda: client.process_start(ProcessSpec(id="p1", command="x", cwd="/nowhere")), "bad_cwd"),
    ):
        with pytest.raises(GuestError) as refused:
            call()
        assert refused.value.code == code


def test_counters_move(client: GuestClient) -> None:
    client.run(ProcessSpec(id="p1", command="head -c 1000 /dev/zero"))
    stats = client.stats()
    assert stats.running == 0
    assert stats.bytes_out >= 1000


def test_a_dead_guest_ends_streams_with_an_error(client: GuestClient, real: tuple[RealGuest, str]) -> None:
    stream = client.process_follow(ProcessSpec(id="p1", command="echo up; sleep 60"))
    frames = iter(stream)
    assert next(frames) == Output("stdout", 0, b"up\n")
    real[0].process.kill()
    with pytest.raises(GuestUnreachable, match="the stream ended before the process did"):
        list(frames)
    real[0].process.wait(10)
    with pytest.raises(GuestUnreachable, match="awaited its health"):
        client.health()


async def test_many_commands_at_once(real: tuple[RealGuest, str]) -> None:
    client = AsyncGuestClient(SANDBOX, real[1], NODE_KEY)
    specs = [ProcessSpec(id=f"p{number}", command=f"echo {number}") for number in range(40)]
    ended = await asyncio.gather(*[client.run(spec) for spec in specs])
    assert [completed.stdout for completed in ended] == [b"%d\n" % number for number in range(40)]
    assert len(await client.process_list()) == 32  # What a guest remembers.


async def test_a_folder_is_watched_until_it_is_left(real: tuple[RealGuest, str]) -> None:
    client = AsyncGuestClient(SANDBOX, real[1], NODE_KEY)
    with pytest.raises(GuestError, match="No such file") as missing:
        await client.file_watch("missing")
    assert (missing.value.code, missing.value.guest_status) == ("not_found", 404)
    async with await client.file_watch("/workspace", recursive=True) as watch:
        changes = aiter(watch)
        assert (await anext(changes)).kind == "ready"
        (real[0].workspace / "new").mkdir()
        created = await anext(changes)
        assert (created.kind, created.is_directory) == ("created", True)
        waiting = asyncio.ensure_future(anext(changes, None))
        await asyncio.sleep(0)
        await watch.aclose()
        assert await asyncio.wait_for(waiting, 20) is None


def test_a_watch_of_a_dead_guest_ends_with_an_error(client: GuestClient, real: tuple[RealGuest, str]) -> None:
    watch = client.file_watch("/workspace")
    changes = iter(watch)
    assert next(changes).kind == "ready"
    real[0].process.kill()
    with pytest.raises(GuestUnreachable):
        next(changes)

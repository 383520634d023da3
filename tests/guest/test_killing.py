"""Nothing that a command started outlives its end by timeout, signal, lost client, deadline or TERM."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from sandboxes.guest.cgroup import MemoryCgroup
from sandboxes.guest.loop import Loop
from sandboxes.guest.pool import IDLE_LIMIT
from sandboxes.guest.process import Process
from sandboxes.guest.runner import Identity
from sandboxes.guest.spec import Spec
from sandboxes.guest.table import Table
from tests.guest.conftest import Start
from tests.guest.guest import Guest, alive, ended, marked, until

pytestmark = pytest.mark.alone  # Isolated guests have one uid, of which each ends all processes.

HERE = Path(__file__).parent


def escape(guest: Guest, *words: str) -> str:
    """Return a command that leaves a process behind with a marker of this guest in its command line."""
    shutil.copy(HERE / "escape.py", guest.workspace / "escape.py")
    return f"/usr/bin/python3 escape.py {marker(guest)} {' '.join(words)}"


def marker(guest: Guest) -> str:
    return f"mark-{guest.folder.parent.name}-{guest.folder.name}"


@pytest.fixture(params=["guest", "isolated"])
def either(request: pytest.FixtureRequest) -> Guest:
    made = request.getfixturevalue(request.param)
    assert isinstance(made, Guest)
    return made


def test_5_13_a_timeout_ends_what_escaped_its_session(either: Guest) -> None:
    result = either.run(escape(either, "stay"), timeout_seconds=0.5)
    assert (result.code, result.exit["timed_out"], result.exit["state"]) == (124, True, "exited")
    assert marked(marker(either)) == []


def test_a_timeout_kills_what_ignores_term_after_a_grace_time(guest: Guest) -> None:
    begun = time.monotonic()
    result = guest.run("trap '' TERM; " + escape(guest, "stay", "trap"), timeout_seconds=0.5)
    assert result.code == 124
    assert 1.4 < time.monotonic() - begun < 5
    assert marked(marker(guest)) == []


def test_a_timeout_lets_a_command_tidy_up(guest: Guest) -> None:
    result = guest.run("trap 'echo tidy; exit 0' TERM; sleep 60 & wait", timeout_seconds=0.3)
    assert (result.stdout, result.code, result.exit["timed_out"]) == (b"tidy\n", 124, True)


def test_5_13_kill_reaches_what_forked_twice_and_called_setsid(either: Guest) -> None:
    process_id = either.start(escape(either, "trap"))
    until(lambda: marked(marker(either)), "escaped")
    until(lambda: either.get(process_id)["state"] == "exited", "ended")
    assert either.get(process_id)["background"] is True
    either.signal(process_id, "KILL")
    until(lambda: not marked(marker(either)), "killed", 5)
    until(lambda: not either.get(process_id)["background"], "noted")


def test_term_reaches_what_forked_twice_and_called_setsid(guest: Guest) -> None:
    process_id = guest.start(escape(guest, "stay"))
    until(lambda: len(marked(marker(guest))) == 2, "escaped")
    assert guest.signal(process_id, "SIGTERM").status == 200
    until(lambda: not marked(marker(guest)), "ended", 5)
    assert guest.wait(process_id)["signal"] == "TERM"


def test_5_13_a_lost_client_ends_its_command_if_asked(guest: Guest) -> None:
    stream = guest.follow(escape(guest, "stay", "trap"), kill_on_disconnect=True)
    until(lambda: len(marked(marker(guest))) == 2, "escaped")
    stream.close()
    until(lambda: not marked(marker(guest)), "ended", 5)


def test_a_lost_client_does_not_end_its_command_otherwise(guest: Guest) -> None:
    stream = guest.follow("sleep 0.5; echo done", id="kept")
    stream.close()
    assert guest.wait("kept")["exit_code"] == 0
    assert ended(guest.output("kept")).stdout == b"done\n"


def test_delete_kills_and_frees_the_id(guest: Guest) -> None:
    guest.start(escape(guest, "stay", "trap"), id="gone")
    until(lambda: len(marked(marker(guest))) == 2, "escaped")
    assert guest.request("DELETE", "/processes/gone").json["id"] == "gone"
    assert guest.request("GET", "/processes/gone").status == 404
    until(lambda: not marked(marker(guest)), "killed", 5)
    assert guest.run("echo new", id="gone").stdout == b"new\n"


def test_a_chain_that_always_forks_on_is_caught(guest: Guest) -> None:
    shutil.copy(HERE / "respawn.py", guest.workspace / "respawn.py")
    process_id = guest.start(f"/usr/bin/python3 respawn.py {marker(guest)}")
    until(lambda: guest.get(process_id)["state"] == "exited", "running on")
    guest.signal(process_id, "KILL")
    until(lambda: not guest.get(process_id)["background"], "caught", 6)
    assert marked(marker(guest)) == []


def test_a_stopped_command_is_ended_too(guest: Guest) -> None:
    result = guest.run("kill -STOP $$", timeout_seconds=0.3)
    assert (result.code, result.exit["signal"]) == (124, "TERM")


def test_signals_reach_a_trap(guest: Guest) -> None:
    stream = guest.follow("trap 'echo caught; exit 5' USR1; echo ready; while :; do sleep 0.05; done", id="t")
    stream.read_until(b"ready\n")
    guest.signal("t", "USR1")
    result = ended(stream)
    assert (result.stdout, result.code) == (b"caught\n", 5)
    unknown = guest.signal("t", "NONSENSE")
    assert unknown.status == 400


def test_term_ends_the_guest_and_everything_at_once(guest: Guest) -> None:
    guest.start(escape(guest, "stay", "trap"))
    until(lambda: len(marked(marker(guest))) == 2, "escaped")
    begun = time.monotonic()
    guest.process.terminate()
    assert guest.process.wait(10) == 0
    assert time.monotonic() - begun < 1
    assert marked(marker(guest)) == []


def test_a_killed_guest_leaves_nothing_behind_without_isolation(guest: Guest) -> None:
    guest.start(escape(guest, "stay", "trap"))
    until(lambda: len(marked(marker(guest))) == 2, "escaped")
    guest.process.kill()
    until(lambda: not marked(marker(guest)), "ended", 5)


def test_the_lifetime_ends_everything(start_guest: Start) -> None:
    guest = start_guest(flags=("--lifetime", "1.5"))
    guest.configure(env={}, redact=[], deadline_seconds=600)
    guest.start(escape(guest, "stay", "trap"))
    assert guest.process.wait(10) == 124
    assert marked(marker(guest)) == []


def test_thawed_after_its_deadline_it_waits_for_a_later_one(guest: Guest) -> None:
    guest.configure(deadline_seconds=1)
    os.kill(guest.process.pid, signal.SIGSTOP)
    frozen_at = time.monotonic()
    until(lambda: time.monotonic() - frozen_at > 5, "frozen for longer than its deadline")
    os.kill(guest.process.pid, signal.SIGCONT)
    assert guest.configure(deadline_seconds=600).status == 200
    assert guest.run("echo lives").stdout == b"lives\n"


def test_a_configured_deadline_ends_everything_and_can_be_moved(guest: Guest) -> None:
    before = guest.request("GET", "/health").json["uptime_ms"]
    guest.configure(deadline_seconds=0.7)
    guest.configure(deadline_seconds=None)
    until(
        lambda: guest.request("GET", "/health").json["uptime_ms"] > before + 900, "older than that deadline"
    )
    guest.configure(deadline_seconds=0.5)
    assert guest.process.wait(10) == 124


def test_a_command_survives_the_death_of_its_runner(isolated: Guest) -> None:
    """The sandbox has the runner's uid and can kill it; then PID 1 has the command and its true exit code."""
    stream = isolated.follow("sleep 0.1; kill -KILL $PPID; sleep 0.5; echo after; exit 7", id="orphan")
    result = ended(stream)
    assert (result.stdout, result.code, result.exit["state"]) == (b"after\n", 7, "exited")
    assert isolated.run("echo next").stdout == b"next\n"


def test_a_command_without_its_runner_can_still_be_killed(isolated: Guest) -> None:
    command = "sleep 0.1; kill -KILL $PPID; sleep 0.1; echo ready; " + escape(isolated, "stay", "trap")
    stream = isolated.follow(command, id="x")
    stream.read_until(b"ready\n")
    until(lambda: len(marked(marker(isolated))) >= 2, "escaped")
    isolated.signal("x", "KILL")
    assert ended(stream).code == 137
    until(lambda: not marked(marker(isolated)), "killed", 5)


def test_a_timeout_holds_without_the_runner(isolated: Guest) -> None:
    result = isolated.run("sleep 0.1; kill -KILL $PPID; sleep 100", timeout_seconds=0.5)
    assert (result.code, result.exit["timed_out"]) == (124, True)


def test_an_exit_record_that_the_dead_runner_left_as_a_zombie_is_kept(isolated: Guest) -> None:
    stream = isolated.follow("echo $$ $PPID; read x; exit 9", id="lost", keep_stdin_open=True)
    command, runner = map(int, stream.read_until(b"\n").split())
    os.kill(runner, signal.SIGSTOP)
    isolated.request("POST", "/processes/lost/stdin?close=1", b"\n")
    until(lambda: not alive(command), "ended")
    os.kill(runner, signal.SIGKILL)
    result = ended(stream)
    assert (result.exit["state"], result.code) == ("exited", 9)


def test_a_runner_killed_at_the_very_start_gives_the_truth_or_unknown_and_never_a_second_start(
    isolated: Guest,
) -> None:
    for _ in range(20):
        result = isolated.run("kill -KILL $PPID; exit 5")
        assert (result.exit["state"], result.code) in (("exited", 5), ("unknown", None))


def test_a_lost_exit_record_is_unknown_and_never_0(tmp_path: Path) -> None:
    """The runner reaped the command and died before it could tell: nobody knows how it ended."""
    loop = Loop()
    identity = Identity(isolated=False, uid=1, gid=1, workspace=str(tmp_path), home=str(tmp_path))
    process = Process(Table(loop, MemoryCgroup(), identity, "/", "/bin"), Spec({"id": "x", "argv": ["true"]}))
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    process.on_started(2**30, [out, err])
    os.write(out_end, b"said")
    os.close(out_end)
    os.close(err_end)
    process.on_runner_lost()
    described = process.describe()
    assert (described["state"], described["exit_code"], described["output_bytes"]) == ("unknown", None, 4)


def test_a_runner_that_is_stopped_while_idle_does_not_stop_the_sandbox(isolated: Guest) -> None:
    until(isolated.runners, "forked")
    for pid in isolated.runners():
        os.kill(pid, signal.SIGSTOP)
    until(
        lambda: all(") T " in Path(f"/proc/{pid}/stat").read_text() for pid in isolated.runners()), "stopped"
    )
    answer = isolated.request("POST", "/processes", {"id": "x", "argv": ["true"]})
    assert (answer.status, answer.code) == (503, "no_resources")
    assert isolated.run("echo well").stdout == b"well\n"


def test_a_stopped_runner_cannot_protect_its_command(isolated: Guest) -> None:
    result = isolated.run("sleep 0.1; kill -STOP $PPID; sleep 100", timeout_seconds=0.5)
    assert (result.code, result.exit["timed_out"]) == (124, True)


def test_strays_on_pid_1_are_killed(isolated: Guest) -> None:
    command = escape(isolated, "trap") + "; sleep 0.1; kill -KILL $PPID; sleep 0.3"
    result = isolated.run(command)
    assert result.code == 0
    until(lambda: not marked(marker(isolated)), "killed", 5)


def test_no_zombie_and_no_descriptor_is_left(guest: Guest) -> None:
    def count() -> int:
        return len(os.listdir(f"/proc/{guest.process.pid}/fd"))

    for _ in range(3):
        guest.run("true")
    begun = until(count, "counted")
    for number in range(30):
        guest.run(
            "sleep 0.01 & echo hi",
            stdin=b"x",
            timeout_seconds=5,
            pty={"cols": 80, "rows": 24} if number % 3 == 0 else None,
        )
    until(lambda: count() <= begun + IDLE_LIMIT, "closed")
    states = subprocess.run(
        ["ps", "-o", "stat=", "--ppid", str(guest.process.pid)], capture_output=True, check=False
    )
    assert b"Z" not in states.stdout

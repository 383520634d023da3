"""What a caller can rely on when it runs a command."""

from __future__ import annotations

import re
import threading

import pytest

from tests.guest.guest import EXIT, STDERR, STDOUT, Guest, answer_on, ended, until

pytestmark = pytest.mark.alone  # Isolated guests have one uid, of which each ends all processes.


def test_a_command_gives_its_output_and_exit_code(guest: Guest) -> None:
    result = guest.run("echo out; echo err >&2; exit 3")
    assert (result.stdout, result.stderr, result.code) == (b"out\n", b"err\n", 3)
    assert result.exit["state"] == "exited"
    assert result.exit["signal"] is None
    assert result.exit["ended_at"] >= result.exit["started_at"]
    assert result.exit["output_bytes"] == 8


def test_argv_is_run_without_a_shell(guest: Guest) -> None:
    assert guest.run(["printf", "%s|", "$HOME", "a b"]).stdout == b"$HOME|a b|"


def test_a_program_that_does_not_exist_ends_with_127(guest: Guest) -> None:
    result = guest.run(["no-such-program"])
    assert result.code == 127
    assert b"no-such-program" in result.stderr
    assert guest.run("no-such-program").code == 127


def test_a_program_that_cannot_be_executed_ends_with_126(guest: Guest) -> None:
    (guest.workspace / "plain").write_text("x")
    assert guest.run(["./plain"]).code == 126


def test_the_environment_is_the_promised_one_then_configured_then_of_the_call(guest: Guest) -> None:
    guest.configure(env={"A": "configured", "B": "configured"})
    lines = set(guest.run(["env"], env={"B": "call"}).stdout.decode().splitlines())
    assert {"USER=agent", "LOGNAME=agent", "SHELL=/bin/bash", "LANG=C.UTF-8"} <= lines
    assert f"HOME={guest.workspace}" in lines
    assert {"A=configured", "B=call"} <= lines
    assert {line.split("=")[0] for line in lines} <= {
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TMPDIR"),
        *("A", "B"),
    }


def test_configure_replaces_the_environment_wholly(guest: Guest) -> None:
    guest.configure(env={"A": "1"})
    guest.configure(env={"B": "2"})
    lines = guest.run(["env"]).stdout.decode().splitlines()
    assert "B=2" in lines
    assert "A=1" not in lines


def test_it_starts_in_the_workspace_or_where_it_is_told(guest: Guest) -> None:
    (guest.workspace / "inner").mkdir()
    assert guest.run("pwd").stdout.decode() == f"{guest.workspace}\n"
    assert guest.run("pwd", cwd="inner").stdout.decode() == f"{guest.workspace}/inner\n"
    assert guest.run("pwd", cwd="/").stdout == b"/\n"


def test_a_folder_that_does_not_exist_is_refused_and_the_id_stays_free(guest: Guest) -> None:
    refused = guest.request("POST", "/processes?follow=1", {"id": "x", "command": "true", "cwd": "nowhere"})
    assert (refused.status, refused.code) == (400, "bad_cwd")
    assert guest.request("POST", "/processes", {"id": "x", "command": "true"}).status == 201


def test_input_is_given_and_ends(guest: Guest) -> None:
    data = bytes(range(256)) * 2000
    assert guest.run(["sha256sum"], stdin=data).stdout == guest.run(["sha256sum"], stdin=data).stdout
    assert guest.run(["wc", "-c"], stdin=data).stdout == b"512000\n"
    assert guest.run(["cat"]).stdout == b""


def test_more_input_follows_while_it_is_open(guest: Guest) -> None:
    stream = guest.follow(["cat"], id="cat", keep_stdin_open=True, stdin=b"one\n")
    assert stream.read_until(b"one\n") == b"one\n"
    assert guest.get("cat")["stdin_open"] is True
    assert guest.request("POST", "/processes/cat/stdin", b"two\n").json == {"accepted": 4}
    stream.read_until(b"two\n")
    assert guest.request("POST", "/processes/cat/stdin?close=1", b"three\n").status == 200
    assert ended(stream).stdout == b"three\n"
    late = guest.request("POST", "/processes/cat/stdin", b"x")
    assert (late.status, late.code) == (409, "stdin_closed")


def test_input_that_nobody_reads_is_refused_beyond_a_limit(guest: Guest) -> None:
    guest.start(["sleep", "60"], id="deaf", keep_stdin_open=True)
    piece = b"x" * (900 * 1024)
    codes = [guest.request("POST", "/processes/deaf/stdin", piece).status for _ in range(3)]
    assert codes[0] == 200
    assert codes[-1] == 409


def test_the_same_id_is_never_started_twice(guest: Guest) -> None:
    spec = {"id": "once", "command": "echo started >> count; sleep 0.2; echo done"}
    barrier = threading.Barrier(8)
    statuses = []

    def start() -> None:
        barrier.wait()
        statuses.append(guest.request("POST", "/processes", spec).status)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] * 7 + [201]
    guest.wait("once")
    assert guest.read("count") == b"started\n"
    # Asked again with follow, it is the same process from its beginning, or from where the caller says.
    assert ended(guest.stream("/processes?follow=1", spec)).stdout == b"done\n"
    assert ended(guest.stream("/processes?follow=1&after=2", spec)).stdout == b"ne\n"


def test_a_long_command_is_run_as_a_script(guest: Guest) -> None:
    result = guest.run("echo begin; : " + "x" * 300_000 + "; echo end; exit 4")
    assert (result.stdout, result.code) == (b"begin\nend\n", 4)


def test_a_large_environment_reaches_the_command(guest: Guest) -> None:
    names = {f"V{number}": "v" * 60_000 for number in range(10)}
    guest.configure(env=names)
    assert guest.run("echo ${#V0}${#V9}").stdout == b"6000060000\n"


def test_an_argument_that_the_kernel_refuses_is_a_400(guest: Guest) -> None:
    answer = guest.request("POST", "/processes", {"id": "x", "argv": ["true", "x" * 200_000]})
    assert (answer.status, answer.code) == (400, "too_large")


def test_a_signal_that_ends_it_is_named(guest: Guest) -> None:
    result = guest.run("kill -SEGV $$")
    assert (result.code, result.exit["signal"]) == (139, "SEGV")


def test_a_process_can_be_looked_up_and_listed(guest: Guest) -> None:
    guest.start("sleep 30", id="sleeper")
    described = guest.get("sleeper")
    assert (described["state"], described["exit_code"], described["ended_at"]) == ("running", None, None)
    assert [one["id"] for one in guest.request("GET", "/processes").json["processes"]] == ["sleeper"]
    assert guest.request("GET", "/health").json["processes"] == 1
    missing = guest.request("GET", "/processes/nobody")
    assert (missing.status, missing.code) == (404, "no_such_process")


def test_sixty_four_run_at_once_and_no_more(guest: Guest) -> None:
    for number in range(64):
        guest.start(["sleep", "60"], id=f"s{number}")
    refused = guest.request("POST", "/processes", {"id": "more", "argv": ["true"]})
    assert (refused.status, refused.code) == (409, "too_many_processes")
    assert guest.request("DELETE", "/processes/s0").status == 200
    assert guest.request("POST", "/processes", {"id": "more", "argv": ["true"]}).status == 201


def test_the_oldest_finished_processes_are_forgotten(guest: Guest) -> None:
    for number in range(40):
        assert guest.run(["true"], id=f"n{number}").code == 0
    known = [one["id"] for one in guest.request("GET", "/processes").json["processes"]]
    assert known == [f"n{number}" for number in range(8, 40)]


def test_what_goes_on_in_the_background_does_not_hold_up_the_answer(guest: Guest) -> None:
    result = guest.run("(sleep 30; echo never) & echo $!", id="server")
    pid = int(result.stdout)
    assert result.code == 0
    assert result.exit["background"] is True
    assert result.exit["ended_at"] - result.exit["started_at"] < 2
    assert guest.signal("server", "KILL").status == 200
    until(lambda: not guest.get("server")["background"], "killed")
    until(lambda: not guest.runners() or pid not in guest.runners(), "gone")
    assert guest.signal("server", "KILL").code == "not_running"


def test_output_that_follows_the_end_closely_is_kept(guest: Guest) -> None:
    assert guest.run("exec > >(sleep 0.1; cat); echo late").stdout == b"late\n"


def test_its_own_standard_streams_can_be_opened_by_name(isolated: Guest) -> None:
    result = isolated.run("echo a > /dev/stdout; echo b > /dev/stderr")
    assert (result.stdout, result.stderr) == (b"a\n", b"b\n")


def test_signals_that_python_ignores_are_not_ignored_in_commands(guest: Guest) -> None:
    assert guest.run("yes | head -1; echo ${PIPESTATUS[0]}").stdout == b"y\n141\n"


def test_frames_carry_their_stream_and_offset(guest: Guest) -> None:
    stream = guest.follow("echo one; sleep 0.1; echo two >&2; sleep 0.1; echo three")
    frames = [(frame.kind, frame.offset, frame.payload) for frame in stream]
    stream.close()
    assert frames[:3] == [(STDOUT, 0, b"one\n"), (STDERR, 4, b"two\n"), (STDOUT, 8, b"three\n")]
    assert [(kind, offset) for kind, offset, _ in frames[3:]] == [(EXIT, 14)]


def test_a_connection_is_kept_alive(guest: Guest) -> None:
    with guest.connect() as sock:
        for _ in range(3):
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: guest\r\n\r\n")
            assert answer_on(sock).json["guest"] == "1"
        body = b'{"id": "kept", "command": "true"}'
        sock.sendall(b"POST /processes HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body) * 2)
        answers = b""
        while answers.count(b'"background"') < 2:
            piece = sock.recv(1 << 16)
            assert piece, answers
            answers += piece
        assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"201", b"200"]

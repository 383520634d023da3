"""Commands on a terminal."""

from __future__ import annotations

import pytest

from tests.guest.guest import STDERR, Guest, ended, marked, until

pytestmark = pytest.mark.alone  # Isolated guests have one uid, of which each ends all processes.


def test_a_command_has_a_controlling_terminal_of_its_size(isolated: Guest) -> None:
    result = isolated.run(
        "tty; stty size; echo $TERM; echo err >&2; echo x > /dev/tty", pty={"cols": 100, "rows": 40}
    )
    lines = result.stdout.split(b"\r\n")
    assert lines[0].startswith(b"/dev/pts/")
    assert lines[1:] == [b"40 100", b"xterm-256color", b"err", b"x", b""]
    assert result.stderr == b""
    assert result.exit["pty"] is True


def test_it_can_be_resized(guest: Guest) -> None:
    script = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done"
    stream = guest.follow(script, id="t", pty={"cols": 80, "rows": 24})
    stream.read_until(b"ready\r\n")
    assert guest.request("POST", "/processes/t/resize", {"cols": 132, "rows": 50}).status == 200
    stream.read_until(b"50 132\r\n")
    guest.signal("t", "KILL")
    assert ended(stream).code == 137


def test_keys_reach_it_and_control_c_interrupts(guest: Guest) -> None:
    stream = guest.follow(["bash", "--norc"], id="t", pty={"cols": 80, "rows": 24})
    guest.request("POST", "/processes/t/stdin", b"echo a$((1+1))b\n")
    stream.read_until(b"a2b")
    guest.request("POST", "/processes/t/stdin", b"sleep 61.125\n")
    until(lambda: marked("61.125"), "sleeping")
    guest.request("POST", "/processes/t/stdin", b"\x03")
    until(lambda: not marked("61.125"), "interrupted")
    guest.request("POST", "/processes/t/stdin", b"echo inter'rup'ted\n")
    stream.read_until(b"interrupted")
    guest.request("POST", "/processes/t/stdin", b"exit 6\n")
    result = ended(stream)
    assert result.code == 6
    late = guest.request("POST", "/processes/t/resize", {"cols": 10, "rows": 10})
    assert (late.status, late.code) == (409, "no_terminal")


def test_closing_the_input_types_control_d(guest: Guest) -> None:
    stream = guest.follow(["cat"], id="t", pty={"cols": 80, "rows": 24})
    guest.request("POST", "/processes/t/stdin?close=1", b"hello\n")
    assert ended(stream).code == 0


def test_without_a_terminal_there_is_nothing_to_resize(guest: Guest) -> None:
    guest.start("sleep 60", id="t")
    answer = guest.request("POST", "/processes/t/resize", {"cols": 10, "rows": 10})
    assert (answer.status, answer.code) == (409, "no_terminal")


def test_all_output_is_of_one_kind(guest: Guest) -> None:
    stream = guest.follow("echo a; echo b >&2", pty={"cols": 80, "rows": 24})
    assert STDERR not in {frame.kind for frame in stream}
    stream.close()

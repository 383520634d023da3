"""The output log: offsets, attaching again, rings and back-pressure, bounded memory."""

from __future__ import annotations

import socket
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxes.guest.log import RUNS, OutputLog
from tests.guest.guest import EXIT, FRAME, GAP, Guest, ended, until


def memory_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise AssertionError("no Pss")


def settled(guest: Guest, process_id: str) -> int:
    """Wait until the log grows no more; return its length."""
    seen = [-1]

    def same_as_before() -> bool:
        seen.append(guest.get(process_id)["output_bytes"])
        return seen[-1] > 0 and seen[-20:] == [seen[-1]] * 20

    until(same_as_before, "settled")
    return seen[-1]


def test_output_is_read_again_from_any_offset(guest: Guest) -> None:
    guest.run("printf 0123456789", id="digits")
    assert ended(guest.output("digits", after=7)).stdout == b"789"
    assert ended(guest.output("digits", after=10)).stdout == b""
    beyond = guest.request("GET", "/processes/digits/output?after=11")
    assert (beyond.status, beyond.code) == (400, "bad_offset")


def test_a_reader_that_was_cut_off_goes_on_where_it_was(guest: Guest) -> None:
    lines = 20_000
    guest.start(f"seq {lines}; sleep 0.2; seq {lines}", id="long")
    seen = b""
    while True:
        stream = guest.output("long", after=len(seen))
        over = False
        for count, frame in enumerate(stream):
            if frame.kind == EXIT:
                over = True
            else:
                assert frame.offset == len(seen)
                seen += frame.payload
            if count == 1:
                break
        stream.close()
        if over:
            break
    expected = b"".join(b"%d\n" % number for number in range(1, lines + 1))
    assert seen == expected * 2


def test_without_follow_a_stream_ends_with_what_there_is(guest: Guest) -> None:
    stream = guest.follow("echo now; sleep 60", id="slow")
    stream.read_until(b"now\n")
    assert [frame.payload for frame in guest.output("slow", follow=0)] == [b"now\n"]
    stream.close()


def test_many_readers_see_the_same(guest: Guest) -> None:
    guest.start("seq 5000; sleep 0.3; seq 5000", id="shared")
    streams = [guest.output("shared") for _ in range(5)]
    outputs = {ended(stream).stdout for stream in streams}
    assert len(outputs) == 1
    assert len(outputs.pop()) == 2 * 23893


def test_a_ring_drops_the_oldest_and_says_how_much(guest: Guest) -> None:
    guest.start("head -c 1000000 /dev/zero; echo end", id="ring", log_bytes=100_000)
    described = guest.wait("ring")
    assert described["output_bytes"] == 1_000_004
    assert described["first_offset"] == 900_004
    frames = list(guest.output("ring"))
    assert (frames[0].kind, frames[0].offset, frames[0].json) == (GAP, 900_004, {"dropped": 900_004})
    result = ended(guest.output("ring"))
    assert result.gaps == [900_004]
    assert result.stdout == b"\0" * 99_996 + b"end\n"


def test_back_pressure_makes_the_command_wait_and_loses_nothing(guest: Guest) -> None:
    guest.start("seq 400000; touch done", id="waits", on_full="block", log_bytes=65536)
    assert 65536 <= settled(guest, "waits") <= 65536 * 2
    assert not (guest.workspace / "done").exists()
    result = ended(guest.output("waits"))
    assert result.gaps == []
    assert result.stdout.count(b"\n") == 400_000
    assert result.stdout.endswith(b"\n400000\n")


def test_a_reader_that_died_with_bytes_in_flight_loses_nothing_under_back_pressure(guest: Guest) -> None:
    guest.start("seq 300000", id="waits", on_full="block", log_bytes=65536)
    seen = b""
    for _ in range(3):
        stream = guest.output("waits", after=len(seen))
        for frame in stream:
            assert frame.kind != GAP
            seen += frame.payload
            break
        # Let it fill every buffer on the way before it dies.
        settled(guest, "waits")
        stream.close()
    rest = ended(guest.output("waits", after=len(seen)))
    assert rest.gaps == []
    assert (seen + rest.stdout).splitlines()[-1] == b"300000"
    assert (seen + rest.stdout).count(b"\n") == 300_000


def test_an_ended_command_is_told_as_ended_although_its_log_is_full(guest: Guest) -> None:
    guest.start("head -c 100000 /dev/zero", id="full", on_full="block", log_bytes=65536)
    assert guest.wait("full")["exit_code"] == 0
    assert len(ended(guest.output("full")).stdout) == 100_000


def test_5_14_a_reader_that_never_reads_does_not_grow_memory(guest: Guest) -> None:
    before = memory_kib(guest.process.pid)
    sock = guest.connect()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    guest.start("sleep 0.2; head -c 300M /dev/zero", id="flood")
    guest.send(sock, "GET", "/processes/flood/output?follow=1")
    until(lambda: guest.get("flood")["state"] == "exited", "ended", 30)
    assert guest.get("flood")["output_bytes"] == 300 << 20
    assert memory_kib(guest.process.pid) - before < 4096
    # And when it reads at last, it is told what it missed.
    data = b""
    while piece := sock.recv(1 << 20):
        data += piece
    sock.close()
    assert FRAME.pack(GAP, (300 << 20) - (1 << 20), 0)[:9] in data
    assert b'"state": "exited"' in data[-600:]


def test_memory_for_all_logs_is_bounded(guest: Guest) -> None:
    before = memory_kib(guest.process.pid)
    for _ in range(40):
        guest.run("head -c 2000000 /dev/zero", log_bytes=1 << 20)
    assert memory_kib(guest.process.pid) - before < 24 << 10


def test_stdout_and_stderr_keep_their_order_when_they_alternate(guest: Guest) -> None:
    script = "for i in 1 2 3 4 5; do echo o$i; sleep 0.02; echo e$i >&2; sleep 0.02; done"
    stream = guest.follow(script)
    text = b"".join(frame.payload for frame in stream if frame.kind != EXIT)
    stream.close()
    assert text == b"".join(b"o%d\ne%d\n" % (number, number) for number in range(1, 6))


PIECES = st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(min_size=1, max_size=40)), max_size=60)


@settings(deadline=None)
@given(pieces=PIECES, capacity=st.integers(1, 100), start=st.integers(0, 500), limit=st.integers(1, 64))
def test_a_log_gives_back_what_it_kept(
    pieces: list[tuple[int, bytes]], capacity: int, start: int, limit: int
) -> None:
    log = OutputLog(capacity, lossless=False)
    whole = b""
    kinds = b""
    for kind, piece in pieces:
        log.append(kind, piece)
        whole += piece
        kinds += bytes([kind]) * len(piece)
    assert log.end == len(whole)
    assert log.end - log.first == min(capacity, len(whole))
    at = min(start, log.end)
    seen = max(at, log.first)
    while at < log.end:
        frames, following = log.frames(at, limit)
        assert frames
        while frames:
            kind, offset, length = FRAME.unpack_from(frames)
            payload, frames = frames[FRAME.size :][:length], frames[FRAME.size + length :]
            if kind == GAP:
                assert offset == log.first
                continue
            assert offset == seen
            assert payload == whole[offset : offset + length]
            assert bytes([kind]) * length == kinds[offset : offset + length]
            seen += length
        assert following == seen
        at = following
    assert log.frames(log.end, limit) == (b"", log.end)


def test_a_log_bounds_how_often_the_streams_alternate() -> None:
    log = OutputLog(1 << 20, lossless=False)
    for number in range(RUNS * 3):
        log.append(1 + number % 2, b"x")
    assert log.size <= RUNS
    lossless = OutputLog(1 << 20, lossless=True)
    for number in range(RUNS):
        assert not lossless.full
        lossless.append(1 + number % 2, b"x")
    assert lossless.full
    lossless.mark_read(RUNS)
    assert not lossless.full

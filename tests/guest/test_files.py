"""Files: as the sandbox's uid, streamed, whole or not at all, and never anything but regular files."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.guest import UID, Guest, answer_on, head_on, until
from tests.guest.test_output import memory_kib

pytestmark = pytest.mark.alone  # Isolated guests have one uid, of which each ends all processes.


def put(guest: Guest, path: str, data: bytes, **query: str) -> None:
    answer = guest.request("PUT", guest.path("/files", path=path, **query), data)
    assert answer.status == 200, answer


def refused(
    guest: Guest, method: str, path: str, target: str = "/files", body: bytes = b""
) -> tuple[int, str]:
    answer = guest.request(method, guest.path(target, path=path), body)
    return answer.status, answer.code


def test_a_file_is_written_with_its_folders_and_read_again(isolated: Guest) -> None:
    answer = isolated.request("PUT", "/files?path=a/b/c.txt", b"content")
    assert answer.json == {"path": f"{isolated.workspace}/a/b/c.txt", "size": 7}
    found = isolated.request("GET", "/files?path=a/b/c.txt")
    assert (found.body, found.headers["x-e2a-mode"]) == (b"content", "0644")
    owner = (isolated.workspace / "a/b/c.txt").stat()
    assert (owner.st_uid, owner.st_gid, owner.st_mode & 0o7777) == (UID, UID, 0o644)


def test_a_mode_is_set_and_kept(guest: Guest) -> None:
    put(guest, "run.sh", b"one", mode="0750")
    put(guest, "run.sh", b"two")
    assert guest.request("GET", "/files?path=run.sh").headers["x-e2a-mode"] == "0750"
    put(guest, "run.sh", b"three", mode="4755")
    assert (guest.workspace / "run.sh").stat().st_mode & 0o7777 == 0o755
    assert guest.request("PUT", "/files?path=x&mode=999", b"").code == "bad_request"


def test_an_empty_file_and_odd_names(guest: Guest) -> None:
    for name in ("empty", "with space", "ümläut", "plus+%&?=#", os.fsdecode(b"raw\xff")):
        answer = guest.request("PUT", guest.path("/files", path=os.fsencode(name)), b"")  # type: ignore[arg-type]
        assert answer.status == 200
        assert guest.request("GET", guest.path("/files", path=os.fsencode(name))).body == b""  # type: ignore[arg-type]
    entries = guest.request("GET", "/files/list?path=.").json["entries"]
    assert {entry["name"] for entry in entries} == {
        *("empty", "with space", "ümläut", "plus+%&?=#", os.fsdecode(b"raw\xff"))
    }


def test_half_a_gibibyte_streams_both_ways_in_bounded_memory(guest: Guest) -> None:
    size = 512 << 20
    piece = os.urandom(1 << 20)
    guest.run("true")
    peak = 0
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.02):
            peak = max(peak, sum(memory_kib(pid) for pid in (guest.process.pid, *guest.runners())))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with guest.connect() as sock:
            sock.sendall(b"PUT /files?path=big HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size)
            digest = hashlib.sha256()
            for _ in range(size >> 20):
                sock.sendall(piece)
                digest.update(piece)
            assert answer_on(sock).json["size"] == size
        with guest.connect() as sock:
            guest.send(sock, "GET", "/files?path=big")
            head, begun = head_on(sock)
            assert int(head.headers["content-length"]) == size
            received = hashlib.sha256(begun)
            while data := sock.recv(1 << 20):
                received.update(data)
        assert received.digest() == digest.digest()
    finally:
        stop.set()
        watcher.join()
        (guest.workspace / "big").unlink(missing_ok=True)
    assert peak < 16 << 10


def test_more_than_the_limit_is_413_before_it_is_sent(guest: Guest) -> None:
    with guest.connect() as sock:
        sock.sendall(b"PUT /files?path=big HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % ((512 << 20) + 1))
        answer = answer_on(sock)
    assert (answer.status, answer.code) == (413, "too_large")
    assert list(guest.workspace.iterdir()) == []


def test_a_chunked_body_is_taken(guest: Guest) -> None:
    with guest.connect() as sock:
        sock.sendall(b"PUT /files?path=c HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nab")
        sock.sendall(b"cd\r\n3;x=y\r\nefg\r\n0\r\n\r\n")
        assert answer_on(sock).json["size"] == 7
    assert guest.read("c") == b"abcdefg"


def test_expect_continue_is_answered_only_when_the_body_is_wanted(guest: Guest) -> None:
    (guest.workspace / "folder").mkdir()
    head = b"PUT /files?path=%b HTTP/1.1\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"
    with guest.connect() as sock:
        sock.sendall(head % b"x")
        assert head_on(sock)[0].status == 100
        sock.sendall(b"abc")
        assert answer_on(sock).status == 200
    with guest.connect() as sock:
        sock.sendall(head % b"folder")
        assert answer_on(sock).code == "is_a_directory"


@pytest.mark.parametrize("how", ["cut", "bad chunk"])
def test_a_broken_upload_leaves_the_old_content_and_nothing_else(guest: Guest, how: str) -> None:
    put(guest, "f", b"old")
    with guest.connect() as sock:
        if how == "cut":
            sock.sendall(b"PUT /files?path=f HTTP/1.1\r\nContent-Length: 1000\r\n\r\nnew")
        else:
            sock.sendall(b"PUT /files?path=f HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nnewX\r\n")
            assert answer_on(sock).code == "bad_request"
    until(lambda: [path.name for path in guest.workspace.iterdir()] == ["f"], "tidied")
    assert guest.read("f") == b"old"


def test_a_reader_sees_the_old_content_or_the_new(guest: Guest) -> None:
    contents = {bytes([65 + number]) * 200_000 for number in range(5)}
    put(guest, "f", next(iter(contents)))
    seen: set[bytes] = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            seen.add((guest.workspace / "f").read_bytes())

    thread = threading.Thread(target=look)
    thread.start()
    for content in contents:
        put(guest, "f", content)
    stop.set()
    thread.join()
    assert seen <= contents


def test_ranges(guest: Guest) -> None:
    put(guest, "f", b"0123456789")
    for wanted, status, body in (
        ("bytes=2-4", 206, b"234"),
        ("bytes=7-", 206, b"789"),
        ("lines=1-2", 200, b"0123456789"),
    ):
        with guest.connect() as sock:
            sock.sendall(f"GET /files?path=f HTTP/1.1\r\nRange: {wanted}\r\n\r\n".encode())
            answer = answer_on(sock)
        assert (answer.status, answer.body) == (status, body)
    with guest.connect() as sock:
        sock.sendall(b"GET /files?path=f HTTP/1.1\r\nRange: bytes=10-\r\n\r\n")
        assert answer_on(sock).code == "bad_range"


def test_only_regular_files_are_opened_and_nothing_hangs(guest: Guest) -> None:
    os.mkfifo(guest.workspace / "fifo")
    (guest.workspace / "folder").mkdir()
    (guest.workspace / "loop").symlink_to("loop")
    for method in ("GET", "PUT"):
        assert refused(guest, method, "fifo") == (400, "not_a_file")
        assert refused(guest, method, "/dev/zero") == (400, "not_a_file")
        assert refused(guest, method, "folder") == (400, "is_a_directory")
        assert refused(guest, method, "") == (400, "bad_path")
        assert refused(guest, method, "a\0b") == (400, "bad_path")
        assert refused(guest, method, "x" * 5000) == (400, "bad_path")
        assert refused(guest, method, "x" * 300) == (400, "bad_path")
        assert refused(guest, method, "loop") == (400, "bad_path")
    assert refused(guest, "GET", "nothing") == (404, "not_found")
    assert refused(guest, "GET", "nothing", "/files/stat") == (404, "not_found")
    assert refused(guest, "DELETE", "nothing") == (404, "not_found")


def test_the_uid_of_the_sandbox_is_the_rule(isolated: Guest) -> None:
    (isolated.folder / "root").mkdir(mode=0o700)
    (isolated.folder / "root" / "f").write_text("x")
    (isolated.workspace / "link").symlink_to(isolated.folder / "root" / "f")
    assert refused(isolated, "GET", "/etc/shadow") == (403, "forbidden")
    assert refused(isolated, "GET", "link") == (403, "forbidden")
    assert refused(isolated, "PUT", "/etc/new", body=b"x") == (403, "forbidden")
    assert refused(isolated, "DELETE", "/etc/passwd") == (403, "forbidden")
    assert refused(isolated, "GET", str(isolated.folder / "root"), "/files/list") == (403, "forbidden")


def test_a_symlink_is_written_through_and_deleted_itself(guest: Guest) -> None:
    put(guest, "real", b"one")
    (guest.workspace / "link").symlink_to("real")
    put(guest, "link", b"two")
    assert guest.read("real") == b"two"
    assert guest.request("GET", "/files/stat?path=link").json["target"] == "real"
    assert guest.request("DELETE", "/files?path=link").status == 200
    assert guest.read("real") == b"two"


def test_stat_and_list_say_what_is_there(guest: Guest) -> None:
    put(guest, "b", b"12345", mode="0600")
    (guest.workspace / "a").mkdir()
    os.mkfifo(guest.workspace / "c")
    listed = guest.request("GET", "/files/list?path=.").json
    assert [(one["name"], one["type"]) for one in listed["entries"]] == [
        ("a", "directory"),
        ("b", "file"),
        ("c", "other"),
    ]
    assert listed["truncated"] is False
    described = guest.request("GET", "/files/stat?path=b").json
    assert (described["size"], described["mode"]) == (5, "0600")
    assert described["mtime"] == (guest.workspace / "b").stat().st_mtime
    assert refused(guest, "GET", "b", "/files/list") == (400, "not_a_directory")


def test_a_full_folder_is_listed_up_to_a_limit(guest: Guest) -> None:
    for number in range(10_050):
        (guest.workspace / f"{number:05}").touch()
    listed = guest.request("GET", "/files/list?path=.").json
    assert (len(listed["entries"]), listed["truncated"]) == (10_000, True)


def test_delete_takes_a_tree_only_when_told(guest: Guest) -> None:
    put(guest, "tree/a/b", b"x")
    (guest.workspace / "outside").mkdir()
    (guest.workspace / "outside" / "kept").touch()
    (guest.workspace / "tree" / "link").symlink_to(guest.workspace / "outside")
    assert refused(guest, "DELETE", "tree") == (409, "not_empty")
    assert guest.request("DELETE", "/files?path=tree&recursive=1").status == 200
    assert sorted(path.name for path in guest.workspace.iterdir()) == ["outside"]
    assert (guest.workspace / "outside" / "kept").exists()


def test_move_and_mkdir_make_parents(guest: Guest) -> None:
    put(guest, "f", b"x")
    moved = guest.request("POST", "/files/move", {"from": "f", "to": "new/place"})
    assert moved.status == 200
    assert guest.read("new/place") == b"x"
    assert refused(guest, "GET", "f") == (404, "not_found")
    missing = guest.request("POST", "/files/move", {"from": "f", "to": "g"})
    assert (missing.status, missing.code) == (404, "not_found")
    for _ in range(2):
        assert guest.request("POST", "/files/mkdir", {"path": "one/two"}).status == 200
    in_the_way = guest.request("POST", "/files/mkdir", {"path": "new/place"})
    assert in_the_way.code == "not_a_directory"


def test_move_across_file_systems_copies_a_file(guest: Guest) -> None:
    put(guest, "f", b"x" * 3_000_000, mode="0640")
    target = Path(f"/dev/shm/e2a-test-{os.getpid()}")
    try:
        assert guest.request("POST", "/files/move", {"from": "f", "to": str(target)}).status == 200
        assert target.read_bytes() == b"x" * 3_000_000
        assert target.stat().st_mode & 0o777 == 0o640
        assert list(guest.workspace.iterdir()) == []
    finally:
        target.unlink(missing_ok=True)


@pytest.fixture
def small_disk(guest: Guest) -> Iterator[Path]:
    place = guest.workspace / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_507_and_leaves_nothing_behind(guest: Guest, small_disk: Path) -> None:
    data = b"x" * (2 << 20)
    assert refused(guest, "PUT", "disk/f", body=data) == (507, "no_space")
    with guest.connect() as sock:  # Of unknown length, so that it is found out while writing.
        sock.sendall(b"PUT /files?path=disk/f HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        sock.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data))
        answer = answer_on(sock)
    assert (answer.status, answer.code) == (507, "no_space")
    assert list(small_disk.iterdir()) == []
    put(guest, "disk/f", b"fits")


def test_sixteen_file_requests_are_served_at_once_and_more_are_told(guest: Guest) -> None:
    head = b"PUT /files?path=f%d HTTP/1.1\r\nContent-Length: 3\r\n\r\n"
    socks = [guest.connect() for _ in range(17)]
    for number, sock in enumerate(socks):
        sock.sendall(head % number)
    until(lambda: guest.request("GET", "/files?path=f").status == 503, "busy")
    assert answer_on(socks[16]).code == "busy"
    assert guest.run("echo fine").stdout == b"fine\n"
    for sock in socks[:16]:
        sock.sendall(b"abc")
        assert answer_on(sock).status == 200
    for sock in socks:
        sock.close()


def test_files_are_seen_under_the_same_path_on_the_process_engine(guest: Guest) -> None:
    put(guest, "/workspace/sub/f", b"x")
    assert (guest.workspace / "sub" / "f").read_bytes() == b"x"

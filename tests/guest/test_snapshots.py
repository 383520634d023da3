"""All of a workspace and home, exactly, out and in again."""

from __future__ import annotations

import hashlib
import http.client
import os
import stat
from collections.abc import Callable
from pathlib import Path

from tests.guest.guest import Guest
from tests.guest.test_archives import link, packed


def saved(guest: Guest, limit: int = 0) -> tuple[int, dict[str, str], bytes]:
    """GET, by a client that knows chunks and fails on an answer that is cut."""
    connection = http.client.HTTPConnection("guest")
    connection.sock = guest.connect()
    connection.request("GET", f"/snapshot?limit={limit}")
    answer = connection.getresponse()
    return answer.status, dict(answer.headers), answer.read()


def tree(folder: Path) -> dict[bytes, tuple[object, ...]]:
    """Everything below a folder that a restore must bring back, and that two equal folders have alike."""
    root = os.fsencode(folder)
    found: dict[bytes, tuple[object, ...]] = {}
    links: dict[int, bytes] = {}
    for at, folders, files in os.walk(root):
        for name in sorted(folders + files):
            path = os.path.join(at, name)
            state = os.lstat(path)
            place = os.path.relpath(path, root)
            content: object = None
            if stat.S_ISLNK(state.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(state.st_mode):
                first = links.setdefault(state.st_ino, place) if state.st_nlink > 1 else place
                with open(path, "rb") as file:
                    content = (hashlib.file_digest(file, "sha256").digest(), first == place or state.st_nlink)
            found[place] = (state.st_mode, state.st_mtime_ns, content)
    return found


ODD = r"""
set -e
mkdir -p a/empty 'sp ace' a/deep/er
printf x > 'sp ace/new
line'; printf y > $'bad-\xff-utf8'; printf z > 'ünïcode'; printf q > "$(printf 'n%.0s' $(seq 250))"
printf one > a/hard; ln a/hard a/deep/hard2
ln -s /etc/passwd abs; ln -s a/deep dir; ln -s nowhere dangling; ln -s ../../../../etc up
head -c 300000 /dev/urandom > a/big; chmod 640 a/big; chmod 4755 a/hard
truncate -s 20M sparse; printf end >> sparse
touch -d '2001-02-03 04:05:06.123456789' a/big; touch -d '1999-01-01' a/empty
mkdir -p "$(printf 'd/%.0s' $(seq 80))"; : > "$(printf 'd/%.0s' $(seq 80))"leaf
chmod 1777 'sp ace'; chmod 500 a/deep; touch -d '2003-01-01 00:00:00.5' a/deep
mkfifo fifo; python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("sock")'
"""


def test_a_tree_comes_back_as_it_was(start_guest: Callable[..., Guest]) -> None:
    first, second = start_guest(), start_guest()
    assert first.run(ODD).exit["exit_code"] == 0
    status, headers, body = saved(first)
    assert status == 200
    assert (headers["X-E2A-Skipped"], int(headers["X-E2A-Files"])) == ("2", 9)
    second.run("mkdir -p old/deep; echo before > old/deep/x; echo before > 'sp ace'; chmod 0 old/deep")
    answer = second.request("PUT", "/snapshot", body)
    assert answer.json["files"] == 9, answer.json
    wanted = tree(first.workspace)
    for gone in (b"fifo", b"sock"):
        del wanted[gone]
    assert tree(second.workspace) == wanted
    assert os.stat(second.workspace / "sparse").st_blocks < 2000


def test_what_is_too_large_is_refused_before_a_byte_is_sent(guest: Guest) -> None:
    guest.run("head -c 200000 /dev/zero > x")
    assert saved(guest, 200_000)[0] == 200
    status, _, body = saved(guest, 199_999)
    assert (status, b"too_large" in body) == (413, True)


def test_nothing_is_made_outside(guest: Guest) -> None:
    outside = guest.workspace.parent / "outside"
    outside.mkdir()
    for body in (
        packed(("workspace/../../outside/x", b"x", {})),
        packed(link("workspace/l", str(outside)), ("workspace/l/x", b"x", {})),
        packed(("workspace/x", None, {"type": b"3"})),
        packed(link("workspace/y", "elsewhere/z", b"1")),
    ):
        assert guest.request("PUT", "/snapshot", body).code == "bad_archive"
    assert guest.request("PUT", "/snapshot", packed(("elsewhere/x", b"x", {}))).json["files"] == 0
    assert list(outside.iterdir()) == []
    assert guest.request("PUT", "/snapshot", b"x" * 2000).code == "bad_archive"


def test_one_that_is_cut_is_refused(start_guest: Callable[..., Guest]) -> None:
    first, second = start_guest(), start_guest()
    first.run("head -c 3000000 /dev/urandom > x")
    body = saved(first)[2]
    assert second.request("PUT", "/snapshot", body[: len(body) // 2]).code == "bad_archive"

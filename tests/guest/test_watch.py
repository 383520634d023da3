"""Watching a folder: every change once, with its path; nothing is lost silently, nothing outside is seen."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.guest.guest import Answer, Guest, head_on, until

pytestmark = pytest.mark.alone  # Isolated guests have one uid, of which each ends all processes.


class Watch:
    """An open watch; `next` is its next event."""

    def __init__(self, guest: Guest, path: str = ".", *, recursive: int = 1) -> None:
        self.sock = guest.connect()
        guest.send(self.sock, "GET", guest.path("/files/watch", path=path, recursive=recursive))
        self.head, self._begun = head_on(self.sock)
        assert self.head.status == 200, (self.head, self._begun)
        self.ready = self.next()

    def next(self) -> dict[str, Any]:
        while True:
            while b"\n" not in self._begun:
                piece = self.sock.recv(1 << 16)
                assert piece, "the watch was cut"
                self._begun += piece
            line, _, self._begun = self._begun.partition(b"\n")
            if line:
                event: dict[str, Any] = json.loads(line)
                return event

    def until(self, **wanted: Any) -> list[dict[str, Any]]:
        """All events up to one that has these fields."""
        seen = []
        while True:
            seen.append(self.next())
            if wanted.items() <= seen[-1].items():
                return seen


@contextlib.contextmanager
def watching(guest: Guest, path: str = ".", *, recursive: int = 1) -> Iterator[Watch]:
    watch = Watch(guest, path, recursive=recursive)
    try:
        yield watch
    finally:
        watch.sock.close()


def told(watch: Watch, root: Path, count: int) -> list[tuple[str, ...]]:
    found = []
    for _ in range(count):
        event = watch.next()
        names = [event["path"], *([event["from"]] if "from" in event else [])]
        found.append((event["type"], *(os.path.relpath(name, root) for name in names)))
    return found


def test_each_kind_of_change_is_told_once(isolated: Guest) -> None:
    root = isolated.workspace
    with watching(isolated) as watch:
        assert watch.ready == {"type": "ready", "path": str(root), "folders": 1}
        isolated.run("echo one > a")
        assert told(watch, root, 2) == [("created", "a"), ("modified", "a")]
        isolated.run("mv a b")
        assert told(watch, root, 1) == [("moved", "b", "a")]
        isolated.run("rm b")
        assert told(watch, root, 1) == [("deleted", "b")]
        isolated.request("PUT", "/files?path=c", b"whole")
        kinds = [event["type"] for event in watch.until(type="moved", path=f"{root}/c")]
        assert kinds[-1] == "moved"


def test_new_folders_are_watched_too_and_what_came_before_is_found(isolated: Guest) -> None:
    root = isolated.workspace
    (root / "old").mkdir()
    os.chown(root / "old", 10001, 10001)
    with watching(isolated) as watch:
        assert watch.ready["folders"] == 2
        isolated.run("mkdir -p x/y/z; echo 1 > x/y/z/f; touch old/g")
        seen = [event["path"] for event in watch.until(type="created", path=f"{root}/old/g")]
        for name in ("x", "x/y", "x/y/z", "x/y/z/f"):
            assert seen.count(f"{root}/{name}") >= 1, name
        isolated.run("echo 2 >> x/y/z/f")
        watch.until(type="modified", path=f"{root}/x/y/z/f")


def test_a_created_path_is_told_once_however_the_race_goes(isolated: Guest) -> None:
    root = isolated.workspace
    with watching(isolated) as watch:
        isolated.run("for i in $(seq 60); do mkdir -p d$i/e; : > d$i/e/f; : > d$i/g; done; : > last")
        created = [e["path"] for e in watch.until(type="created", path=f"{root}/last")]
        wanted = {f"{root}/d{i}{part}" for i in range(1, 61) for part in ("", "/e", "/e/f", "/g")}
        assert sorted(wanted | {f"{root}/last"}) == sorted(created)


def test_a_folder_that_moves_keeps_being_watched_under_its_new_name(isolated: Guest) -> None:
    root = isolated.workspace
    isolated.run("mkdir -p a/b in")
    with watching(isolated) as watch:
        isolated.run("mv a c; touch c/b/f")
        assert told(watch, root, 2) == [("moved", "c", "a"), ("created", "c/b/f")]
    with watching(isolated, "in") as watch:
        isolated.run("mv c in/c; touch in/c/b/g")
        seen = {event["path"] for event in watch.until(type="created", path=f"{root}/in/c/b/g")}
        assert f"{root}/in/c/b/f" in seen
        isolated.run("mv in/c out; touch in/end")
        assert watch.until(type="deleted")[-1]["path"] == f"{root}/in/c"
        isolated.run("touch out/b/unseen in/seen")
        assert told(watch, root, 1) == [("created", "in/seen")]


def test_without_recursive_only_the_folder_itself_is_watched(isolated: Guest) -> None:
    isolated.run("mkdir sub")
    root = isolated.workspace
    with watching(isolated, recursive=0) as watch:
        isolated.run("touch sub/hidden; mkdir new; touch new/hidden; touch seen")
        assert told(watch, root, 2) == [("created", "new"), ("created", "seen")]


def test_a_symlink_is_a_name_and_leads_nowhere(isolated: Guest) -> None:
    root = isolated.workspace
    isolated.run("mkdir inside beside; ln -s ../beside inside/before")
    with watching(isolated, "inside") as watch:
        assert watch.ready["folders"] == 1
        isolated.run("ln -s ../beside inside/after; touch beside/x inside/before/y inside/after/z inside/end")
        assert told(watch, root, 2) == [("created", "inside/after"), ("created", "inside/end")]


def test_an_overflow_is_told_and_the_tree_is_watched_anew(isolated: Guest) -> None:
    """The client does not read: 64 KiB are kept for it, the kernel's queue fills, and nothing grows."""
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    root = isolated.workspace
    with watching(isolated) as watch:
        watch.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        script = f"import os\nfor i in range({limit}):\n p='f%d' % i\n open(p,'w').close(); os.unlink(p)\n"
        isolated.run(["python3", "-c", script + "os.mkdir('born-in-the-flood')\n"])
        watch.until(type="overflow")
        isolated.run("touch born-in-the-flood/later")
        watch.until(type="created", path=f"{root}/born-in-the-flood/later")


def test_the_end_of_the_folder_ends_the_watch(isolated: Guest) -> None:
    isolated.run("mkdir gone moved")
    for command, name in (("rmdir gone", "gone"), ("mv moved else", "moved")):
        with watching(isolated, name) as watch:
            isolated.run(command)
            assert watch.until(type="end")[-1] == {"type": "end", "reason": "path_gone"}
            assert watch.sock.recv(1) == b""


def refused(guest: Guest, path: str) -> Answer:
    return guest.request("GET", guest.path("/files/watch", path=path, recursive=1))


def test_what_cannot_be_watched_is_refused(isolated: Guest) -> None:
    isolated.run("touch file; ln -s nowhere dangling; mkfifo pipe")
    for path, status, code in (
        ("file", 400, "not_a_directory"),
        ("pipe", 400, "not_a_directory"),
        ("missing", 404, "not_found"),
        ("dangling", 404, "not_found"),
        ("/root", 403, "forbidden"),
    ):
        answer = refused(isolated, path)
        assert (answer.status, answer.code) == (status, code), path


def test_watches_are_bounded_and_are_given_back(isolated: Guest) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(watching(isolated))
        answer = refused(isolated, ".")
        assert (answer.status, answer.code) == (409, "too_many_watches")
        assert isolated.request("GET", "/files/stat?path=.").status == 200

    def again() -> bool:
        with contextlib.suppress(AssertionError), watching(isolated):
            return True
        return False

    until(again, "a place for a new watch")


def test_too_many_folders_are_refused_at_the_start_and_end_a_watch_later(isolated: Guest) -> None:
    isolated.run("mkdir many")
    make = "import os\nfor i in range(4200): os.mkdir('many/%d' % i)\n"
    with watching(isolated, "many") as watch:
        isolated.run(["python3", "-c", make])
        assert watch.until(type="end")[-1]["reason"] == "too_many_folders"
    answer = refused(isolated, "many")
    assert (answer.status, answer.code) == (409, "too_many_folders")


def test_a_name_that_is_no_text_comes_as_its_bytes(isolated: Guest) -> None:
    root = isolated.workspace
    with watching(isolated) as watch:
        isolated.run("touch $'caf\\xe9' $'two\\nlines'")
        names = {os.fsencode(watch.next()["path"]) for _ in range(2)}
        assert names == {os.fsencode(root) + b"/caf\xe9", os.fsencode(root) + b"/two\nlines"}

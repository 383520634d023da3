"""Files as an attacker or an accident leaves them: refused with a code, never followed out, never waited for."""

from __future__ import annotations

import base64
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_from_bytes

import pytest

from sandboxes.models import Sandbox
from tests.fixtures import Api
from tests.guest.test_archives import unpacked
from tests.sandboxes.running import RunningNode, streamed
from tests.sandboxes.test_warm_and_cold import exec_in, made

pytestmark = pytest.mark.one_database


@pytest.fixture
def sandbox(make_node: Callable[..., RunningNode], as_alice: Api) -> str:
    make_node(pool=1).wait_parked(1)
    return str(made(as_alice)["vm_id"])


@pytest.fixture
def container(make_node: Callable[..., RunningNode], as_alice: Api) -> str:
    make_node(pool=1, engine="docker").wait_parked(1)
    return str(made(as_alice)["vm_id"])


class Files:
    """One sandbox's files, answers as (status, code)."""

    def __init__(self, api: Api, sandbox: str) -> None:
        self.api = api
        self.sandbox = sandbox
        self.url = f"/v1/sandboxes/{sandbox}/files"

    def run(self, command: str, **body: Any) -> str:
        done = exec_in(self.api, self.sandbox, command, **body)
        assert done["exit_code"] == 0, done
        return str(done["stdout"])

    def read(self, path: str, **kwargs: Any) -> bytes:
        answer = self.api.get(f"{self.url}?path={quote(path)}", **kwargs)
        assert answer.status_code in (200, 206), answer.content
        return streamed(answer)

    def get(self, path: str) -> tuple[int, str]:
        return told(self.api.get(f"{self.url}?path={quote(path)}"))

    def put(self, path: str, data: bytes = b"x") -> tuple[int, str]:
        return told(self.api.put(f"{self.url}?path={quote(path)}", data))

    def delete(self, path: str, more: str = "") -> tuple[int, str]:
        return told(self.api.delete(f"{self.url}?path={quote(path)}{more}"))

    def move(self, source: str, target: str) -> tuple[int, str]:
        return told(self.api.post(f"{self.url}/move", {"from": source, "to": target}))

    def mkdir(self, path: str) -> tuple[int, str]:
        return told(self.api.post(f"{self.url}/mkdir", {"path": path}))

    def list(self, path: str = ".") -> dict[str, Any]:
        answer: dict[str, Any] = self.api.get(f"{self.url}/list?path={quote(path)}").json()
        return answer


def told(answer: Any) -> tuple[int, str]:
    if answer.status_code >= 400:
        return answer.status_code, str(answer.json()["code"])
    if answer.streaming:
        streamed(answer)
    return answer.status_code, ""


@pytest.mark.docker
def test_no_path_leaves_the_sandbox_and_nothing_but_files_is_opened(container: str, as_alice: Api) -> None:
    files = Files(as_alice, container)
    slot = Sandbox.objects.get(public_id=container).slot
    assert slot is not None
    files.run(
        "ln -s /etc/passwd passwd; ln -s /proc/1/environ environ; ln -s /run/e2a run; ln -s / root;"
        "ln -s ../../../../.. up; mkfifo fifo; ln -s loop loop;"
        "python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"sock\")'"
    )
    inside = files.run("cat /etc/passwd").encode()
    for path in ("passwd", "/etc/passwd", "root/etc/passwd", "up/etc/passwd", "../../../etc/passwd"):
        assert files.read(path) == inside != Path("/etc/passwd").read_bytes(), path
    for path in ("environ", "/proc/1/environ", "/proc/1/mem", "/etc/shadow", "/root/x"):
        assert files.get(path) == (403, "forbidden"), path
    for path in ("passwd", "/etc/new", "run/guest/x", "/run/e2a/host/x", "/opt/e2a/guest/x"):
        assert files.put(path) == (403, "forbidden"), path
        assert files.delete(f"{path}/../../etc/hostname")[0] in (403, 404), path
    for path in ("fifo", "sock", "/dev/zero", "/dev/random", "run/guest/guest.sock"):
        assert files.get(path) == (400, "not_a_file"), path
        assert files.put(path) == (400, "not_a_file"), path
    assert files.get("loop") == (400, "bad_path")
    assert files.put("loop") == (400, "bad_path")
    # Whose is what was written: the sandbox user's, all of it.
    assert files.put("new/deep/file") == (200, "")
    assert files.mkdir("made/too")[0] == 201
    assert files.move("new/deep/file", "moved/there") == (200, "")
    uid = str(10000 + slot)
    owners = files.run("stat -c '%u:%g' new new/deep made made/too moved moved/there").split()
    assert owners == [f"{uid}:{uid}"] * 6
    # An archive takes links as links, and neither FIFO nor socket.
    members = unpacked(streamed(as_alice.get(f"/v1/sandboxes/{container}/archive?path=.")))
    assert {"fifo", "sock"} & members.keys() == set()
    assert (members["passwd"].issym(), members["passwd"].linkname) == (True, "/etc/passwd")


@pytest.mark.docker
def test_a_full_disk_keeps_the_old_content_and_leaves_nothing(container: str, as_alice: Api) -> None:
    files = Files(as_alice, container)
    old = b"old" * 100_000
    assert files.put("kept", old) == (200, "")
    files.run("fallocate -l $(( ($(stat -f -c %a .) - 512) * $(stat -f -c %S .) )) full", timeout_seconds=120)
    assert files.put("kept", b"new" * 3_000_000) == (507, "no_space")
    assert files.put("other/new", b"new" * 3_000_000) == (507, "no_space")
    assert files.read("kept") == old
    assert files.run("find . -name '.e2a*'") == ""
    files.run("rm full")
    assert files.put("kept", b"new" * 3_000_000) == (200, "")


def test_names_of_every_kind(sandbox: str, as_alice: Api) -> None:
    files = Files(as_alice, sandbox)
    longest, wide = "n" * 255, "\N{SNOWMAN}" * 85
    for name in (longest, wide, "two\nlines", " ", "-rf", "a?b#c%25", '"quoted\\', "\N{GRINNING FACE}"):
        assert files.put(name, name.encode()) == (200, ""), name
        assert files.read(name) == name.encode(), name
    assert files.put("n" * 256) == (400, "bad_path")
    assert files.put("\N{SNOWMAN}" * 86) == (400, "bad_path")
    names = [row["name"] for row in files.list()["entries"]]
    assert {longest, wide, "two\nlines", " ", "-rf"} <= set(names)
    assert not [name for name in names if name.startswith(".e2a")]
    answer = as_alice.get(f"{files.url}?path={quote('two' + chr(10) + 'lines')}")
    assert "\n" not in answer["Content-Disposition"]
    streamed(answer)


def test_a_name_that_is_not_utf8_is_shown_and_its_bytes_are_told(sandbox: str, as_alice: Api) -> None:
    files = Files(as_alice, sandbox)
    files.run("mkdir d; echo 1 > $'d/caf\\xe9'; ln -s $'\\xff' d/link; touch d/plain")
    rows = {row["name"]: row for row in files.list("d")["entries"]}
    assert rows["caf\ufffd"]["path"].endswith("d/caf\ufffd")
    assert base64.b64decode(rows["caf\ufffd"]["name_base64"]) == b"caf\xe9"
    assert rows["plain"]["name_base64"] is None
    assert as_alice.get(f"{files.url}/stat?path=d/link").json()["target"] == "\ufffd"
    # Asked for by its bytes in a URL, it is not mistaken for another name.
    answer = as_alice.get(f"{files.url}/stat?path=d/{quote_from_bytes(bytes([0x63, 0x61, 0x66, 0xE9]))}")
    assert answer.status_code in (400, 404)
    members = unpacked(streamed(as_alice.get(f"/v1/sandboxes/{sandbox}/archive?path=d")))
    assert {name.encode("utf-8", "surrogateescape") for name in members} == {b"caf\xe9", b"link", b"plain"}


def test_a_sparse_file_is_what_it_says(sandbox: str, as_alice: Api) -> None:
    files = Files(as_alice, sandbox)
    files.run("truncate -s 300M sparse; printf end >> sparse")
    assert as_alice.get(f"{files.url}/stat?path=sparse").json()["size"] == 300 * 1024 * 1024 + 3
    assert files.read("sparse", headers={"Range": "bytes=-5"}) == b"\0\0end"


def test_a_folder_of_20000_is_listed_page_by_page(sandbox: str, as_alice: Api) -> None:
    files = Files(as_alice, sandbox)
    files.run("mkdir many; cd many; seq -f '%05g' 0 19999 | xargs touch; touch $'z\\xff'")
    names: list[str] = []
    cursor: str | None = None
    pages = 0
    while pages == 0 or cursor is not None:
        more = f"&cursor={quote(cursor)}" if cursor else ""
        page = as_alice.get(f"{files.url}/list?path=many{more}").json()
        names += [row["name"] for row in page["entries"]]
        cursor = page["next_cursor"]
        pages += 1
    assert pages == 3
    assert names == [f"{number:05}" for number in range(20_000)] + ["z\ufffd"]
    refused = as_alice.get(f"{files.url}/list?path=many&cursor=!")
    assert (refused.status_code, refused.json()["code"]) == (400, "invalid_cursor")


def test_what_stands_in_the_way_is_said(sandbox: str, as_alice: Api) -> None:
    files = Files(as_alice, sandbox)
    files.run("mkdir -p full/x empty dir; echo a > a; echo b > b; echo c > full/c")
    assert files.move("a", "b") == (200, "")
    assert files.read("b") == b"a\n"
    assert files.move("full", "full/x/y") == (400, "bad_path")
    assert files.move("full", "full/new/y") == (400, "bad_path")
    assert [row["name"] for row in files.list("full")["entries"]] == ["c", "x"]
    assert files.move("dir", "full") == (409, "not_empty")
    assert files.move("dir", "b") == (400, "not_a_directory")
    assert files.move("b", "dir") == (400, "is_a_directory")
    assert files.move("b", "b") == (200, "")
    assert files.move("dir", "empty") == (200, "")
    assert files.mkdir("full")[0] == 201
    assert files.mkdir("b") == (400, "not_a_directory")
    assert files.mkdir("b/under") == (400, "not_a_directory")
    assert files.put("b/under") == (400, "not_a_directory")
    assert files.put("full") == (400, "is_a_directory")
    assert files.get("b/") == (200, "")  # As normalised; a client's slash is no other file.
    assert files.delete("full") == (409, "not_empty")
    assert files.delete("full", "&recursive=true") == (200, "")
    assert files.get("full/c") == (404, "not_found")
    assert files.delete("b", "&recursive=perhaps") == (400, "invalid")


def test_a_fifo_with_a_writer_is_not_read_either(sandbox: str, as_alice: Api) -> None:
    files = Files(as_alice, sandbox)
    files.run("mkfifo f; (timeout 20 sh -c 'echo secret > f' &) ; mkdir -p d; mkfifo d/f; echo x > d/x")
    assert files.get("f") == (400, "not_a_file")
    assert list(unpacked(streamed(as_alice.get(f"/v1/sandboxes/{sandbox}/archive?path=d")))) == ["x"]


def test_the_socket_of_a_server_inside_is_left_alone(sandbox: str, as_alice: Api, tmp_path: Path) -> None:
    files = Files(as_alice, sandbox)
    place = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place))
        assert files.get(str(place)) == (400, "not_a_file")
        assert files.put(str(place)) == (400, "not_a_file")
        assert as_alice.get(f"{files.url}/stat?path={place}").json()["type"] == "other"

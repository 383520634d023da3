"""Files of a sandbox: both ways, streamed, bounded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import async_to_sync

from accounts.models import User
from accounts.principal import Principal
from e2a.core.errors import E2AError
from sandboxes.upload import LARGEST_FILE_BYTES, file_put
from tests.fixtures import Api
from tests.sandboxes.running import RunningNode, streamed
from tests.sandboxes.test_warm_and_cold import exec_in, made

MIB = 1024 * 1024


@pytest.fixture
def files(make_node: Callable[..., RunningNode], as_alice: Api) -> str:
    make_node(pool=1).wait_parked(1)
    return f"/v1/sandboxes/{made(as_alice)['vm_id']}/files"


def test_a_file_is_written_listed_read_moved_and_deleted(as_alice: Api, files: str) -> None:
    assert as_alice.post(f"{files}/mkdir", {"path": "notes"}).status_code == 201
    written = as_alice.put(f"{files}?path=notes/a.txt&mode=0600", b"hello")
    assert (written.status_code, written.json()["size"]) == (200, 5)
    listed = as_alice.get(f"{files}/list?path=notes").json()
    assert [(row["name"], row["type"], row["size"], row["mode"]) for row in listed["entries"]] == [
        ("a.txt", "file", 5, "0600")
    ]
    answer = as_alice.get(f"{files}?path=notes/a.txt", headers={"Accept": "image/png"})
    assert streamed(answer) == b"hello"
    assert (answer["Content-Length"], answer["X-E2A-Mode"]) == ("5", "0600")
    assert answer["Content-Disposition"].startswith("attachment")
    assert as_alice.post(f"{files}/move", {"from": "notes/a.txt", "to": "b.txt"}).json() == {"path": "b.txt"}
    assert as_alice.get(f"{files}?path=notes/a.txt").status_code == 404
    assert as_alice.delete(f"{files}?path=b.txt").json() == {"path": "b.txt", "deleted": True}
    assert as_alice.delete(f"{files}?path=b.txt").status_code == 404


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("", 400, "bad_path"),
        ("?path=", 400, "bad_path"),
        ("?path=a%00b", 400, "bad_path"),
        ("?path=" + "x" * 5000, 400, "bad_path"),
        ("?path=missing", 404, "not_found"),
        ("?path=.", 400, "is_a_directory"),
    ],
)
def test_what_cannot_be_read_is_refused(
    as_alice: Api, files: str, query: str, status: int, code: str
) -> None:
    answer = as_alice.get(f"{files}{query}")
    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_a_bad_move_is_refused(as_alice: Api, files: str) -> None:
    assert as_alice.post(f"{files}/move", {"from": "a"}).status_code == 400
    assert (
        as_alice.post(f"{files}/move", {"from": "a", "to": "b", "by": "c"}).json()["code"] == "unknown_field"
    )
    assert as_alice.post(f"{files}/move", {"from": "a", "to": "b"}).status_code == 404


class Upload:
    """One request on `file_put`, as the body gate hands it on."""

    def __init__(self, user: User, path: str, *, query: str = "path=big", length: int | None = None) -> None:
        headers = [] if length is None else [(b"content-length", str(length).encode())]
        if length is None:
            headers.append((b"transfer-encoding", b"chunked"))
        self.scope: dict[str, Any] = {
            "type": "http",
            "method": "PUT",
            "path": path,
            "query_string": query.encode(),
            "headers": headers,
        }
        self.principal = Principal("account", user.tenant, user)
        self.taken = 0

    def put(self, piece: bytes, count: int, *, disconnects: bool = False) -> dict[str, Any]:
        async def receive() -> dict[str, Any]:
            self.taken += 1
            if disconnects and self.taken > count:
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": piece, "more_body": disconnects or self.taken < count}

        return async_to_sync(file_put)(self.scope, receive, self.principal)

    def refused(self, piece: bytes, count: int, **kwargs: Any) -> E2AError:
        with pytest.raises(E2AError) as caught:
            self.put(piece, count, **kwargs)
        return caught.value


def test_an_upload_goes_through_in_pieces(alice: User, as_alice: Api, files: str) -> None:
    piece = bytes(range(256)) * 1024
    for length in (None, 80 * len(piece)):
        answer = Upload(alice, files, length=length).put(piece, 80)
        assert answer["size"] == 80 * len(piece)
    digest = hashlib.sha256(streamed(as_alice.get(f"{files}?path=big"))).hexdigest()
    assert digest == hashlib.sha256(piece * 80).hexdigest()


def test_an_upload_that_says_it_is_too_large_is_not_read(alice: User, files: str) -> None:
    upload = Upload(alice, files, length=LARGEST_FILE_BYTES + 1)
    assert upload.refused(b"x", 1).status == 413
    assert upload.taken == 0


def test_an_upload_that_becomes_too_large_leaves_nothing(
    alice: User, as_alice: Api, files: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandboxes.upload.LARGEST_FILE_BYTES", 4 * MIB)
    upload = Upload(alice, files)
    assert upload.refused(b"x" * MIB, 100).status == 413
    assert upload.taken == 5
    assert as_alice.get(f"{files}?path=big").status_code == 404


def test_an_upload_whose_client_leaves_keeps_the_old_file(alice: User, as_alice: Api, files: str) -> None:
    as_alice.put(f"{files}?path=big", b"old")
    Upload(alice, files).refused(b"x" * MIB, 3, disconnects=True)
    assert streamed(as_alice.get(f"{files}?path=big")) == b"old"


def test_a_stranger_and_a_key_without_the_scope_cannot_upload(alice: User, mallory: User, files: str) -> None:
    assert Upload(mallory, files).refused(b"x", 1).status == 404
    upload = Upload(alice, files)
    upload.principal = Principal("key", alice.tenant, alice, "key_x", 1, frozenset({"sandboxes:read"}))
    assert (upload.refused(b"x", 1).status, upload.taken) == (403, 0)


def test_a_full_disk_is_the_callers_to_mend(
    as_alice: Api, files: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from e2a.core.errors import GuestError
    from sandboxes.guest_client import GuestClient

    def full(*args: Any, **kwargs: Any) -> None:
        raise GuestError("no space", code="no_space", guest_status=507)

    monkeypatch.setattr(GuestClient, "file_write", full)
    answer = as_alice.put(f"{files}?path=a", b"x")
    assert (answer.status_code, answer.json()["code"]) == (507, "no_space")


def test_a_link_inside_leads_nowhere_outside(as_alice: Api, files: str) -> None:
    sandbox = files.split("/")[3]
    exec_in(as_alice, sandbox, "ln -s missing dangling; mkfifo pipe")
    assert as_alice.get(f"{files}?path=dangling").status_code == 404
    assert as_alice.get(f"{files}?path=pipe").json()["code"] == "not_a_file"


def test_a_part_of_a_file_is_read(as_alice: Api, files: str) -> None:
    as_alice.put(f"{files}?path=a", b"0123456789")
    for asked, status, body, told in [
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=8-99", 206, b"89", "bytes 8-9/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=-30", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=0-1,4-5", 200, b"0123456789", None),
        ("lines=1-2", 200, b"0123456789", None),
    ]:
        answer = as_alice.get(f"{files}?path=a", headers={"Range": asked})
        assert (answer.status_code, streamed(answer), answer.get("Content-Range")) == (status, body, told)
        assert (answer["Content-Length"], answer["Accept-Ranges"]) == (str(len(body)), "bytes")
    for asked in ("bytes=10-", "bytes=-0"):
        beyond = as_alice.get(f"{files}?path=a", headers={"Range": asked})
        assert (beyond.status_code, beyond.json()["code"]) == (416, "bad_range")


def test_what_is_at_a_path_is_shown(as_alice: Api, files: str) -> None:
    as_alice.put(f"{files}?path=a&mode=0640", b"12345")
    sandbox = files.removeprefix("/v1/sandboxes/").removesuffix("/files")
    exec_in(as_alice, sandbox, "ln -s a b; mkfifo c")
    shown = {name: as_alice.get(f"{files}/stat?path={name}").json() for name in ("a", "b", "c", ".")}
    assert [shown[name]["type"] for name in shown] == ["file", "symlink", "other", "directory"]
    assert (shown["a"]["size"], shown["a"]["mode"], shown["a"]["target"]) == (5, "0640", None)
    assert shown["b"]["target"] == "a"
    assert as_alice.get(f"{files}/stat?path=missing").status_code == 404

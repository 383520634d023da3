"""Archives: streamed, and nothing is ever made outside the folder. Whose files they become is tested on Docker."""

from __future__ import annotations

import http.client
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guest.guest import Guest


def packed(*members: tuple[str, bytes | None, dict[str, object]], mode: str = "w") -> bytes:
    """A tar of (name, content, what else its header says)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content, more in members:
            info = tarfile.TarInfo(name)
            info.size = len(content or b"")
            for key, value in more.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content or b""))
    return out.getvalue()


def link(name: str, to: str, kind: bytes = tarfile.SYMTYPE) -> tuple[str, None, dict[str, object]]:
    return name, None, {"type": kind, "linkname": to}


def archive(guest: Guest, path: str) -> tuple[int, bytes]:
    """GET, by a client that knows chunks and fails on an answer that is cut."""
    connection = http.client.HTTPConnection("guest")
    connection.sock = guest.connect()
    connection.request("GET", guest.path("/archive", path=path))
    answer = connection.getresponse()
    assert answer.headers["Content-Type"] == "application/x-tar"
    return answer.status, answer.read()


def unpacked(body: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(body)) as tar:
        return {member.name: member for member in tar}


def test_a_folder_goes_out_and_in_again(guest: Guest) -> None:
    guest.run(
        "mkdir -p a/sub/empty; echo hello > a/sub/x; chmod 750 a/sub/x; ln -s /etc/passwd a/l; mkfifo a/f"
    )
    status, body = archive(guest, "a")
    assert status == 200
    found = unpacked(body)
    assert sorted(found) == ["l", "sub", "sub/empty", "sub/x"]
    assert (found["sub/x"].mode, found["l"].linkname, found["sub/x"].uid) == (0o750, "/etc/passwd", 0)
    answer = guest.request("PUT", "/archive?path=b/c", body)
    assert answer.json == {"path": f"{guest.workspace}/b/c", "files": 1, "size": 6}
    place = guest.workspace / "b/c"
    state = (place / "sub/x").stat()
    assert (state.st_uid, state.st_gid, state.st_mode & 0o7777) == (os.getuid(), os.getgid(), 0o750)
    assert ((place / "sub/x").read_text(), os.readlink(place / "l")) == ("hello\n", "/etc/passwd")


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_one_is_unpacked(guest: Guest, mode: str) -> None:
    body = packed(("a", b"x" * 100_000, {}), mode=mode)
    assert guest.request("PUT", "/archive?path=d", body).json["size"] == 100_000


def test_owners_and_special_bits_are_not_heeded(guest: Guest) -> None:
    body = packed(("a", b"x", {"uid": 4321, "gid": 4321, "uname": "daemon", "mode": 0o6755}))
    assert guest.request("PUT", "/archive?path=d", body).status == 200
    state = (guest.workspace / "d/a").stat()
    assert (state.st_uid, state.st_mode & 0o7777) == (os.getuid(), 0o755)


@pytest.mark.parametrize(
    "members",
    [
        [("../out", b"x", {})],
        [("a/../../out", b"x", {})],
        [link("l", ".."), ("l/out", b"x", {})],
        [link("l", "/tmp"), ("l/e2a-out", b"x", {})],
        [link("l", "../secret", tarfile.LNKTYPE)],
        [link("s", "../"), link("l", "s/secret", tarfile.LNKTYPE)],
        [("dev", None, {"type": tarfile.CHRTYPE})],
        [("fifo", None, {"type": tarfile.FIFOTYPE})],
        [("standing/out", b"x", {})],
        [("standing/deep", None, {"type": tarfile.DIRTYPE})],
        [(".", b"x", {})],
    ],
    ids=lambda members: "+".join(name for name, _, _ in members),
)
def test_nothing_leaves_the_folder(
    guest: Guest, members: list[tuple[str, bytes | None, dict[str, object]]]
) -> None:
    (guest.workspace / "secret").write_text("kept")
    (guest.workspace / "d").mkdir()
    (guest.workspace / "elsewhere").mkdir()
    (guest.workspace / "d/standing").symlink_to("../elsewhere")
    answer = guest.request("PUT", "/archive?path=d", packed(*members))
    assert (answer.status, answer.code) == (400, "bad_archive"), answer
    assert sorted(os.listdir(guest.workspace)) == ["d", "elsewhere", "secret"]
    assert os.listdir(guest.workspace / "elsewhere") == []
    assert (guest.workspace / "secret").stat().st_nlink == 1
    assert not Path("/tmp/e2a-out").exists()


def test_a_leading_slash_does_not_count_and_links_are_replaced(guest: Guest) -> None:
    (guest.workspace / "d").mkdir()
    (guest.workspace / "secret").write_text("kept")
    (guest.workspace / "d/a").symlink_to("../secret")
    answer = guest.request(
        "PUT", "/archive?path=d", packed(("/a", b"new", {}), link("h", "a", tarfile.LNKTYPE))
    )
    assert answer.status == 200, answer
    assert ((guest.workspace / "d/h").read_text(), (guest.workspace / "secret").read_text()) == (
        "new",
        "kept",
    )


def _cut(body: bytes) -> bytes:
    return body[: 512 + 100]


def _broken_header(body: bytes) -> bytes:
    return body[:1024] + b"\xff" * 512 + body[1536:]


@pytest.mark.parametrize(
    "change", [_cut, _broken_header, lambda body: b"no tar at all" * 100, lambda body: b""]
)
def test_what_is_no_whole_tar_is_said(guest: Guest, change: Callable[[bytes], bytes]) -> None:
    body = change(packed(("a", b"x" * 300, {}), ("b", b"y" * 300, {})))
    answer = guest.request("PUT", "/archive?path=d", body)
    assert (answer.status, answer.code) == (400, "bad_archive"), answer


def test_what_cannot_be_packed_is_said(guest: Guest) -> None:
    assert guest.request("GET", "/archive?path=missing").code == "not_found"
    os.mkfifo(guest.workspace / "f")
    assert guest.request("GET", "/archive?path=f").code == "not_a_file"
    with (guest.workspace / "sparse").open("wb") as file:
        file.truncate(600 << 20)
    answer = guest.request("GET", "/archive?path=.")
    assert (answer.status, answer.code) == (413, "too_large")


def test_one_file_is_packed_by_its_name(guest: Guest) -> None:
    (guest.workspace / "d").mkdir()
    (guest.workspace / "d/x").write_bytes(b"123")
    found = unpacked(archive(guest, "d/x")[1])
    assert [(name, member.size) for name, member in found.items()] == [("x", 3)]

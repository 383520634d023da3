"""The end of all output, kept where the host can read it after the guest's death."""

from __future__ import annotations

import os
from pathlib import Path

from sandboxes.engines.host_folders import SandboxFolder
from sandboxes.guest.tail import NAME, SIZE, Tail
from tests.guest.guest import Guest


class _Folder(SandboxFolder):
    def __init__(self, guest: Path) -> None:
        super().__init__(guest.parent)
        self.guest = guest


def printed(guest: Guest) -> str:
    return _Folder(guest.folder).printed()


def test_what_was_printed_last_is_there_after_the_guest_was_killed(guest: Guest) -> None:
    guest.run("seq 100000")
    guest.run("echo to stderr >&2")
    guest.process.kill()
    guest.process.wait(10)
    text = printed(guest)
    assert len(text) == SIZE
    assert text.endswith("99999\n100000\nto stderr\n")
    assert (guest.folder / NAME).stat().st_mode & 0o777 == 0o600


def test_it_is_redacted_however_slowly_a_secret_is_printed(guest: Guest) -> None:
    guest.configure(env={}, redact=[{"name": "TOKEN", "value": "s3cr3t-value"}])
    guest.run("printf s3cr; sleep 0.1; printf 3t-value; echo; echo after")
    assert printed(guest) == "[redacted:TOKEN]\nafter\n"


def test_a_ring_reads_the_same_wherever_it_was_cut(tmp_path: Path) -> None:
    tail, whole = Tail(str(tmp_path)), b""
    folder = _Folder(tmp_path)
    for number in range(400):
        piece = b"%d " % number * (number * 7 % 900)
        tail.append(piece)
        whole += piece
        assert folder.printed().encode() == whole[-SIZE:]
    tail.append(b"y" * (3 * SIZE + 5))
    assert folder.printed() == "y" * SIZE


def test_nothing_but_a_plain_file_is_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes((5).to_bytes(8, "big") + b"hosts")
    place = tmp_path / "guest"
    place.mkdir()
    (place / NAME).symlink_to(secret)
    assert _Folder(place).printed() == ""
    (place / NAME).unlink()
    os.mkfifo(place / NAME)
    assert _Folder(place).printed() == ""
    (place / NAME).unlink()
    (place / NAME).write_bytes(b"\xff" * 100)
    assert len(_Folder(place).printed()) <= 92

"""The gateway reaches a guest's socket and nothing else, whatever is planted in a sandbox's folder."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandboxes.gateway.address import socket_path
from sandboxes.gateway.guest_socket import NoGuest, NoSuchSandbox, PlantedSocket, guest_connect
from tests.gateway.doubles import SANDBOX


def _listener(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with socket_path(path) as name:
        listener.bind(name)
    listener.listen(8)
    listener.setblocking(False)
    return listener


def _was_called(listener: socket.socket) -> bool:
    try:
        connection, _ = listener.accept()
    except BlockingIOError:
        return False
    connection.close()
    return True


def _descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture
def host_socket(tmp_path: Path) -> Iterator[socket.socket]:
    """A socket of the host, such as Docker's."""
    with _listener(tmp_path / "docker.sock") as listener:
        yield listener


def test_the_guest_s_socket_is_reached(data_dir: Path, guest_folder: Path) -> None:
    with _listener(guest_folder / "guest.sock") as listener:
        before = _descriptors()
        connection = guest_connect(data_dir / "sandboxes", SANDBOX)
        assert len(_descriptors()) == len(before) + 1
        with connection:
            assert _was_called(listener)
        assert _descriptors() == before


def test_a_path_longer_than_a_socket_address_is_reached(tmp_path: Path) -> None:
    sandboxes = tmp_path / ("d" * 120) / "sandboxes"
    folder = sandboxes / SANDBOX / "guest"
    folder.mkdir(parents=True)
    with _listener(folder / "guest.sock") as listener, guest_connect(sandboxes, SANDBOX):
        assert _was_called(listener)


@pytest.mark.parametrize("planted", ["socket", "guest folder", "sandbox folder"])
def test_a_planted_link_leads_nowhere(
    planted: str, data_dir: Path, guest_folder: Path, host_socket: socket.socket, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere" / "guest"
    elsewhere.mkdir(parents=True)
    listener = host_socket
    if planted == "socket":
        (guest_folder / "guest.sock").symlink_to(tmp_path / "docker.sock")
    else:
        listener = _listener(elsewhere / "guest.sock")
        guest_folder.rmdir()
        if planted == "guest folder":
            guest_folder.symlink_to(elsewhere)
        else:
            guest_folder.parent.rmdir()
            guest_folder.parent.symlink_to(elsewhere.parent)
    before = _descriptors()
    with pytest.raises(PlantedSocket):
        guest_connect(data_dir / "sandboxes", SANDBOX)
    assert not _was_called(listener)
    assert _descriptors() == before
    if listener is not host_socket:
        listener.close()


@pytest.mark.parametrize("kind", ["file", "folder", "pipe", "link to itself"])
def test_what_is_no_socket_is_refused_without_waiting(kind: str, data_dir: Path, guest_folder: Path) -> None:
    path = guest_folder / "guest.sock"
    match kind:
        case "file":
            path.write_text("x")
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case _:
            path.symlink_to(path)
    before = _descriptors()
    with pytest.raises(PlantedSocket):
        guest_connect(data_dir / "sandboxes", SANDBOX)
    assert _descriptors() == before


@pytest.mark.parametrize(
    "sandbox_id",
    [
        "",
        ".",
        "..",
        "sbx_short",
        "sbx_../../../../etc/passwd",
        "SBX_" + "a" * 26,
        "sbx_" + "A" * 26,
        "sbx_" + "a" * 26 + "\n",
        "sbx_" + "a" * 26 + "\0",
        "sbx_" + "1" * 26,
        "sbx_" + "a" * 26 + "/guest",
        "sbx_" + "b" * 26,
    ],
)
def test_what_is_no_sandbox_of_this_host_does_not_exist(sandbox_id: str, data_dir: Path) -> None:
    before = _descriptors()
    with pytest.raises(NoSuchSandbox):
        guest_connect(data_dir / "sandboxes", sandbox_id)
    assert _descriptors() == before


def test_a_host_without_sandboxes_has_none(tmp_path: Path) -> None:
    with pytest.raises(NoSuchSandbox):
        guest_connect(tmp_path / "nowhere", SANDBOX)


def test_a_guest_that_does_not_listen_is_named_so(data_dir: Path, guest_folder: Path) -> None:
    with pytest.raises(NoGuest, match="has not started, or has ended"):
        guest_connect(data_dir / "sandboxes", SANDBOX)
    _listener(guest_folder / "guest.sock").close()
    before = _descriptors()
    with pytest.raises(NoGuest, match="refuses"):
        guest_connect(data_dir / "sandboxes", SANDBOX)
    assert _descriptors() == before

"""The way to a guest's socket that nothing planted inside a sandbox can bend.

The folder is written from inside the sandbox. A symlink there named `guest.sock` would lead a plain connect
to any socket of the host, Docker's own included. So each component is opened without following, the last one
as a bare `O_PATH` descriptor, checked to be a socket, and connected through `/proc/self/fd`: what was checked
is what is used.
"""

from __future__ import annotations

import os
import re
import socket
import stat
from pathlib import Path

SANDBOX_ID = re.compile(r"sbx_[a-z2-7]{16,64}")

GUEST_FOLDER = "guest"
GUEST_SOCKET = "guest.sock"

_FOLDER_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_SOCKET_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class NoSuchSandbox(Exception):
    """This host has no folder of that sandbox."""


class NoGuest(Exception):
    """The folder is there, a guest that listens is not. The text says what was found."""


class GuestBusy(Exception):
    """The guest's queue of connections is full; the same call may work in a moment."""


class PlantedSocket(NoGuest):
    """Something that is not a socket bears the socket's name, or a link bears a folder's."""


def _open_socket(sandboxes: Path, sandbox_id: str) -> int:
    """An O_PATH descriptor of the guest's socket; the caller closes it."""
    if not SANDBOX_ID.fullmatch(sandbox_id):
        raise NoSuchSandbox
    opened: list[int] = []
    try:
        try:
            # The path of the data folder is the operator's, links and all; what lies below is walked by hand.
            opened.append(os.open(sandboxes, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            opened.append(os.open(sandbox_id, _FOLDER_FLAGS, dir_fd=opened[-1]))
        except FileNotFoundError:
            raise NoSuchSandbox from None
        opened.append(os.open(GUEST_FOLDER, _FOLDER_FLAGS, dir_fd=opened[-1]))
        found = os.open(GUEST_SOCKET, _SOCKET_FLAGS, dir_fd=opened[-1])
    except FileNotFoundError:
        raise NoGuest("it has not started, or has ended") from None
    except NotADirectoryError:
        raise PlantedSocket("its folder is a link or a file") from None
    except OSError as error:
        raise NoGuest(f"its socket cannot be opened: {error.strerror}") from error
    finally:
        for descriptor in opened:
            os.close(descriptor)
    if not stat.S_ISSOCK(os.fstat(found).st_mode):
        os.close(found)
        raise PlantedSocket("guest.sock is not a socket")
    return found


def guest_connect(sandboxes: Path, sandbox_id: str) -> socket.socket:
    """A connected, non-blocking socket to the guest; nothing else stays open. Never waits.

    `sandboxes` is the folder that holds one folder a sandbox. Raises NoSuchSandbox, NoGuest (PlantedSocket),
    GuestBusy.
    """
    found = _open_socket(sandboxes, sandbox_id)
    connection = socket.socket(
        socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    )
    try:
        connection.connect(f"/proc/self/fd/{found}")
    except (
        BlockingIOError
    ):  # EAGAIN: a unix socket that cannot take us now does not queue the attempt (connect(2)).
        connection.close()
        raise GuestBusy from None
    except OSError as error:
        connection.close()
        raise NoGuest(f"its socket refuses: {error.strerror}") from error
    except BaseException:
        connection.close()
        raise
    finally:
        os.close(found)
    return connection

"""The socket that a gateway listens on.

One gateway an address, never a moment without an owner or with a wrong mode.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator

from sandboxes.gateway.address import Address, TcpAddress, UnixAddress, socket_path

BACKLOG = 1024


class AddressTaken(Exception):
    """Another gateway serves this address."""


@contextlib.contextmanager
def listening_socket(address: Address) -> Iterator[socket.socket]:
    """A listening, non-blocking socket. Raises AddressTaken, or OSError when the address cannot be had.

    A unix socket is for our user alone (0600), replaces one that a killed gateway left, and is removed at the
    end.
    """
    if isinstance(address, TcpAddress):
        with _tcp(address) as listener:
            yield listener
    else:
        with _unix(address) as listener:
            yield listener


def _tcp(address: TcpAddress) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        listener = socket.create_server((address.host, address.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise AddressTaken(f"cannot listen on {address}: {error.strerror}") from error
    listener.setblocking(False)
    return listener


@contextlib.contextmanager
def _unix(address: UnixAddress) -> Iterator[socket.socket]:
    path = address.path
    path.parent.mkdir(parents=True, exist_ok=True)
    # The lock says who serves, not the socket: one that a killed process left looks like any other.
    lock = os.open(
        path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
    )
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AddressTaken(f"another gateway serves {address}") from None
        # Bound under another name and then moved, it is never there with a wider mode, nor before it listens.
        draft = path.with_name(f".{path.name}.new")
        draft.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            with socket_path(draft) as name:
                before = os.umask(0o177)
                try:
                    listener.bind(name)
                finally:
                    os.umask(before)
            listener.listen(BACKLOG)
            listener.setblocking(False)
            draft.rename(path)
            try:
                yield listener
            finally:
                path.unlink(missing_ok=True)
    finally:
        os.close(lock)

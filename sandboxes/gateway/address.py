"""Addresses of gateways: `unix:/path/to.sock` or `tcp:host:port` (`tcp:[::1]:8700`)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# sizeof(sockaddr_un.sun_path) is 108 on Linux, with its closing NUL (unix(7)).
_LONGEST_SOCKET_PATH = 107


@dataclass(frozen=True, slots=True)
class UnixAddress:
    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"


Address = UnixAddress | TcpAddress


def address_parse(text: str) -> Address:
    """Read an address. Raises ValueError that repeats the text when it is neither form."""
    kind, _, rest = text.partition(":")
    if kind == "unix" and rest.startswith("/") and "\0" not in rest:
        return UnixAddress(Path(rest))
    if kind == "tcp":
        host, _, port = rest.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if host and port.isascii() and port.isdigit() and int(port) <= 65535:
            return TcpAddress(host, int(port))
    raise ValueError(f"{text!r} is neither unix:/absolute/path nor tcp:host:port")


@contextlib.contextmanager
def socket_path(path: Path) -> Iterator[str]:
    """A name of `path` that fits into a socket address, good until the block ends.

    A longer path is named through a descriptor of its folder (`/proc/self/fd/7/gateway.sock`); raises OSError
    when that folder does not exist.
    """
    if len(os.fsencode(path)) <= _LONGEST_SOCKET_PATH:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)

"""What a caller asks to be run, checked."""

import binascii

from . import wire

NAME_LIMIT = 64
LOG_BYTES = 1 << 20
LOG_BYTES_RANGE = (4096, 8 << 20)
SCRIPT_BYTES = 100 * 1024
"""One argument may have 128 KiB; a longer command is handed to the shell as a file."""
ENV_BYTES = 1 << 20

_FIELDS = frozenset(
    (
        "argv",
        "command",
        "cwd",
        "env",
        "id",
        "keep_stdin_open",
        "kill_on_disconnect",
        "log_bytes",
        "on_full",
        "pty",
        "stdin",
        "timeout_seconds",
    )
)
_ID = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


class Spec:
    """A checked request to start a process. `folder` may be relative to the workspace; empty is the
    workspace.
    """

    __slots__ = (
        "argv",
        "env",
        "folder",
        "id",
        "keep_stdin_open",
        "kill_on_disconnect",
        "log_bytes",
        "lossless",
        "script",
        "stdin",
        "terminal",
        "timeout",
    )

    def __init__(self, body: dict[str, object]) -> None:
        unknown = body.keys() - _FIELDS
        if unknown:
            raise wrong(f"unknown field {sorted(unknown)[0]!r}")
        self.id = body.get("id")
        if not (isinstance(self.id, str) and 1 <= len(self.id) <= NAME_LIMIT and _ID.issuperset(self.id)):
            raise wrong("id is 1 to 64 of a-z A-Z 0-9 _ -")
        self.script: bytes | None = None
        self.argv = self._arguments(body.get("command"), body.get("argv"))
        self.folder = encoded("cwd", body.get("cwd") or "")
        self.env = environment(body.get("env"))
        self.stdin = _base64(body.get("stdin"))
        self.keep_stdin_open = _flag(body, "keep_stdin_open")
        self.kill_on_disconnect = _flag(body, "kill_on_disconnect")
        self.timeout = seconds("timeout_seconds", body.get("timeout_seconds"))
        self.terminal = None if body.get("pty") is None else size_of(body["pty"])
        on_full = body.get("on_full", "drop")
        if on_full not in ("block", "drop"):
            raise wrong("on_full is block or drop")
        self.lossless = on_full == "block"
        log_bytes = body.get("log_bytes")
        self.log_bytes = LOG_BYTES
        if log_bytes is not None:
            low, high = LOG_BYTES_RANGE
            if type(log_bytes) is not int or not low <= log_bytes <= high:
                raise wrong(f"log_bytes is {low} to {high}")
            self.log_bytes = log_bytes

    def _arguments(self, command: object, argv: object) -> list[bytes]:
        if (command is None) == (argv is None):
            raise wrong("give either command or argv")
        if command is None:
            if not isinstance(argv, list) or not argv:
                raise wrong("argv is a list of at least one string")
            arguments = [encoded("argv", item) for item in argv]
            if not arguments[0]:
                raise wrong("argv names no program")
            return arguments
        text = encoded("command", command)
        if len(text) <= SCRIPT_BYTES:
            return [b"/bin/bash", b"-c", text]
        self.script = text
        return [b"/bin/bash"]


def wrong(detail: str) -> wire.Refused:
    return wire.Refused(400, "bad_request", detail)


def encoded(name: str, value: object) -> bytes:
    """Return a string as the kernel takes it; raises Refused."""
    if not isinstance(value, str) or "\0" in value:
        raise wrong(f"{name} is a string without NUL")
    try:
        return value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise wrong(f"{name} is not valid Unicode") from None


def environment(value: object) -> dict[bytes, bytes]:
    """Check an environment; None is empty."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise wrong("env is an object")
    checked: dict[bytes, bytes] = {}
    size = 0
    for name, text in value.items():
        key = encoded("a name in env", name)
        if not key or b"=" in key:
            raise wrong("a name in env is empty or has an equals sign")
        checked[key] = encoded(f"env {name!r}", text)
        size += len(key) + len(checked[key]) + 2
    if size > ENV_BYTES:
        raise wire.Refused(413, "environment_too_large", f"the environment has at most {ENV_BYTES} bytes")
    return checked


def seconds(name: str, value: object) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 < value < 1e9:  # type: ignore[operator]
        raise wrong(f"{name} is a positive number of seconds")
    return float(value)  # type: ignore[arg-type]


def size_of(value: object) -> tuple[int, int]:
    """Return (cols, rows) of a terminal."""
    if not isinstance(value, dict) or value.keys() - {"cols", "rows"}:
        raise wrong("pty is {cols, rows}")
    sizes = (value.get("cols", 80), value.get("rows", 24))
    for number in sizes:
        if type(number) is not int or not 1 <= number <= 1000:
            raise wrong("cols and rows are 1 to 1000")
    return sizes


def _flag(body: dict[str, object], name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise wrong(f"{name} is true or false")
    return value


def _base64(value: object) -> bytes:
    if value is None:
        return b""
    if not isinstance(value, str) or not value.isascii():
        raise wrong("stdin is base64")
    try:
        return binascii.a2b_base64(value, strict_mode=True) if value else b""
    except binascii.Error:
        raise wrong("stdin is base64") from None

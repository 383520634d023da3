"""What a path in a request may look like. Where it leads is the guest's to decide, as the sandbox's own
user."""

from __future__ import annotations

import base64
import re

from e2a.core.errors import ValidationFailed

LONGEST_PATH_BYTES = 4095
LONGEST_NAME_BYTES = 255
MODE = re.compile(r"0?[0-7]{3}")


def path_shown(path: str) -> str:
    """A path or name of a sandbox as text: U+FFFD for each byte that is no UTF-8 (a lone surrogate in `path`)."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def path_base64(path: str) -> str | None:
    """The bytes of one that is not UTF-8; `None` where the text says all."""
    raw = path.encode("utf-8", "surrogateescape")
    try:
        raw.decode()
    except UnicodeDecodeError:
        return base64.b64encode(raw).decode()
    return None


def name_cursor(name: str) -> str:
    """An opaque text for a file's name, which need not be UTF-8."""
    return base64.urlsafe_b64encode(name.encode("utf-8", "surrogateescape")).decode()


def cursor_name(cursor: str) -> str:
    """Undo `name_cursor`. Raises `ValidationFailed` (`invalid_cursor`)."""
    try:
        name = base64.b64decode(cursor, altchars=b"-_", validate=True).decode("utf-8", "surrogateescape")
    except ValueError:
        name = ""
    if not name or "\0" in name or len(name) > LONGEST_NAME_BYTES:
        raise ValidationFailed.of("cursor", "invalid_cursor", "cursor is not one of ours.")
    return name


def path_check(path: str) -> str:
    """The path itself. Raises `ValidationFailed` (`bad_path`) for an empty, overlong or impossible one."""
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        raise ValidationFailed.of("path", "bad_path", "path is not valid UTF-8.") from None
    if not path or "\0" in path or size > LONGEST_PATH_BYTES:
        raise ValidationFailed.of(
            "path", "bad_path", f"path has 1 to {LONGEST_PATH_BYTES} bytes, none of them zero."
        )
    return path

"""What a terminal's client may say: in the address, and in text frames. No I/O."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qs

from e2a.core.parsers import strict_json
from sandboxes.socket_access import BAD_FRAMES, AttachRefused

LARGEST_SIDE: Final = 1000
MODES: Final = ("auto", "write", "view")
FIELDS: Final[dict[str, frozenset[str]]] = {
    "auth": frozenset({"token"}),
    "resize": frozenset({"cols", "rows"}),
    "take": frozenset(),
    "ping": frozenset(),
}

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SHELL_TOKEN = re.compile(r"[A-Za-z0-9._-]{1,80}")


@dataclass(frozen=True, slots=True)
class Opening:
    """The address's query. `shell` and `after`: what the client has seen of which shell."""

    token: str | None
    after: int
    shell: str | None
    cols: int
    rows: int
    mode: str
    client: str


def opening_parse(query_string: bytes, headers: Mapping[str, str]) -> Opening:
    """Raises `AttachRefused` (4400) for what no client of ours sends."""
    query = {name: values[-1] for name, values in parse_qs(query_string.decode("latin-1")).items()}
    token = query.get("token")
    bearer = headers.get("authorization", "")
    if token is None and bearer.lower().startswith("bearer "):
        token = bearer[7:].strip()
    opening = Opening(
        token=token,
        after=_number(query, "after", 0),
        shell=query.get("shell"),
        cols=_number(query, "cols", 80),
        rows=_number(query, "rows", 24),
        mode=query.get("mode", "auto"),
        client=query.get("client") or secrets.token_hex(8),
    )
    if not _is_size(opening.cols, opening.rows):
        raise AttachRefused(BAD_FRAMES, f"`cols` and `rows` are 1 to {LARGEST_SIDE}.")
    if opening.mode not in MODES:
        raise AttachRefused(BAD_FRAMES, f"`mode` is one of {', '.join(MODES)}.")
    if _NAME.fullmatch(opening.client) is None:
        raise AttachRefused(BAD_FRAMES, "`client` is 1 to 64 letters, digits, `-` and `_`.")
    if opening.shell is not None and _SHELL_TOKEN.fullmatch(opening.shell) is None:
        raise AttachRefused(BAD_FRAMES, "`shell` is what `ready` said.")
    return opening


def frame_parse(text: str) -> dict[str, Any] | None:
    """The frame that `text` is, None for what is none of ours."""
    try:
        frame = strict_json(text.encode())
    except ValueError:
        return None
    if not isinstance(frame, dict) or not isinstance(kind := frame.get("type"), str):
        return None
    if kind not in FIELDS or frame.keys() - {"type"} != FIELDS[kind]:
        return None
    if kind == "resize" and not _is_size(frame["cols"], frame["rows"]):
        return None
    if kind == "auth" and not isinstance(frame["token"], str):
        return None
    return frame


def _number(query: Mapping[str, str], name: str, default: int) -> int:
    raw = query.get(name)
    if raw is None:
        return default
    if not (raw.isascii() and raw.isdigit() and len(raw) <= 18):
        raise AttachRefused(BAD_FRAMES, f"`{name}` is a whole number.")
    return int(raw)


def _is_size(cols: object, rows: object) -> bool:
    return all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in (cols, rows))

"""`text_editor_20250728`: view, create, str_replace and insert, on files of the sandbox through its guest."""

from __future__ import annotations

from typing import Any, Final

from e2a.core.errors import GuestError
from sandboxes.guest_client import GuestClient
from sessions_app.tools.base import ToolAnswer

FILE_LIMIT: Final = 1024 * 1024
"""Bytes of a file that this tool edits; larger ones are for bash."""
VIEW_LIMIT: Final = 60_000


class _Refused(Exception):
    pass


def run_editor(client: GuestClient, arguments: dict[str, Any], *, is_resumed: bool) -> ToolAnswer:
    """One editor call. `is_resumed`: an earlier attempt may have made the change already; then it counts as made.

    Bad input and file errors are answers to the model. Raises `GuestUnreachable`.
    """
    try:
        return _run(client, arguments, is_resumed)
    except _Refused as refusal:
        return ToolAnswer(str(refusal), is_error=True, shown=f"{refusal}\n")
    except GuestError as error:
        return ToolAnswer(f"{error.code}: {error.detail}", is_error=True, shown=f"{error.detail}\n")


def _run(client: GuestClient, arguments: dict[str, Any], is_resumed: bool) -> ToolAnswer:
    command = arguments.get("command")
    path = _text(arguments, "path")
    match command:
        case "view":
            return _view(client, path, arguments.get("view_range"))
        case "create":
            client.file_write(path, _text(arguments, "file_text").encode())
            return ToolAnswer(f"File created successfully at: {path}", shown=f"created {path}\n")
        case "str_replace":
            return _replace(
                client, path, _text(arguments, "old_str"), str(arguments.get("new_str") or ""), is_resumed
            )
        case "insert":
            text = arguments.get("insert_text", arguments.get("new_str"))
            return _insert(client, path, arguments.get("insert_line"), text, is_resumed)
        case _:
            raise _Refused("`command` is one of view, create, str_replace, insert.")


def _text(arguments: dict[str, Any], name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str):
        raise _Refused(f"`{name}` is missing.")
    return value


def _read(client: GuestClient, path: str) -> str:
    with client.file_read(path) as stream:
        if stream.size is not None and stream.size > FILE_LIMIT:
            raise _Refused(f"{path} is over 1 MiB; use bash for it.")
        data = b""
        for piece in stream:
            data += piece
            if len(data) > FILE_LIMIT:
                raise _Refused(f"{path} is over 1 MiB; use bash for it.")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise _Refused(f"{path} is not a text file.") from None


def _view(client: GuestClient, path: str, view_range: Any) -> ToolAnswer:
    if client.file_stat(path).type == "directory":
        entries = sorted(client.file_list(path), key=lambda entry: entry.name)
        listing = "\n".join(e.name + ("/" if e.type == "directory" else "") for e in entries)
        return ToolAnswer(listing or "(empty folder)", shown=f"listed {path}\n")
    lines = _read(client, path).split("\n")
    first, last = 1, len(lines)
    if view_range is not None:
        if not (
            isinstance(view_range, list) and len(view_range) == 2 and all(type(n) is int for n in view_range)
        ):
            raise _Refused("`view_range` is two line numbers.")
        first, last = view_range[0], len(lines) if view_range[1] == -1 else view_range[1]
        if not 1 <= first <= len(lines) or last < first:
            raise _Refused(f"`view_range` must lie within 1 and {len(lines)}.")
    numbered = "\n".join(f"{n:6}\t{line}" for n, line in enumerate(lines[first - 1 : last], first))
    cut = len(numbered) > VIEW_LIMIT
    return ToolAnswer(
        numbered[:VIEW_LIMIT] + ("\n[cut]" if cut else ""), truncated=cut, shown=f"viewed {path}\n"
    )


def _replace(client: GuestClient, path: str, old: str, new: str, is_resumed: bool) -> ToolAnswer:
    content = _read(client, path)
    count = content.count(old) if old else 0
    if count == 0 and is_resumed and new and new in content:
        return ToolAnswer(f"The file {path} has been edited.", shown=f"edited {path}\n")
    if count == 0:
        raise _Refused("No match found for replacement. Please check your text and try again.")
    if count > 1:
        raise _Refused(
            f"Found {count} matches for replacement text. Please provide more context to make a unique match."
        )
    client.file_write(path, content.replace(old, new, 1).encode())
    return ToolAnswer(f"The file {path} has been edited.", shown=f"edited {path}\n")


def _insert(client: GuestClient, path: str, line: Any, text: Any, is_resumed: bool) -> ToolAnswer:
    if type(line) is not int or not isinstance(text, str):
        raise _Refused("`insert_line` is a line number and `insert_text` a text.")
    lines = _read(client, path).split("\n")
    if not 0 <= line <= len(lines):
        raise _Refused(f"`insert_line` must lie within 0 and {len(lines)}.")
    added = text.removesuffix("\n").split("\n")
    if not (is_resumed and lines[line : line + len(added)] == added):
        client.file_write(path, "\n".join([*lines[:line], *added, *lines[line:]]).encode())
    return ToolAnswer(f"The file {path} has been edited.", shown=f"edited {path}\n")

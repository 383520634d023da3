"""The stored frames, typed: the only things that enter the event log (CONTRACT 6)."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from e2a.core.clock import rfc3339

Source = Literal["assistant", "tool"]
Retry = Literal["retrying", "exhausted", "terminal"]

TEXT_TYPES: Final = frozenset({"stdout", "stderr"})
MAX_TEXT: Final = 64 * 1024
"""Bytes of text in one frame (SECURITY 5.14)."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame before it has its seq. `task` is the task's primary key; `private` never leaves the database."""

    type: str
    data: dict[str, Any] = field(default_factory=dict)
    task: int | None = None
    private: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class StoredFrame:
    """One frame as it was stored: what every reader gets."""

    seq: int
    type: str
    ts: dt.datetime
    task_id: str | None
    data: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The frame as clients see it."""
        body: dict[str, Any] = {"type": self.type, "seq": self.seq, "ts": rfc3339(self.ts)}
        if self.task_id is not None:
            body["task_id"] = self.task_id
        return body | self.data


def status(status: str, *, stop_reason: str = "", end_reason: str = "", detail: str = "") -> Frame:
    """The session's status changed."""
    data: dict[str, Any] = {"status": status}
    if stop_reason:
        data["stop_reason"] = stop_reason
    if end_reason:
        data["end_reason"] = end_reason
    if detail:
        data["detail"] = detail
    return Frame("status", data)


def task_queued(task: int, prompt: str, *, client_id: str | None) -> Frame:
    data: dict[str, Any] = {"prompt": prompt}
    if client_id:
        data["id"] = client_id
    return Frame("task_queued", data, task)


def task_started(task: int, prompt: str, *, attempt: int) -> Frame:
    return Frame("task_started", {"prompt": prompt, "attempt": attempt}, task)


def text(
    stream: Literal["stdout", "stderr"],
    data: str,
    *,
    source: Source,
    task: int,
    tool_use_id: str | None = None,
    offset: int | None = None,
) -> Frame:
    """Everything a person would read. `offset` is where the command's output goes on after this text, in bytes."""
    body: dict[str, Any] = {"data": data, "source": source}
    if tool_use_id is not None:
        body["tool_use_id"] = tool_use_id
    return Frame(stream, body, task, None if offset is None else {"offset": offset})


def tool_use(
    task: int, *, tool_use_id: str, name: str, tool_input: Any, process_id: str | None = None
) -> Frame:
    return Frame(
        "tool_use",
        {"tool_use_id": tool_use_id, "name": name, "input": tool_input},
        task,
        None if process_id is None else {"process_id": process_id},
    )


def tool_result(
    task: int,
    *,
    tool_use_id: str,
    content: Any,
    is_error: bool,
    exit_code: int | None = None,
    truncated: bool = False,
) -> Frame:
    """A tool's answer. `content` is what the model is told; clients have seen the output as text already."""
    data: dict[str, Any] = {"tool_use_id": tool_use_id, "is_error": is_error, "truncated": truncated}
    if exit_code is not None:
        data["exit_code"] = exit_code
    return Frame("tool_result", data, task, {"content": content})


def usage(task: int | None, spent: dict[str, Any], *, message: Any = None, stop_reason: str = "") -> Frame:
    """After each model call. `message` is the model's answer verbatim, from which our own loop rebuilds the
    conversation; None for the call of a program, which remembers by itself."""
    private = None if message is None else {"message": message, "stop_reason": stop_reason}
    return Frame("usage", spent, task, private)


def secrets_updated(*, bundle: str, version: int, keys: list[str]) -> Frame:
    return Frame("secrets_updated", {"bundle": bundle, "version": version, "keys": keys})


def restarted(task: int, *, discard_after: int) -> Frame:
    """What the task wrote after `discard_after` is void; it goes on from there."""
    return Frame("restarted", {"discard_after": discard_after}, task)


def error(*, code: str, detail: str, retry: Retry, task: int | None = None) -> Frame:
    return Frame("error", {"code": code, "detail": detail, "retry": retry}, task)


def exit_frame(task: int, *, exit_code: int, signal: str | None = None, reason: str | None = None) -> Frame:
    """The last frame of a task: exactly one."""
    data: dict[str, Any] = {"exit_code": exit_code}
    if signal:
        data["signal"] = signal
    if reason:
        data["reason"] = reason
    return Frame("exit", data, task)

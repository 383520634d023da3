"""What a tool answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ToolAnswer:
    """`content` is what the model is told. `shown` is text for people that no command printed already."""

    content: str
    is_error: bool = False
    exit_code: int | None = None
    truncated: bool = False
    shown: str = ""

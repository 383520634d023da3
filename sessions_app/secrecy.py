"""A session's secret values, taken out of what a model says and of what a tool shows to it (SECURITY 4.12).

Output of commands is redacted in the guest. Here it is the rest: an endpoint that echoes the key it was sent, a file
that the editor reads, a token that somebody put into a prompt.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import Any

from sandboxes.guest.redaction import Patterns
from secrets_vault.services import values_read
from sessions_app.llm.base import Block

MODEL_KEY = "LLM_API_KEY"


@dataclass(frozen=True, slots=True)
class SessionSecrets:
    """What to take out: `every` value of the session's bundles, or the model `key` alone."""

    every: Patterns
    key: Patterns

    @classmethod
    def of(cls, holder: str) -> SessionSecrets:
        """The values as they are now. Two or three queries."""
        values = {
            name: value.text.reveal().encode()
            for name, value in values_read(purpose="redaction", holder=holder).items()
            if not value.is_setting
        }
        return cls(
            Patterns(values.items()),
            Patterns((name, value) for name, value in values.items() if name == MODEL_KEY),
        )

    def text(self, text: str) -> str:
        """A whole text without any of them."""
        return str(redacted(text, self.every))

    def to_store(self, content: list[Block]) -> list[Block]:
        """A model's message as the log keeps it. Thoughts are signed: one that would change is left out."""
        return _message(content, self.every, self.every)

    def to_run(self, content: list[Block]) -> list[Block]:
        """The message as the turn goes on with it. What a tool is given stays as it was said, since a value that
        somebody told the model must work there; the model key does not, since it never enters a sandbox."""
        return _message(content, self.every, self.key)


class SpokenText:
    """A stream of text, redacted as it flows: only what may still become a secret value is held back."""

    def __init__(self, secrets: SessionSecrets) -> None:
        self._patterns = secrets.every
        self._held = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def holds(self) -> bool:
        """Whether something is held back."""
        return bool(self._held)

    def feed(self, text: str) -> str:
        out, self._held = self._patterns.split(self._held + text.encode(), final=False)
        return self._decoder.decode(out)

    def end(self) -> str:
        """What was held back: the text is over."""
        out, self._held = self._patterns.split(self._held, final=True)
        return self._decoder.decode(out)


def redacted(value: Any, patterns: Patterns) -> Any:
    """JSON with every text in it redacted."""
    if isinstance(value, str):
        return patterns.redact(value.encode()).decode(errors="replace") if patterns else value
    if isinstance(value, dict):
        return {redacted(key, patterns): redacted(item, patterns) for key, item in value.items()}
    if isinstance(value, list):
        return [redacted(item, patterns) for item in value]
    return value


def _message(content: list[Block], texts: Patterns, inputs: Patterns) -> list[Block]:
    found: list[Block] = []
    for block in content:
        match block.get("type"):
            case "text":
                found.append({**block, "text": redacted(block["text"], texts)})
            case "tool_use":
                found.append({**block, "input": redacted(block["input"], inputs)})
            case "thinking":
                if redacted(block["thinking"], inputs) == block["thinking"]:
                    found.append(block)
            case _:
                found.append(block)
    return found

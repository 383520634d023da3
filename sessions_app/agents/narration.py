"""What a program in the sandbox tells, as frames: each line's frames in one commit, with the way to go on after it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any, Final

from sandboxes.waiting import database_release
from sessions_app import frames
from sessions_app.frames import Frame
from sessions_app.log import storable
from sessions_app.models import Event
from sessions_app.secrecy import SessionSecrets, SpokenText, redacted
from sessions_app.task_queue import last_speech
from sessions_app.turns import Turn

SHOWN_LIMIT: Final = 10 * 1024 * 1024
"""Characters of text that one task brings into the log (SECURITY 5.14); the rest is counted and dropped."""
PIECE: Final = frames.MAX_TEXT // 4
"""Characters of text in one frame: at most four bytes each."""
SECRETS_SECONDS: Final = 5.0
"""A replaced secret is known to the redaction after this time."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a program could not go on, with a code of `docs/reference/errors.md`."""

    code: str
    detail: str

    @classmethod
    def of_model(cls, status: int | None, detail: str) -> Failure:
        """A model call that failed; `status` None: it had no answer."""
        if "budget_spent" in detail:
            return cls("budget_spent", detail)
        if "prompt is too long" in detail or "context window" in detail:
            return cls("llm_context_too_long", detail)
        return cls(_code(status), detail)


def _code(status: int | None) -> str:
    match status:
        case None:
            return "llm_unreachable"
        case 401 | 403:
            return "llm_auth"
        case 402:
            return "llm_billing"
        case 413:
            return "llm_context_too_long"
        case 429:
            return "llm_rate_limited"
        case 503 | 529:
            return "llm_overloaded"
        case 408 | 409:
            return "llm_server_error"
        case _:
            return "llm_server_error" if status >= 500 else "llm_bad_request"


@dataclass(slots=True)
class Mark:
    """Where another worker goes on: at byte `offset`, without the first `said` characters of speech after it."""

    offset: int = 0
    said: int = 0
    state: dict[str, Any] = field(default_factory=dict)
    """What the translation must know of what was before."""

    def as_json(self) -> dict[str, Any]:
        return {"offset": self.offset, "said": self.said, "state": dict(self.state)}


class Narrator:
    """Collects the frames of one line; `commit` stores them. Nothing that it writes holds a secret of the session."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._task = turn.task.pk
        self._secrets = SessionSecrets.of(turn.session.public_id)
        self._secrets_at = time.monotonic()
        self._speech = SpokenText(self._secrets)
        self._skip = 0
        self._line: list[Frame] = []
        self._shown = 0
        self.dropped = 0
        self.mark = Mark()
        self._is_kept = True
        self.open_calls: dict[str, None] = {}

    @property
    def state(self) -> dict[str, Any]:
        """The translation's memory: small, JSON, and stored with every frame."""
        return self.mark.state

    def keep_state(self) -> None:
        """The translation's memory must outlive the task, also when no frame follows."""
        self._is_kept = False

    def resume(self) -> None:
        """Take up the newest mark of this task."""
        mark = mark_of(Event.objects.filter(task=self._turn.task))
        if mark is not None:
            self.mark = mark
            self._skip = mark.said
        told = Event.objects.filter(task=self._turn.task, type__in=("tool_use", "tool_result"))
        for kind, data in told.order_by("seq").values_list("type", "data"):
            if kind == "tool_use":
                self.open_calls[data["tool_use_id"]] = None
            else:
                self.open_calls.pop(data["tool_use_id"], None)

    def say(self, text: str) -> None:
        """The model's words, as they come."""
        self._spoken(self._speech.feed(text))

    def end_speech(self) -> None:
        """What was said is whole: nothing of it is held back any longer."""
        self._spoken(self._speech.end())

    def _spoken(self, text: str) -> None:
        self.mark.said += len(text)
        skipped = min(self._skip, len(text))
        self._skip -= skipped
        self._text(text[skipped:], source="assistant", tool_use_id=None)

    def _text(self, text: str, *, source: frames.Source, tool_use_id: str | None) -> None:
        room = max(0, SHOWN_LIMIT - self._shown)
        self.dropped += max(0, len(text) - room)
        text = text[:room]
        self._shown += len(text)
        for start in range(0, len(text), PIECE):
            piece = text[start : start + PIECE]
            self._line.append(
                frames.text("stdout", piece, source=source, task=self._task, tool_use_id=tool_use_id)
            )

    def take_back(self) -> None:
        """What the model said last is void: the call broke off and was made again."""
        self.end_speech()
        self._store()
        self._turn.log.flush()
        start = last_speech(self._turn.session, self._turn.task)
        if start is not None:
            self._line.append(frames.restarted(self._task, discard_after=start - 1))

    def tool_use(self, tool_use_id: str, name: str, tool_input: Any) -> None:
        self.end_speech()
        self.open_calls[tool_use_id] = None
        shown = redacted(tool_input, self._secrets.every)
        self._line.append(
            frames.tool_use(self._task, tool_use_id=tool_use_id, name=name[:256], tool_input=shown)
        )

    def tool_result(
        self, tool_use_id: str, output: str, *, is_error: bool, exit_code: int | None = None
    ) -> None:
        """A tool's answer, and its output for a person to read. One for a call that is not open is left out."""
        if tool_use_id not in self.open_calls:
            return
        del self.open_calls[tool_use_id]
        self.end_speech()
        before = self.dropped
        self._text(self._secrets.text(output), source="tool", tool_use_id=tool_use_id)
        result = frames.tool_result(
            self._task,
            tool_use_id=tool_use_id,
            content=None,
            is_error=is_error,
            exit_code=exit_code,
            truncated=self.dropped > before,
        )
        self._line.append(replace(result, private=None))

    def retrying(self, failure: Failure) -> None:
        """The program tries a model call again."""
        if failure.code != "budget_spent":  # Told once, at the end: no retry helps.
            self._line.append(self._error(failure, "retrying"))

    def fail(self, failure: Failure, *, retry: frames.Retry = "terminal") -> None:
        """The task fails with this. Said once, also when another attempt has said it before."""
        said = Event.objects.filter(task=self._turn.task, type="error", data__code=failure.code)
        if not self._turn.is_resumed or not said.exclude(data__retry="retrying").exists():
            self._turn.log.append(self._error(failure, retry))

    def _error(self, failure: Failure, retry: frames.Retry) -> Frame:
        detail = self._secrets.text(failure.detail)[:2000]
        return frames.error(code=failure.code, detail=detail, retry=retry, task=self._task)

    def redacted(self, text: str) -> str:
        """A text without the session's secrets."""
        return self._secrets.text(text)

    def commit(self, offset: int) -> None:
        """The line that ended before byte `offset` is told: store its frames."""
        if not self._speech.holds:
            self.mark.offset, self.mark.said = offset, 0
        self._store()
        if not self._speech.holds and time.monotonic() - self._secrets_at > SECRETS_SECONDS:
            self._secrets = SessionSecrets.of(self._turn.session.public_id)
            self._speech = SpokenText(self._secrets)
            self._secrets_at = time.monotonic()
            database_release()

    def _store(self) -> None:
        mark = {"mark": self.mark.as_json()}
        if not self._line and not self._is_kept:
            begun = Event.objects.filter(task=self._turn.task, type="task_started")
            begun.update(private=storable(mark))
            database_release()
        self._is_kept = True
        if not self._line:
            return
        line, self._line = self._line, []
        marked = [replace(frame, private=(frame.private or {}) | mark) for frame in line]
        if all(frame.type in frames.TEXT_TYPES for frame in marked) and len(marked) == 1:
            self._turn.log.text(marked[0])
        else:
            self._turn.log.append(*marked)

    def end(self) -> None:
        """The program is gone: calls that it left open have no result, and the reader learns what is missing."""
        self.end_speech()
        for tool_use_id in list(self.open_calls):
            self.tool_result(tool_use_id, "", is_error=True)
        self._store()
        if self.dropped:
            self.fail(
                Failure(
                    "output_truncated",
                    f"{self.dropped} characters are not in the log: it takes 10 MiB of one task.",
                ),
                retry="exhausted",
            )


def mark_of(events: Any) -> Mark | None:
    """The newest mark among those events."""
    newest = events.filter(private__isnull=False).order_by("-seq").values_list("private", flat=True)
    for private in newest.iterator(chunk_size=20):
        if isinstance(private, dict) and "mark" in private:
            return Mark(**private["mark"])
    return None

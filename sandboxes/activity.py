"""What keeps a sandbox alive: one clock and one rule, for sandboxes of their own and for those of sessions.

The clock is `Sandbox.last_active_at`; `idle_timeout_seconds` after it the sandbox is idle, unless something holds it:
a task or a model call, a process that the API started and that has not ended, or somebody who looks. Who looks and who
works says so again and again (`viewer_attached`, `work_goes_on`); what was not said again lapses by itself, so a killed
process holds nothing. That is kept in Redis; a sandbox is never ended for idleness while Redis is silent.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Final, Literal

import redis
import structlog
from django.db.models import Q

from e2a.core.clock import now, seconds
from e2a.core.errors import E2AError
from e2a.core.redis_client import redis_client
from sandboxes.configuration import guest_client
from sandboxes.guest_client import GuestStats
from sandboxes.models import UNREADY_STATES, Sandbox, SandboxState

log = structlog.get_logger(__name__)

Work = Literal["task_running", "model_call"]
ViewerKind = Literal["session", "terminal", "desktop", "preview"]

VIEWER_SECONDS: Final = 75.0
"""A viewer that does not say so again within this time has gone."""
BEAT_SECONDS: Final = 25.0
"""How often a viewer says so: two beats may be lost."""
WORK_SECONDS: Final = 20.0
TOUCH_SECONDS: Final = 5.0
ASKED_AT_ONCE: Final = 16
"""Guests that one pass asks at the same time."""
ASK_SECONDS: Final = 2.0
PASS_SECONDS: Final = 10.0
"""After that a pass decides about those guests that have answered; the others are asked by the next one."""
_LOOK_SECONDS = 1.0
_MOVED_SECONDS = 2 * TOUCH_SECONDS
"""Bytes that moved so long after the last use were not moved by that use."""

TEXTS: Final = {
    "starting": "It is being made.",
    "paused": "It is paused: it does not idle, and ends at its time.",
    "model_call": "Its agent waits for a model's answer.",
    "task_running": "Its agent works on a task.",
    "process_running": "A process runs in it.",
    "viewer_attached": "Somebody looks at it",
    "bytes_moved": "Bytes moved in or out of it a short while ago.",
    "extended": "Somebody asked to keep it although it idles.",
    "recently_used": "It was used a short while ago.",
    "unknown": "What runs in it does not answer just now.",
}
"""The words of `alive_because`, and what each says to a person."""

# KEYS[1] the sandbox's hash; ARGV what holds it, now, until (both seconds). A field is "since until".
_HOLD = """
local known = redis.call('HGET', KEYS[1], ARGV[1])
local since = ARGV[2]
if known then
  local first, last = string.match(known, '(%S+) (%S+)')
  if tonumber(last) > tonumber(ARGV[2]) then since = first end
end
redis.call('HSET', KEYS[1], ARGV[1], since .. ' ' .. ARGV[3])
redis.call('EXPIRE', KEYS[1], 90)
"""


@dataclass(frozen=True, slots=True)
class Hold:
    """Something outside that works in a sandbox or looks at it. `kind` of a viewer: through what."""

    word: str
    kind: str
    since: dt.datetime


@dataclass(frozen=True, slots=True)
class Alive:
    """Why a sandbox is not ended for idleness, and when it ends if nothing more happens.

    `is_held`: its idle time does not run. `since` is None where nobody knows. `ends_at` is None for one without an end.
    """

    reason: str
    text: str
    since: dt.datetime | None
    is_held: bool
    ends_at: dt.datetime | None


def viewer_attached(sandbox_pk: int, kind: ViewerKind, viewer_id: str = "") -> None:
    """Somebody looks at the sandbox through `kind`: it is not idle for the next 75 s.

    To be called when a viewer comes, and every `BEAT_SECONDS` for as long as it stays. `viewer_id` tells the viewers of
    one kind apart. At most one query and one call of Redis; a Redis that is down is logged, not raised.
    """
    sandbox_touch(sandbox_pk)
    _hold(sandbox_pk, f"viewer_attached/{kind}/{viewer_id}", VIEWER_SECONDS)


def viewer_left(sandbox_pk: int, kind: ViewerKind, viewer_id: str = "") -> None:
    """It has gone: its idle time begins now. Without this call it does 75 s after the last beat."""
    sandbox_touch(sandbox_pk)
    _let_go(sandbox_pk, f"viewer_attached/{kind}/{viewer_id}")


def work_goes_on(sandbox_pk: int, word: Work, work_id: str) -> None:
    """A task, or a model call, needs the sandbox for the next 20 s; to be said again until it is over."""
    _hold(sandbox_pk, f"{word}/work/{work_id}", WORK_SECONDS)


def work_over(sandbox_pk: int, word: Work, work_id: str) -> None:
    _let_go(sandbox_pk, f"{word}/work/{work_id}")


def is_worked_in(sandbox_pk: int) -> bool:
    """Whether a session's task works in it. False while Redis is down."""
    try:
        return any(hold.word != "viewer_attached" for hold in holds_of([sandbox_pk])[sandbox_pk])
    except redis.RedisError as error:
        log.warning("activity.redis", error=type(error).__name__)
        return False


def sandbox_touch(sandbox_pk: int) -> None:
    """Its tenant uses it: idle time starts anew. Writes at most once in 5 s."""
    moment = now()
    stale = Q(last_active_at__lt=moment - seconds(TOUCH_SECONDS)) | Q(last_active_at__isnull=True)
    Sandbox.objects.filter(stale, pk=sandbox_pk).update(last_active_at=moment)


def alive_look(sandbox: Sandbox) -> Alive | None:
    """Why it lives, asked now; None for one that is over. Asks a running one's guest, at most 1 s, and Redis."""
    if sandbox.state not in (*UNREADY_STATES, SandboxState.RUNNING, SandboxState.PAUSED):
        return None
    stats: GuestStats | None = None
    holds: list[Hold] = []
    if sandbox.state == SandboxState.RUNNING:
        try:
            holds = holds_of([sandbox.pk])[sandbox.pk]
        except redis.RedisError as error:
            log.warning("activity.redis", error=type(error).__name__)
        try:
            stats = guest_client(sandbox, timeout_seconds=_LOOK_SECONDS).stats()
        except E2AError as error:
            log.info("activity.guest_silent", sandbox=sandbox.public_id, error=error.detail)
    return alive_of(sandbox, stats, holds, now())


def alive_of(sandbox: Sandbox, stats: GuestStats | None, holds: Sequence[Hold], moment: dt.datetime) -> Alive:
    """The rule. `stats` None: its guest was silent, or was not asked."""
    if sandbox.state in UNREADY_STATES:
        return _held(sandbox, "starting", sandbox.claimed_at)
    if sandbox.state == SandboxState.PAUSED:
        return _held(sandbox, "paused", sandbox.frozen_at)
    by_word = {hold.word: hold for hold in sorted(holds, key=lambda hold: hold.since, reverse=True)}
    for word in ("model_call", "task_running"):
        if word in by_word:
            return _held(sandbox, word, by_word[word].since)
    if stats is not None and stats.running > stats.resting_terminals:
        return _held(sandbox, "process_running", moment - seconds(stats.longest_running_seconds))
    if (viewer := by_word.get("viewer_attached")) is not None:
        return _held(sandbox, "viewer_attached", viewer.since, f" ({viewer.kind}).")
    used_at = sandbox.last_active_at or sandbox.created_at
    moved_at = used_at if stats is None else moment - seconds(max(0.0, stats.last_moved_seconds))
    active_at = max(used_at, moved_at)
    idle_at = active_at + seconds(sandbox.idle_timeout_seconds)
    ends_at = idle_at if sandbox.expires_at is None else min(idle_at, sandbox.expires_at)
    if used_at > moment:
        reason, since = "extended", None
    elif moved_at > used_at + seconds(_MOVED_SECONDS):
        reason, since = "bytes_moved", moved_at
    elif stats is None:
        reason, since = "unknown", None
    else:
        reason, since = "recently_used", active_at
    return Alive(reason, TEXTS[reason], since, is_held=False, ends_at=ends_at)


def idle_among(rows: Sequence[Sandbox]) -> list[Sandbox]:
    """Those of these running sandboxes that are idle. The clocks of the others are set by what was found.

    All guests are asked, 16 at once, each for at most 2 s, for 10 s in all: one that is silent is not judged (its
    death is reconcile's to find) and holds up none. One call of Redis, one UPDATE for each that is not idle.
    """
    moment = now()
    late = [row for row in rows if _is_due(row, moment)]
    if not late:
        return []
    try:
        holds = holds_of([row.pk for row in late])
    except redis.RedisError as error:
        log.warning("activity.redis", error=type(error).__name__)
        return []
    idle = []
    for row, stats in guests_asked(late):
        alive = alive_of(row, stats, holds[row.pk], moment)
        if not alive.is_held and _is_over(row, stats, moment):
            idle.append(row)
            continue
        active_at = moment if alive.is_held else moment - seconds(max(0.0, stats.last_moved_seconds))
        # Whoever used it since we read the row has set the clock: then it stays as it is.
        Sandbox.objects.filter(pk=row.pk, last_active_at=row.last_active_at).update(last_active_at=active_at)
    return idle


def guests_asked(rows: Sequence[Sandbox]) -> list[tuple[Sandbox, GuestStats]]:
    """What the guests of these say, without those that did not answer. No query: the rows have their node."""

    def ask(row: Sandbox) -> GuestStats:
        return guest_client(row, timeout_seconds=ASK_SECONDS).stats()

    pool = ThreadPoolExecutor(min(ASKED_AT_ONCE, len(rows) or 1), thread_name_prefix="ask-guest")
    try:
        asked = {pool.submit(ask, row): row for row in rows}
        done, _ = wait(asked, timeout=PASS_SECONDS)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    answers = []
    for future in done:
        try:
            answers.append((asked[future], future.result()))
        except E2AError as error:
            log.info("activity.guest_silent", sandbox=asked[future].public_id, error=error.detail)
    return answers


def holds_of(sandbox_pks: Sequence[int]) -> dict[int, list[Hold]]:
    """Who works in each of these or looks at it, now. One round trip. Raises RedisError."""
    client = redis_client()
    asked = client.pipeline(transaction=False)
    for pk in sandbox_pks:
        asked.hgetall(_key(pk))
    moment = time.time()
    found: dict[int, list[Hold]] = {}
    for pk, fields in zip(sandbox_pks, asked.execute(), strict=True):
        found[pk] = []
        for name, value in fields.items():
            since, until = (float(part) for part in value.split())
            if until > moment:
                word, kind, _ = name.decode().split("/", 2)
                found[pk].append(Hold(word, kind, dt.datetime.fromtimestamp(since, dt.UTC)))
    return found


def _held(sandbox: Sandbox, reason: str, since: dt.datetime | None, more: str = "") -> Alive:
    return Alive(reason, TEXTS[reason] + more, since, is_held=True, ends_at=sandbox.expires_at)


def _is_due(row: Sandbox, moment: dt.datetime) -> bool:
    return (row.last_active_at or row.created_at) + seconds(row.idle_timeout_seconds) <= moment


def _is_over(row: Sandbox, stats: GuestStats, moment: dt.datetime) -> bool:
    return stats.last_moved_seconds >= row.idle_timeout_seconds and _is_due(row, moment)


def _key(sandbox_pk: int) -> str:
    return f"e2a:alive:{sandbox_pk}"


def _hold(sandbox_pk: int, field: str, lasting: float) -> None:
    moment = time.time()
    _said(
        lambda: redis_client().eval(
            _HOLD, 1, _key(sandbox_pk), field, f"{moment:.3f}", f"{moment + lasting:.3f}"
        )
    )


def _let_go(sandbox_pk: int, field: str) -> None:
    _said(lambda: redis_client().hdel(_key(sandbox_pk), field))


def _said(call: Callable[[], object]) -> None:
    try:
        call()
    except redis.RedisError as error:
        log.warning("activity.redis", error=type(error).__name__)

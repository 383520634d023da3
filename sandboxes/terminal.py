"""A sandbox's terminal: which process it is, and who types into it.

There is one terminal a sandbox. Its shell is a process of the guest that outlives its sockets, and every socket reads
the same log by byte offset. Shells are numbered: when one has ended, the next socket starts the next number, and two
that do so at once start the same one.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import Final

import redis
import structlog

from e2a.core.errors import GuestError, Unavailable
from e2a.core.hints import publish
from e2a.core.redis_client import redis_client
from sandboxes.execution import ROOM_PAUSE_SECONDS, ROOM_SECONDS
from sandboxes.guest_client import AsyncGuestClient, ProcessInfo, ProcessSpec, PtySize

log = structlog.get_logger(__name__)

SCROLL_BACK_BYTES: Final = 1024 * 1024
WRITER_SECONDS: Final = 15
"""Who types says so again at least this often; a web process that was killed does not."""

SIZE_SECONDS: Final = 24 * 3600

_SHELL = re.compile(r"terminal-([1-9][0-9]{0,8})")


def group_of(sandbox_id: str) -> str:
    """Where its sockets hear hints."""
    return f"terminal.{sandbox_id}"


def terminal_spec(number: int, cols: int, rows: int) -> ProcessSpec:
    return ProcessSpec(
        id=f"terminal-{number}",
        argv=("/bin/bash", "-l"),
        pty=PtySize(cols, rows),
        on_full="drop",
        log_bytes=SCROLL_BACK_BYTES,
    )


def shell_token(process: ProcessInfo) -> str:
    """What names this shell to its clients: two of the same number are told apart by their start."""
    return f"{process.id}.{int((process.started_at or 0) * 1000)}"


async def shell_get(client: AsyncGuestClient, token: str) -> ProcessInfo | None:
    """The shell that a client has seen before, also when it has ended; None when the guest has forgotten it."""
    process_id, _, _ = token.partition(".")
    if _SHELL.fullmatch(process_id) is None:
        return None
    try:
        process = await client.process_get(process_id)
    except GuestError as error:
        if error.code == "no_such_process":
            return None
        raise
    return process if shell_token(process) == token else None


async def shell_ensure(client: AsyncGuestClient, cols: int, rows: int) -> ProcessInfo:
    """The shell that runs, or a new one. The size is for a new one.

    At its limit of processes the guest ends what others left running: as `execution.with_room`, for as long.
    """
    give_up_at = time.monotonic() + ROOM_SECONDS
    while True:
        try:
            return await _shell_found_or_started(client, cols, rows)
        except GuestError as error:
            if error.code != "no_resources" or time.monotonic() > give_up_at:
                raise
        await asyncio.sleep(ROOM_PAUSE_SECONDS)


async def _shell_found_or_started(client: AsyncGuestClient, cols: int, rows: int) -> ProcessInfo:
    latest = 0
    for process in await client.process_list():
        if (found := _SHELL.fullmatch(process.id)) is None:
            continue
        if process.state == "running":
            return process
        latest = max(latest, int(found[1]))
    return await client.process_start(terminal_spec(latest + 1, cols, rows))


# Who types: one value in Redis, `<client>/<socket>`, with an end of its own. A client that comes back is itself again.

_CLAIM: Final = """
local there = redis.call('GET', KEYS[1])
if not there or there == ARGV[1] or string.sub(there, 1, #ARGV[2]) == ARGV[2] then
  redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[3])
  return 1
end
return 0
"""
_RELEASE: Final = (
    "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
)


def _key(sandbox_id: str) -> str:
    return f"e2a:terminal:{sandbox_id}"


def writer_take(sandbox_id: str, who: str) -> None:
    """From now on `who` types, and nobody else. Raises `Unavailable` when Redis does not answer."""
    try:
        redis_client().set(_key(sandbox_id), who, ex=WRITER_SECONDS)
    except redis.RedisError as error:
        raise Unavailable("Who types cannot be changed now.") from error


def writer_claim(sandbox_id: str, who: str) -> bool:
    """Whether `who` types now: nobody did, or an older socket of the same client. Raises `Unavailable`."""
    client = who.partition("/")[0] + "/"
    try:
        return bool(redis_client().eval(_CLAIM, 1, _key(sandbox_id), who, client, WRITER_SECONDS))
    except redis.RedisError as error:
        raise Unavailable("Who types cannot be changed now.") from error


def writer_holds(sandbox_id: str, who: str) -> bool:
    """Whether nobody took over from `who`, who says so again by asking. True when Redis does not answer."""
    try:
        return bool(redis_client().eval(_CLAIM, 1, _key(sandbox_id), who, who, WRITER_SECONDS))
    except redis.RedisError as error:
        log.warning("terminal.redis_down", sandbox=sandbox_id, error=type(error).__name__)
        return True


def writer_release(sandbox_id: str, who: str) -> None:
    """`who` has left; nobody types then. Redis being down is fine: it ends by itself."""
    try:
        redis_client().eval(_RELEASE, 1, _key(sandbox_id), who)
    except redis.RedisError as error:
        log.info("terminal.redis_down", sandbox=sandbox_id, error=type(error).__name__)


def size_tell(sandbox_id: str, cols: int, rows: int) -> None:
    """Let viewers draw at the size that the shell has; Redis being down is fine."""
    try:
        redis_client().set(f"{_key(sandbox_id)}:size", f"{cols} {rows}", ex=SIZE_SECONDS)
    except redis.RedisError as error:
        log.info("terminal.redis_down", sandbox=sandbox_id, error=type(error).__name__)
    publish(group_of(sandbox_id), {"type": "terminal.resized", "cols": cols, "rows": rows})


def size_told(sandbox_id: str) -> tuple[int, int] | None:
    """The last size that somebody who types gave it; None when that is not known."""
    try:
        told = redis_client().get(f"{_key(sandbox_id)}:size")
    except redis.RedisError:
        return None
    if not isinstance(told, bytes):
        return None
    cols, _, rows = told.partition(b" ")
    return int(cols), int(rows)

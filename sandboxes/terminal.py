"""A sandbox's terminal: who may attach to it, who types into it, and which process it is.

There is one terminal a sandbox, a process of the guest with a fixed id: it outlives its sockets, and every
socket reads the same log by byte offset. One socket types; taking over makes the others viewers.
"""

from __future__ import annotations

from typing import Final

import redis
import structlog

from accounts.tokens import sandbox_token_check
from e2a.core.errors import Unauthenticated, Unavailable
from e2a.core.origins import origin_allowed
from e2a.core.redis_client import redis_client
from sandboxes.guest_answers import not_running
from sandboxes.guest_client import ProcessSpec, PtySize
from sandboxes.models import Sandbox
from sandboxes.services import sandbox_ensure_configured, sandbox_used, sandbox_wait_running

log = structlog.get_logger(__name__)

PROCESS_ID: Final = "terminal"
SCROLL_BACK_BYTES: Final = 1024 * 1024
WRITER_SECONDS: Final = 24 * 3600

BAD_FRAMES, BAD_TOKEN, FORBIDDEN, NO_SANDBOX, SANDBOX_OVER = 4400, 4401, 4403, 4404, 4410
FRAME_TOO_LARGE, TOO_MANY, FAILED, ENDED = 4413, 4429, 1011, 1000


class TerminalRefused(Exception):
    """The socket is closed with `code`; `reason` is for a person."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def terminal_sandbox(*, sandbox_id: str, token: str, origin: str | None) -> Sandbox:
    """The sandbox that the token is for, once it runs; a paused one is resumed.

    Raises `TerminalRefused` (4401, 4403, 4404; a strange sandbox and a missing one answer alike), `not_running`,
    `sandbox_not_ready`, `sandbox_unreachable`.
    """
    try:
        named, tenant_id = sandbox_token_check(token)
    except Unauthenticated:
        raise TerminalRefused(BAD_TOKEN, "The token is not valid, or has expired.") from None
    sandbox = (
        Sandbox.objects.select_related("tenant", "node", "template")
        .filter(public_id=sandbox_id, tenant__public_id=tenant_id)
        .first()
    )
    if sandbox is None or sandbox.tenant is None:
        raise TerminalRefused(NO_SANDBOX, "There is no such sandbox.")
    if named != sandbox.public_id:
        raise TerminalRefused(FORBIDDEN, "The token belongs to another sandbox.")
    if not sandbox.tenant.is_active:
        raise TerminalRefused(BAD_TOKEN, "The token was revoked.")
    if origin is not None and not origin_allowed(origin, sandbox.tenant.allowed_origins):
        raise TerminalRefused(FORBIDDEN, "This page's origin may not open sockets.")
    sandbox_wait_running(sandbox)
    sandbox_ensure_configured(sandbox)
    sandbox_used(sandbox)
    if sandbox.node is None:  # Read here: a row that was read anew asks the database, which a socket may not.
        raise not_running(sandbox)
    return sandbox


def terminal_spec(cols: int, rows: int) -> ProcessSpec:
    return ProcessSpec(
        id=PROCESS_ID,
        argv=("/bin/bash", "-l"),
        pty=PtySize(cols, rows),
        on_full="drop",
        log_bytes=SCROLL_BACK_BYTES,
    )


def _key(sandbox_id: str) -> str:
    return f"e2a:terminal:{sandbox_id}"


def writer_take(sandbox_id: str, who: str) -> None:
    """From now on `who` types, and nobody else. Raises `Unavailable` when Redis does not answer."""
    try:
        redis_client().set(_key(sandbox_id), who, ex=WRITER_SECONDS)
    except redis.RedisError as error:
        raise Unavailable("Who types cannot be changed now.") from error


def writer_is(sandbox_id: str, who: str) -> bool:
    """Whether `who` was the last to take over. True when Redis does not answer: who thinks so may type on."""
    try:
        return redis_client().get(_key(sandbox_id)) == who.encode()
    except redis.RedisError as error:
        log.warning("terminal.redis_down", sandbox=sandbox_id, error=type(error).__name__)
        return True

"""Sliding-window limits in Redis: exact within a window, atomic over all processes."""

from __future__ import annotations

import secrets
import time

import redis
import structlog

from e2a.core.errors import RateLimited
from e2a.core.redis_client import redis_client

log = structlog.get_logger(__name__)

# KEYS[1] the window; ARGV now (µs), window (µs), limit, member. Answers {allowed, used, µs until the oldest leaves}.
_WINDOW = """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[1] - ARGV[2])
local used = redis.call('ZCARD', KEYS[1])
if used >= tonumber(ARGV[3]) then
  local oldest = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
  return {0, used, oldest[2] + ARGV[2] - ARGV[1]}
end
redis.call('ZADD', KEYS[1], ARGV[1], ARGV[4])
redis.call('PEXPIRE', KEYS[1], math.ceil(ARGV[2] / 1000))
return {1, used + 1, ARGV[2]}
"""


def hit(scope: str, subject: str, *, limit: int, window_seconds: int) -> None:
    """Count one use of `scope` by `subject`. Raises `RateLimited` when `limit` in `window_seconds` is used up.

    A refused call is not counted. Fails open, with a log line, when Redis does not answer: what must hold without
    Redis (tries of a sign-in code) is counted in the database instead.
    """
    moment = time.time_ns() // 1000
    window = window_seconds * 1_000_000
    try:
        allowed, used, wait = redis_client().eval(
            _WINDOW,
            1,
            f"e2a:limit:{scope}:{subject}",
            moment,
            window,
            limit,
            f"{moment}-{secrets.token_hex(4)}",
        )
    except redis.RedisError as error:
        log.warning("rate_limit.open", scope=scope, error=type(error).__name__)
        return
    if not allowed:
        raise RateLimited(
            f"At most {limit} in {window_seconds} s.",
            retry_after=-(-int(float(wait)) // 1_000_000),
            limit=limit,
            remaining=max(0, limit - int(used)),
        )

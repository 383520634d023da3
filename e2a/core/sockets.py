"""What our sockets share: how fast a client may speak, and taking hints for as long as it is there."""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import redis
import structlog
from channels.layers import get_channel_layer

log = structlog.get_logger(__name__)

HINTS_AGAIN_SECONDS: Final = 1.0

_awake: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()


class FrameRate:
    """At most so many frames in a sliding window."""

    def __init__(self, limit: int, seconds: float) -> None:
        self._times: deque[float] = deque(maxlen=limit)
        self._seconds = seconds

    def takes(self) -> bool:
        moment = time.monotonic()
        if len(self._times) == self._times.maxlen and moment - self._times[0] < self._seconds:
            return False
        self._times.append(moment)
        return True


async def hear_hints(
    group: str,
    *,
    takers: Mapping[str, Callable[[dict[str, Any]], Awaitable[None]]],
    on_listening: Callable[[], None],
    is_over: Callable[[], bool],
) -> None:
    """Give each message of `group` to the taker of its type until `is_over` or cancelled.

    `on_listening` is called whenever what was hinted before may have been missed. The consumer has no channel of
    Channels' own, which would refuse the handshake while Redis is down: a socket without hints looks for itself, later,
    and hears them again when Redis is back.
    """
    layer = get_channel_layer()
    assert layer is not None, "CHANNEL_LAYERS is always set"
    # `is_over` is asked besides: redis-py writes by `asyncio.wait_for`, which before Python 3.12 loses a cancel
    # that comes in the tick in which it is done.
    while not is_over():
        channel = ""
        try:
            await _listener_awake(layer)
            channel = await layer.new_channel()
            await layer.group_add(group, channel)
            on_listening()
            while not is_over():
                message = await layer.receive(channel)
                await takers[message["type"]](message)
        except (redis.RedisError, OSError) as error:
            log.info("socket.no_hints", group=group, error=type(error).__name__)
            await asyncio.sleep(HINTS_AGAIN_SECONDS)
        finally:
            with contextlib.suppress(redis.RedisError, OSError):
                await layer.group_discard(group, channel)


async def _listener_awake(layer: Any) -> None:
    """Subscribe to something for good, once a process.

    While there is no subscription at all, channels_redis looks for one every 100 ms only: the only socket of a process
    would hear its first hints that late.
    """
    loop = asyncio.get_running_loop()
    if loop not in _awake:
        await layer.new_channel("awake.")
        _awake.add(loop)

"""Hints: fire-and-forget messages that say there is more to read. Losing one costs latency, never data."""

from __future__ import annotations

from typing import Any

import redis
import structlog
from channels.layers import get_channel_layer

from e2a.core.redis_client import redis_client

log = structlog.get_logger(__name__)


def publish(group: str, message: dict[str, Any]) -> None:
    """Send `message` (which has a `type`; JSON only) to everybody in `group`. Never raises for a dead Redis.

    Speaks the wire form of `RedisPubSubChannelLayer` by a plain synchronous client: from a worker thread the layer's
    own `group_send` would need an event loop, and a connection of its own, for each call.
    """
    layer = get_channel_layer()
    assert layer is not None, "CHANNEL_LAYERS is always set"
    try:
        redis_client().publish(f"asgi__group__{group}", layer.serialize(message))
    except redis.RedisError as error:
        log.warning("hints.lost", group=group, error=type(error).__name__)

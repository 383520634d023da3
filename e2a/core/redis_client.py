"""One Redis (or Valkey) client a process, for what is not Celery's and not the channel layer's."""

from __future__ import annotations

import functools

import redis
from django.conf import settings


@functools.cache
def redis_client() -> redis.Redis:
    """The process's client. Every call ends within 2 s; raises `redis.RedisError` when the server does not answer."""
    return redis.Redis.from_url(
        settings.E2A.redis_url, socket_timeout=2.0, socket_connect_timeout=1.0, health_check_interval=30
    )

"""Which pages' scripts may open sockets."""

from __future__ import annotations

from typing import Final
from urllib.parse import urlsplit

from django.conf import settings

_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})


def origin_allowed(origin: str, allowed: list[str]) -> bool:
    """Whether a browser page of `origin` may connect: ours, the operator's, the tenant's; any of this machine and
    `null` (a file) in development."""
    own = {url.rstrip("/") for url in (settings.E2A.public_url, settings.E2A.rt_url) if url}
    if origin in own or origin in settings.E2A.embed_origins or origin in allowed:
        return True
    if settings.E2A.production:
        return False
    try:
        host = urlsplit(origin).hostname or ""
    except ValueError:
        return False
    return origin == "null" or host in _LOOPBACK or host.endswith(".localhost")

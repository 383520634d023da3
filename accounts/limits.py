"""Who is asking, for limits: the source of a request, and limits that count per source.

Per-source limits are off in development, where everything comes from one address (CONTRACT 2).
"""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address, ip_network

from django.conf import settings

from e2a.core import rate_limits


def source_of(address: str) -> str:
    """The IPv4 address itself; for IPv6 the /64, since one host owns all of it. Other text stays as it is."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address[:45]
    if isinstance(parsed, IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ip_network((parsed, 64), strict=False))
    return str(parsed)


def source_hit(scope: str, address: str, *, limit: int, window_seconds: int) -> None:
    """Count one use of `scope` from where `address` is. Raises `RateLimited`; does nothing in development."""
    if settings.E2A.production:
        rate_limits.hit(scope, source_of(address), limit=limit, window_seconds=window_seconds)

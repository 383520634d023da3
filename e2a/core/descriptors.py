"""How many files and sockets a process may have open."""

from __future__ import annotations

import resource


def descriptors_raise(wanted: int) -> int:
    """Raise this process's soft limit to `wanted`, or to the hard limit where that is less; returns what holds now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return wanted if soft == resource.RLIM_INFINITY else soft

"""Blocking work from async code, in threads of our own.

asgiref's `sync_to_async` runs everything that is not part of a Django request in one thread for the whole process: one
slow query of one socket would hold up all of them.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, ParamSpec, TypeVar

from django.db import close_old_connections

P = ParamSpec("P")
T = TypeVar("T")

THREADS: Final = 32
"""Each keeps a database connection; more waiting calls queue."""

_pool = ThreadPoolExecutor(THREADS, thread_name_prefix="blocking")


async def in_thread(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function` in a thread and return what it returns, or raise what it raises.

    The caller's context variables are seen inside. Stale database connections are closed around the call.
    """
    context = contextvars.copy_context()
    call: Callable[[], T] = functools.partial(
        context.run, functools.partial(_guarded, function, *args, **kwargs)
    )
    return await asyncio.get_running_loop().run_in_executor(_pool, call)


def _guarded(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    close_old_connections()
    try:
        return function(*args, **kwargs)
    finally:
        close_old_connections()

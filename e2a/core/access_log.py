"""One line a request: method, path without its query, status, milliseconds."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog
from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.http import HttpRequest, HttpResponseBase

log = structlog.get_logger("e2a.access")


class AccessLogMiddleware:
    """Works in both worlds without a thread hop of its own."""

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response
        self.is_async = iscoroutinefunction(get_response)
        if self.is_async:
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        if self.is_async:
            return self._later(request)  # type: ignore[return-value]  # Django awaits it
        started = time.perf_counter()
        response = self.get_response(request)
        _write(request, response, started)
        return response

    async def _later(self, request: HttpRequest) -> HttpResponseBase:
        started = time.perf_counter()
        response: HttpResponseBase = await self.get_response(request)  # type: ignore[misc]
        _write(request, response, started)
        return response


def _write(request: HttpRequest, response: HttpResponseBase, started: float) -> None:
    if request.path in ("/healthz", "/readyz"):
        return
    log.info(
        "request",
        method=request.method,
        path=request.path,
        status=response.status_code,
        ms=round((time.perf_counter() - started) * 1000, 1),
    )

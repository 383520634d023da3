"""Answers that were decided before Django saw the request (`e2a.body_gate`) get Django's headers all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import structlog
from django.http import HttpRequest, HttpResponse, JsonResponse

from e2a.core.errors import E2AError, OurError
from e2a.core.problems import problem_response

log = structlog.get_logger(__name__)

DECIDED: Final = "e2a.decided"
"""ASGI scope: the `E2AError` to answer with, or the document of a 200."""


class DecidedMiddleware:
    """Inside everything that sets headers, outside everything that looks at the body."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        decided: Any = getattr(request, "scope", {}).get(DECIDED)
        if decided is None:
            return self.get_response(request)
        if isinstance(decided, E2AError):
            if isinstance(decided, OurError):
                log.error("request.failed", exc_info=decided, path=request.path)
            return problem_response(decided, request)
        return JsonResponse(decided, headers={"Cache-Control": "no-store"})

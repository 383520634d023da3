"""What every page's template may use."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.http import HttpRequest


def product(request: HttpRequest) -> dict[str, Any]:
    """Whether this is a development installation, and whether sandboxes are really isolated."""
    return {"is_development": not settings.E2A.production, "engine": settings.E2A.engine}

"""Pages and answers that belong to the whole product: health, home, failures."""

from __future__ import annotations

from typing import Any

import redis
from django.contrib.auth.decorators import login_required
from django.db import DatabaseError, connection
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render

from e2a.core.errors import Forbidden
from e2a.core.problems import handler403
from e2a.core.redis_client import redis_client
from sandboxes.models import Template
from sandboxes.selectors import nodes_usable
from secrets_vault.models import Bundle


def healthz(request: HttpRequest) -> HttpResponse:
    """The process is up."""
    return JsonResponse({"status": "ok"})


def readyz(request: HttpRequest) -> HttpResponse:
    """Database, broker, and at least one node with a live heartbeat and engine: 200, else 503 with what is missing."""
    checks: dict[str, str] = {}
    try:
        connection.ensure_connection()
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        checks["database"] = "ok"
    except DatabaseError:
        checks["database"] = "does not answer"
    try:
        redis_client().ping()
        checks["broker"] = "ok"
    except redis.RedisError:
        checks["broker"] = "does not answer"
    if checks["database"] == "ok":
        checks["node"] = (
            "ok" if nodes_usable().exists() else "no node with a live heartbeat and a running engine"
        )
        ready = Template.objects.filter(is_enabled=True).exclude(image_id="").exists()
        checks["templates"] = "ok" if ready else "no template's image is built yet"
    is_ready = all(value == "ok" for value in checks.values())
    answer = JsonResponse(
        {"status": "ready" if is_ready else "not_ready", "checks": checks}, status=200 if is_ready else 503
    )
    answer._has_been_logged = True  # type: ignore[attr-defined]  # A probe's 503 is an answer, not an error to log.
    return answer


@login_required
def home(request: HttpRequest) -> HttpResponse:
    """The quickstart, with this user's own values in the commands."""
    tenant: Any = request.user.tenant  # type: ignore[union-attr]  # login_required
    base = f"{request.scheme}://{request.get_host()}"
    bundle = Bundle.objects.filter(tenant=tenant, is_inline=False).order_by("pk").first()
    return render(
        request,
        "e2a/quickstart.html",
        {
            "base": base,
            "ws_base": base.replace("http", "ws", 1),
            "bundle_name": bundle.name if bundle else "llm",
            "has_keys": tenant.api_keys.filter(revoked_at__isnull=True).exists(),
            "has_bundle": bundle is not None,
        },
    )


def csrf_failure(request: HttpRequest, reason: str = "") -> HttpResponse:
    """Django's hook for a missing or wrong CSRF token."""
    return handler403(request, Forbidden("The form has expired; load the page again."))

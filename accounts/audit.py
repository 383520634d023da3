"""The audit trail: who did what to what, from where. Rows are only ever added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.http import HttpRequest

from e2a.core.models import AuditEvent
from e2a.core.requests import client_address


@dataclass(frozen=True, slots=True)
class Caller:
    """Where a request comes from, as far as the audit trail and the limits care."""

    address: str = ""
    user_agent: str = ""


def caller_of(request: HttpRequest) -> Caller:
    """The caller of an HTTP request, cut to what the tables hold."""
    agent = request.META.get("HTTP_USER_AGENT", "") or ""
    return Caller(client_address(request)[:45], "".join(c for c in agent if c.isprintable())[:200])


def audit_write(
    action: str,
    *,
    actor: str = "",
    tenant_id: int | None = None,
    target: str = "",
    caller: Caller | None = None,
    **detail: Any,
) -> None:
    """Add one row. `actor` and `target` are public ids; `detail` is JSON, never with a secret or a code."""
    caller = caller or Caller()
    AuditEvent.objects.create(
        action=action,
        actor=actor,
        tenant_id=tenant_id,
        target=target,
        address=caller.address,
        user_agent=caller.user_agent,
        detail=detail,
    )

"""Reading sandboxes. A tenant's rows are found through the tenant; a stranger's id and a missing one look
alike."""

from __future__ import annotations

from django.db.models import Q, QuerySet

from accounts.models import Tenant
from e2a.core.clock import now, seconds
from e2a.core.errors import NotFound, ValidationFailed
from e2a.core.rows import only
from sandboxes.models import LIVE_STATES, Node, Sandbox, SandboxLogEntry, SandboxState, Template

HEARTBEAT_SECONDS = 30.0
"""A node whose heartbeat is older is taken for dead. It writes one every 5 s."""

SHOWN_STATES = frozenset(SandboxState) - {SandboxState.PARKED}


def sandboxes_of(tenant: Tenant) -> QuerySet[Sandbox]:
    """All sandboxes that this tenant has or had, with what is needed to show and to reach them."""
    return Sandbox.objects.filter(tenant=tenant).select_related("template", "node")


def sandboxes_live(tenant: Tenant) -> QuerySet[Sandbox]:
    """What counts against the quota and is listed by default."""
    return sandboxes_of(tenant).filter(state__in=LIVE_STATES)


def sandboxes_by_state(tenant: Tenant, state: str | None) -> QuerySet[Sandbox]:
    """Live ones for None, else those in that state. Raises `ValidationFailed` for a state that does not
    exist."""
    if state is None:
        return sandboxes_live(tenant)
    if state not in SHOWN_STATES:
        known = ", ".join(sorted(SHOWN_STATES))
        raise ValidationFailed.of("state", "invalid_state", f"state is one of {known}.")
    return sandboxes_of(tenant).filter(state=state)


def sandbox_get(tenant: Tenant, public_id: str) -> Sandbox:
    """Raises `NotFound`, for a stranger's sandbox as for one that never was. One query."""
    sandbox = only(sandboxes_of(tenant).filter(public_id=public_id))
    if sandbox is None:
        raise NotFound("There is no such sandbox.")
    return sandbox


def template_get(name: str) -> Template:
    """Raises `ValidationFailed` (`unknown_template`). One query."""
    template = only(Template.objects.filter(name=name, is_enabled=True))
    if template is None:
        raise ValidationFailed.of("template", "unknown_template", f"There is no template {name!r}.")
    return template


def templates_enabled() -> QuerySet[Template]:
    return Template.objects.filter(is_enabled=True).order_by("name")


def log_entries(sandbox: Sandbox, *, after: int, limit: int) -> list[SandboxLogEntry]:
    """What ran in it through the API, oldest first, from the entry behind `after` on."""
    return list(SandboxLogEntry.objects.filter(sandbox=sandbox, pk__gt=after).order_by("pk")[:limit])


def node_is_alive(prefix: str = "") -> Q:
    """A node that has said lately that it lives. `prefix` for queries through a relation, such as
    `node__`."""
    return Q(**{f"{prefix}heartbeat_at__gt": now() - seconds(HEARTBEAT_SECONDS)})


def node_is_usable(prefix: str = "") -> Q:
    """Alive, and its engine works."""
    return node_is_alive(prefix) & Q(**{f"{prefix}is_engine_up": True})


def nodes_usable() -> QuerySet[Node]:
    return Node.objects.filter(node_is_usable())


def soft_limits() -> list[str]:
    """Sentences about limits that do not hold on some live node, for templates and `doctor`."""
    rows = nodes_usable().values_list("soft_limits", flat=True)
    return sorted({sentence for row in rows for sentence in row})


def log_entries_latest(sandbox: Sandbox, *, limit: int) -> list[SandboxLogEntry]:
    """The last commands, newest first."""
    return list(SandboxLogEntry.objects.filter(sandbox=sandbox).order_by("-pk")[:limit])

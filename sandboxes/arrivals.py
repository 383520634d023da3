"""Cold sandboxes that wait to be made are made in the order in which they were asked for.

A message of the queue is a nudge that one more waits, and names none: whoever hears it makes the oldest. So
messages that come late, twice or never change nothing of the order, and the sweep of any node can stand in.
"""

from __future__ import annotations

from collections.abc import Callable

from django.db.models import Q, QuerySet

from e2a.core.clock import now
from sandboxes.host import Host
from sandboxes.models import Sandbox, SandboxState

Make = Callable[[Host, int], None]


def waiting_rows() -> QuerySet[Sandbox]:
    """Tenants' sandboxes that no node has taken up, the oldest first."""
    free = Q(lease_until__isnull=True) | Q(lease_until__lt=now())
    return Sandbox.objects.filter(
        free, state=SandboxState.CREATING, node__isnull=True, tenant__isnull=False
    ).order_by("pk")


def provision_waiting(host: Host, make: Make) -> int:
    """Make waiting sandboxes with `make`, the oldest first, until none waits; how many were begun.

    Returns at once when this host makes as many as it may already: each of those goes on with the next. A
    row that is written before this is called is seen by somebody. Raises HostFull.
    """
    made = 0
    while waiting_rows().exists() and host.making.acquire(blocking=False):
        try:
            pk = waiting_rows().exclude(pk__in=host.busy()).values_list("pk", flat=True).first()
            if pk is None:
                return made  # Another thread of ours has the last one in hand.
            make(host, pk)
            made += 1
        finally:
            host.making.release()
    return made


def queue_position(sandbox: Sandbox) -> int | None:
    """Its place among its tenant's own that wait, from 1; None when it does not wait. Others' are not counted:
    nobody learns how many there are. One query."""
    if sandbox.state != SandboxState.CREATING or sandbox.tenant_id is None:
        return None
    return (
        1
        + Sandbox.objects.filter(
            tenant_id=sandbox.tenant_id, state=SandboxState.CREATING, pk__lt=sandbox.pk
        ).count()
    )

"""Erasing a tenant for good: its secrets first, what runs next, its rows when nothing runs any more.

Every step may be repeated, and the next sweep goes on from what is there.
"""

from __future__ import annotations

import enum

import structlog
from django.db.models import ProtectedError

from accounts.models import Tenant
from accounts.services import tenant_forget
from keys.models import ApiKey
from sandboxes.models import DeathReason, Sandbox, SandboxState
from sandboxes.services import sandbox_destroy
from sandboxes.workspaces import tenant_files_remove
from secrets_vault.services import tenant_shred
from sessions_app.models import Event, Session
from sessions_app.selectors import live_sessions
from sessions_app.services import session_end

log = structlog.get_logger(__name__)

A_PASS = 200


class Erasure(enum.Enum):
    """How far a step came."""

    DONE = "nothing is left"
    MORE = "the next step can follow at once"
    WAITS = "for a node to take sandboxes away, a storage to delete files, or for what was made in between"


_WHY = "Its tenant was erased."


def tenants_to_erase() -> list[Tenant]:
    """Those that an operator had erased and that are still there."""
    return list(Tenant.objects.exclude(erase_asked_at=None).order_by("erase_asked_at")[:20])


def tenant_erase_step(tenant: Tenant) -> Erasure:
    """Do what can be done now. Done: nothing of the tenant is left but its audit trail."""
    tenant_shred(tenant=tenant)
    for session in live_sessions().select_related("sandbox", "tenant").filter(tenant=tenant)[:A_PASS]:
        session_end(session=session, reason=DeathReason.ADMIN, detail=_WHY)
    running = Sandbox.objects.filter(tenant=tenant).exclude(state=SandboxState.DESTROYED)
    for sandbox in running.select_related("node")[:A_PASS]:
        sandbox_destroy(sandbox=sandbox, reason=DeathReason.ADMIN, detail=_WHY)
    if running.exists() or live_sessions().filter(tenant=tenant).exists():
        return Erasure.WAITS
    sessions = list(Session.objects.filter(tenant=tenant).values_list("pk", flat=True)[:A_PASS])
    if sessions:
        # By session, so that no statement is larger than one session's log.
        for session_pk in sessions:
            Event.objects.filter(session_id=session_pk).delete()
        Session.objects.filter(pk__in=sessions).delete()
        return Erasure.MORE
    if tenant_files_remove(tenant):
        return Erasure.WAITS
    gone = list(Sandbox.objects.filter(tenant=tenant).values_list("pk", flat=True)[:A_PASS])
    if gone:
        Sandbox.objects.filter(pk__in=gone).delete()
        return Erasure.MORE
    ApiKey.objects.filter(tenant=tenant).delete()
    try:
        tenant_forget(tenant=tenant)
    except ProtectedError as error:  # Something was made in between, or is kept by hand.
        log.warning("tenant.erase_waits", tenant=tenant.public_id, because=str(error)[:300])
        return Erasure.WAITS
    log.info("tenant.erased", tenant=tenant.public_id)
    return Erasure.DONE

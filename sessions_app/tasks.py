"""Background work of sessions. Each task takes ids, reads the row, decides from it, and may run twice."""

from __future__ import annotations

import datetime as dt
from typing import Any

import structlog
from celery import shared_task
from celery.signals import worker_ready
from django.conf import settings
from django.db import transaction
from django.db.models import Q

from e2a.core.clock import now, seconds
from e2a.core.enqueue import enqueue
from keys.models import ApiKey
from sandboxes.models import UNREADY_STATES, DeathReason, Restore, Sandbox, SandboxState
from secrets_vault.models import Bundle, BundleUse
from sessions_app import frames
from sessions_app.erasing import Erasure, tenant_erase_step, tenants_to_erase
from sessions_app.idling import sessions_reap_idle
from sessions_app.log import append
from sessions_app.models import Event, Session, SessionStatus
from sessions_app.selectors import EVENTS_KEPT_SECONDS, live_sessions
from sessions_app.services import TOKEN_SECONDS, session_end, session_follow_sandbox, sessions_disconnect
from sessions_app.task_queue import leases_release_dead, sessions_with_work
from sessions_app.turns import session_work

log = structlog.get_logger(__name__)

START_SECONDS = 180
"""A session whose sandbox does not run by then is ended: something went wrong that nobody reported."""


@shared_task(name="sessions_app.tasks.turn_run")
def turn_run(session_id: int) -> None:
    """Run what the session has to run. A nudge: the rows say what there is."""
    session_work(session_id)


@shared_task(name="sessions_app.tasks.turns_sweep")
def turns_sweep() -> None:
    """Nudge sessions whose work nobody does: a lost message, or a lease that ran out."""
    for session_id in sessions_with_work():
        enqueue("sessions_app.tasks.turn_run", session_id=session_id)


@shared_task(name="sessions_app.tasks.sandbox_running")
def sandbox_running(sandbox_id: int) -> None:
    """A sandbox became ready: its session is, too."""
    _follow(sandbox_id)


@shared_task(name="sessions_app.tasks.sandbox_ended")
def sandbox_ended(sandbox_id: int) -> None:
    """A sandbox is gone: its session ends with the same reason."""
    _follow(sandbox_id)


def _follow(sandbox_id: int) -> None:
    sandbox = Sandbox.objects.get(pk=sandbox_id)
    session = live_sessions().select_related("tenant").filter(public_id=sandbox.owner).first()
    if session is not None:
        session_follow_sandbox(session=session, sandbox=sandbox)


@shared_task(name="sessions_app.tasks.sessions_reap")
def sessions_reap() -> None:
    """End sessions whose time is over, that idle too long, or that never started or lost their sandbox."""
    moment = now()
    for session in live_sessions().select_related("sandbox", "tenant").filter(expires_at__lte=moment)[:200]:
        session_end(session=session, reason=DeathReason.TTL, detail=f"lived for {session.ttl_seconds} s")
    sessions_reap_idle()
    starting = (
        live_sessions()
        .filter(status=SessionStatus.STARTING, created_at__lte=moment - seconds(START_SECONDS))
        .exclude(
            # Its sandbox has its own limit while files are put back.
            sandbox__restore=Restore.WANTED,
            sandbox__state__in=UNREADY_STATES,
        )
    )
    for session in starting.select_related("sandbox", "tenant")[:200]:
        session_end(
            session=session, reason=DeathReason.LOST, detail=f"did not start within {START_SECONDS} s"
        )
    _follow_missed()


def _follow_missed() -> None:
    """Sessions that a lost message left behind: their sandbox moved on and they did not hear of it."""
    behind = (
        live_sessions()
        .select_related("sandbox", "tenant")
        .filter(sandbox__state__in=[SandboxState.STOPPING, SandboxState.DESTROYED])
    )
    ready = (
        live_sessions()
        .select_related("sandbox", "tenant")
        .filter(status=SessionStatus.STARTING, sandbox__state=SandboxState.RUNNING)
    )
    for session in [*behind[:200], *ready[:200]]:
        assert session.sandbox is not None, "filtered by it"
        session_follow_sandbox(session=session, sandbox=session.sandbox)


@shared_task(name="sessions_app.tasks.bundle_changed")
def bundle_changed(bundle_id: int) -> None:
    """Tell the sessions that use a bundle: names and version only. The values are read when they are used."""
    bundle = Bundle.objects.filter(pk=bundle_id).first()
    if bundle is None:
        return
    newest = bundle.versions.order_by("-version").first()
    names = sorted(newest.values_set.values_list("name", flat=True)) if newest is not None else []
    holders = BundleUse.objects.filter(bundle=bundle).values_list("holder", flat=True)
    for session in live_sessions().filter(public_id__in=list(holders)):
        with transaction.atomic():
            append(session, [frames.secrets_updated(bundle=bundle.name, version=bundle.version, keys=names)])


@shared_task(name="sessions_app.tasks.key_revoked")
def key_revoked(key_id: int) -> None:
    """Close the sockets of the sessions that a revoked key made, and void their tokens.

    A token outlives its session by up to an hour, to read the log: those of ended sessions are voided as well.
    """
    if ApiKey.objects.filter(pk=key_id, revoked_at__isnull=False).exists():
        readable = Q(ended_at__isnull=True) | Q(ended_at__gt=now() - seconds(TOKEN_SECONDS))
        sessions_disconnect(list(Session.objects.filter(readable, api_key_id=key_id)))


@shared_task(name="sessions_app.tasks.events_purge")
def events_purge() -> None:
    """Delete the events of sessions that ended more than 30 days ago, a batch of sessions at a time."""
    before: dt.datetime = now() - seconds(EVENTS_KEPT_SECONDS)
    old = (
        Session.objects.filter(ended_at__lt=before, events__isnull=False)
        .distinct()
        .values_list("pk", flat=True)
    )
    Event.objects.filter(session_id__in=list(old[:100])).delete()


@shared_task(name="sessions_app.tasks.tenants_erase")
def tenants_erase() -> None:
    """Go on erasing the tenants that an operator had erased."""
    for tenant in tenants_to_erase():
        while tenant_erase_step(tenant) is Erasure.MORE:
            pass  # Each step takes a batch away, so this ends.


@worker_ready.connect
def worker_started(**kwargs: Any) -> None:
    """Take up at once what this host's killed workers left, rather than when their leases run out."""
    if settings.E2A.role != "worker":
        return
    released = leases_release_dead()
    if released:
        log.info("worker.leases_released", count=released)
    turns_sweep()

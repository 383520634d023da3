"""What may happen to a sandbox: create, configure, destroy, keep alive. What runs in it is `execution`."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog
from django.db import transaction
from django.db.models import Q

from accounts.models import Tenant
from e2a.core.clock import now, seconds
from e2a.core.enqueue import enqueue
from e2a.core.errors import (
    Conflict,
    DeadlineExceeded,
    GuestError,
    GuestUnreachable,
    QuotaExceeded,
    Unavailable,
)
from sandboxes.activity import TOUCH_SECONDS, sandbox_touch
from sandboxes.claims import Claim, sandbox_claim_or_miss
from sandboxes.configuration import (
    CONFIGURE_SECONDS,
    env_seal,
    guest_client,
    guest_configure,
    is_configuration_current,
)
from sandboxes.egress.rules import EgressRules
from sandboxes.egress.service import egress_tell
from sandboxes.guest_answers import answer_of, guest_answers, not_running
from sandboxes.guest_client import GuestClient
from sandboxes.lifecycle import move_record, sandbox_end, sandbox_move
from sandboxes.models import (
    LIVE_STATES,
    UNREADY_STATES,
    DeathReason,
    Node,
    PoolMiss,
    Restore,
    Sandbox,
    SandboxState,
    Template,
)
from sandboxes.pausing import sandbox_resume
from sandboxes.restoring import restore_begin
from sandboxes.selectors import node_is_alive, nodes_usable, template_get
from sandboxes.templates import TemplateNotReady, template_nodes, template_want
from sandboxes.waiting import database_release
from sandboxes.workspaces import WorkspaceKey, files_wanted
from secrets_vault.services import bundles_attach, bundles_release

log = structlog.get_logger(__name__)

READY_SECONDS = 30.0
_WARM_TRIES = 3
"""Parked sandboxes whose guest does not answer that one create may come across before it makes a cold one."""


def sandbox_create(
    *,
    tenant: Tenant,
    template_name: str,
    template: Template | None = None,
    idle_timeout_seconds: int = 300,
    max_lifetime_seconds: int = 7200,
    env_vars: Mapping[str, str] | None = None,
    bundle_names: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
    owner: str = "",
    snapshot: str = "",
    workspace: WorkspaceKey | None = None,
    egress: Mapping[str, Any] | None = None,
) -> Sandbox:
    """A sandbox for the tenant: `running` when a parked one could be claimed, else `creating`.

    `template` is the row of that name, where the caller has it. `owner` is the session that it is made for,
    which then holds the secret bundles; without one the sandbox does. The owner hears of a `running` one by
    this answer only. Raises `unknown_template`, `quota_exceeded`, `no_node`, `no_capacity`, `template_not_ready`,
    `runtime_unavailable`, the vault's errors for `bundle_names`, `snapshot_not_found`, `snapshot_not_ready`,
    `workspace_in_use`. One that starts with files (`snapshot`, or a `workspace` that has some) is `booting` at best:
    workers put them back. Nothing is left behind by a refusal. About ten queries and one call of the guest.
    """
    if template is None:
        template = template_get(template_name)
    owned = {
        "tenant": tenant,
        "owner": owner,
        "idle_timeout_seconds": idle_timeout_seconds,
        "max_lifetime_seconds": max_lifetime_seconds,
        "metadata": dict(metadata or {}),
        "egress": dict(egress or {}),
    }
    for attempt in range(_WARM_TRIES + 1):
        try:
            sandbox = _admit(
                template,
                owned,
                env_vars or {},
                bundle_names,
                failed_claims=attempt,
                files=lambda: files_wanted(tenant, snapshot, workspace),
            )
        except TemplateNotReady:
            template_want(template)
            raise
        if sandbox.state == SandboxState.CREATING:
            return sandbox
        try:
            if sandbox.restore == Restore.WANTED:
                guest_client(sandbox, timeout_seconds=CONFIGURE_SECONDS).health()
                restore_begin(sandbox)
            else:
                sandbox_configure(sandbox, tell_owner=False)
        except (GuestUnreachable, DeadlineExceeded) as error:
            log.warning("sandbox.claim_failed", sandbox=sandbox.public_id, error=error.detail)
            _give_back_dead(sandbox, is_holder=bool(bundle_names) and not owner, why=error.detail)
        except GuestError as error:
            sandbox_end(sandbox, reason=DeathReason.LOST, detail="Its guest refused its configuration.")
            raise answer_of(error) from error
        except BaseException:
            sandbox_end(sandbox, reason=DeathReason.LOST, detail="It could not be configured.")
            raise
        else:
            return sandbox
        if owner:
            bundle_names = ()  # The session holds them since the first try.
    raise AssertionError("the last try makes a cold one")


def _admit(
    template: Template,
    owned: Mapping[str, Any],
    env_vars: Mapping[str, str],
    bundle_names: Sequence[str],
    *,
    failed_claims: int,
    files: Callable[[], dict[str, Any]],
) -> Sandbox:
    """Within the quota, a claimed sandbox or a new row, with its bundles attached; all or nothing."""
    tenant: Tenant = owned["tenant"]
    with transaction.atomic():
        _quota_hold(tenant)
        values = dict(owned) | files()
        values["expires_at"] = now() + seconds(owned["max_lifetime_seconds"])
        values["env_sealed"] = env_seal(tenant, env_vars)
        claim = sandbox_claim_or_miss(template, **values) if failed_claims < _WARM_TRIES else Claim(None)
        sandbox = claim.sandbox
        if sandbox is None:
            _capacity_check(template)
            values["pool_miss"] = PoolMiss.NOT_CONFIGURED if failed_claims else claim.miss or PoolMiss.EMPTY
            sandbox = _cold_row(template, values)
        if bundle_names:
            bundles_attach(tenant=tenant, names=list(bundle_names), holder=sandbox.owner or sandbox.public_id)
    return sandbox


def _quota_hold(tenant: Tenant) -> None:
    """Raises QuotaExceeded. The tenant's row stays locked until the transaction ends, so that racing creates
    count."""
    allowed = (
        Tenant.objects.select_for_update().values_list("max_live_sandboxes", flat=True).get(pk=tenant.pk)
    )
    if Sandbox.objects.filter(tenant=tenant, state__in=LIVE_STATES).count() >= allowed:
        raise QuotaExceeded(f"At most {allowed} sandboxes may live at once.")


def _capacity_check(template: Template) -> None:
    """Raises 503 `no_node` when nobody could make a sandbox now, 409 `no_capacity` when every node is full.

    And what `template_nodes` raises: no node has the image, or the runtime.

    Parked sandboxes give way, so they do not count. Not exact under a race: a row too many waits, then fails
    by its time.
    """
    nodes = list(nodes_usable())
    if not nodes:
        raise Unavailable(_why_no_node(), code="no_node")
    nodes = template_nodes(template, nodes)
    here = Q(node__in=nodes) | Q(node__isnull=True)
    taken = (
        Sandbox.objects.filter(here).exclude(state__in=[SandboxState.DESTROYED, SandboxState.PARKED]).count()
    )
    if taken >= sum(node.capacity for node in nodes):
        raise Conflict("Every node is full.", code="no_capacity")


def _why_no_node() -> str:
    if Node.objects.filter(node_is_alive()).exists():
        return "The container engine does not answer on any node; it is tried again every few seconds."
    return "No node is alive."


def _cold_row(template: Template, values: Mapping[str, Any]) -> Sandbox:
    moment = now()
    sandbox = Sandbox.objects.create(
        template=template, created_at=moment, claimed_at=moment, last_active_at=moment, **values
    )
    move_record(sandbox, from_state="", to=SandboxState.CREATING, why="asked for")
    enqueue("sandboxes.tasks.sandbox_provision", sandbox_id=sandbox.pk)
    return sandbox


def _give_back_dead(sandbox: Sandbox, *, is_holder: bool, why: str) -> None:
    """A claimed sandbox was dead: it is nobody's again, and taken away."""
    with transaction.atomic():
        if is_holder:
            bundles_release(holder=sandbox.public_id)
        Sandbox.objects.filter(pk=sandbox.pk).update(
            tenant=None,
            owner="",
            env_sealed=b"",
            metadata={},
            workspace=None,
            snapshot=None,
            restore=Restore.NOTHING,
        )
        sandbox.tenant, sandbox.owner = None, ""
        sandbox_end(
            sandbox, reason=DeathReason.LOST, detail="Its guest did not answer when it was claimed.", why=why
        )


def sandbox_configure(sandbox: Sandbox, *, tell_owner: bool = True) -> bool:
    """Tell the guest what it needs, and make a `booting` sandbox `running`. Whether this call made it so.

    `tell_owner`: its session hears of it by a message. Raises GuestError, GuestUnreachable,
    DeadlineExceeded. Twice is fine.
    """
    guest_configure(sandbox)
    if sandbox.state == SandboxState.RUNNING:
        Sandbox.objects.filter(pk=sandbox.pk).update(configured_with=sandbox.configured_with)
        return False
    with transaction.atomic():
        moved = sandbox_move(
            sandbox,
            to=SandboxState.RUNNING,
            why="configured",
            only_if=Q(tenant__isnull=False) & ~Q(restore=Restore.WANTED),
            configured_with=sandbox.configured_with,
            ready_at=now(),
            lease_until=None,
            lease_holder="",
        )
        if moved and sandbox.owner and tell_owner:
            enqueue("sessions_app.tasks.sandbox_running", sandbox_id=sandbox.pk)
    return moved


def sandbox_ensure_configured(sandbox: Sandbox) -> None:
    """Before a command: send the secrets again when one was replaced, the deadline when it moved. At most one
    query."""
    if not is_configuration_current(sandbox):
        with guest_answers(sandbox):
            sandbox_configure(sandbox)


def sandbox_destroy(*, sandbox: Sandbox, reason: DeathReason, detail: str = "") -> bool:
    """End it. Whether this call was the one that did; when it had ended already, nothing happens.

    Its node takes the container away within moments; a node that is down does it when it is back.
    """
    return sandbox_end(sandbox, reason=reason, detail=detail)


def sandbox_used(sandbox: Sandbox) -> None:
    """As `sandbox_touch`, without a query when the instance knows that it was touched in the last 5 s."""
    active = sandbox.last_active_at
    if active is None or active < now() - seconds(TOUCH_SECONDS):
        sandbox_touch(sandbox.pk)
        sandbox.last_active_at = now()


def sandbox_egress_change(*, sandbox: Sandbox, rules: EgressRules) -> Sandbox:
    """Replace its own rules. Its gateway is told at once, and cuts what is open and not allowed any more.

    Raises `Conflict` (`not_running`) when it has ended; 503 `sandbox_unreachable` when its gateway is silent: the
    rules are kept then, and told at its next use or when this is asked again. Nothing gets out until it is back.
    """
    return _egress_change(sandbox, lambda own: rules)


def sandbox_egress_add(*, sandbox: Sandbox, rules: EgressRules) -> Sandbox:
    """Add to its own rules; what others add at the same moment stays. Raises as `sandbox_egress_change`."""
    return _egress_change(sandbox, lambda own: own.joined(rules))


def _egress_change(sandbox: Sandbox, change: Callable[[EgressRules], EgressRules]) -> Sandbox:
    with transaction.atomic():
        rows = Sandbox.objects.filter(pk=sandbox.pk).exclude(
            state__in=[SandboxState.STOPPING, SandboxState.DESTROYED]
        )
        own = rows.select_for_update().values_list("egress", flat=True).first()
        if own is None or not rows.update(egress=change(EgressRules.stored(own)).as_json()):
            raise not_running(sandbox)
    sandbox.refresh_from_db()  # It may run by now.
    if sandbox.state in (SandboxState.RUNNING, SandboxState.PAUSED):
        with guest_answers(sandbox):
            egress_tell(sandbox, guest_client(sandbox, timeout_seconds=CONFIGURE_SECONDS))
    return sandbox


def sandbox_extend(*, sandbox: Sandbox, seconds_more: int) -> Sandbox:
    """Keep it for that long although it idles, never beyond its `expires_at`; a longer time that somebody asked for
    stays. Raises `Conflict` (`not_running`) when it has ended, be it at this moment."""
    if sandbox.state not in LIVE_STATES:
        raise not_running(sandbox)
    # Idle time is counted from last_active_at, which may lie ahead. The reaper ends a row only if its clock is as the
    # reaper read it: whichever UPDATE is first wins, and the other one does nothing.
    active = now() + seconds(seconds_more) - seconds(sandbox.idle_timeout_seconds)
    Sandbox.objects.filter(pk=sandbox.pk, state__in=LIVE_STATES, last_active_at__lt=active).update(
        last_active_at=active
    )
    sandbox.refresh_from_db(fields=["last_active_at", "state", "death_reason"])
    if sandbox.state not in LIVE_STATES:
        raise not_running(sandbox)
    return sandbox


def sandbox_end_move(*, sandbox_pk: int, expires_at: dt.datetime, lifetime_seconds: int) -> None:
    """Its life ends at another time. Nothing happens to one that has ended. `sandbox_end_tell` is to follow, after
    the commit."""
    Sandbox.objects.filter(pk=sandbox_pk, state__in=LIVE_STATES).update(
        expires_at=expires_at, max_lifetime_seconds=lifetime_seconds
    )


def sandbox_end_tell(sandbox_pk: int) -> None:
    """Its guest, which ends itself at its deadline, hears of the new one: now when it runs, else when it is thawed.

    Raises 503 `sandbox_unreachable` when the guest is silent: then the next command sends it again.
    """
    rows = Sandbox.objects.filter(pk=sandbox_pk, state=SandboxState.RUNNING, frozen_at__isnull=True)
    sandbox = rows.filter(expires_at__gt=now()).select_related("node", "tenant", "template").first()
    if sandbox is not None:
        with guest_answers(sandbox):
            sandbox_configure(sandbox)


def sandbox_client(sandbox: Sandbox) -> GuestClient:
    """A client of its guest. Raises `Conflict` (`not_running`) when no node has it."""
    return guest_client(sandbox)


def sandbox_wait_running(sandbox: Sandbox, *, wait_seconds: float = READY_SECONDS) -> None:
    """Return once it runs: at once when the instance says so, without a query.

    A paused one is resumed. Raises `Conflict` (`not_running`) when it has ended, `Unavailable`
    (`sandbox_not_ready`) after `wait_seconds`.
    """
    give_up_at = time.monotonic() + wait_seconds
    pause = 0.02
    while sandbox.state in UNREADY_STATES:
        if time.monotonic() > give_up_at:
            raise Unavailable(
                f"The sandbox is still {sandbox.state} after {wait_seconds:g} s.", code="sandbox_not_ready"
            )
        database_release()
        time.sleep(pause)
        pause = min(pause * 1.5, 0.25)
        sandbox.refresh_from_db()
    if sandbox.state == SandboxState.PAUSED or sandbox.frozen_at is not None:
        sandbox_resume(sandbox=sandbox, why="used while paused")
    if sandbox.state != SandboxState.RUNNING:
        raise not_running(sandbox)

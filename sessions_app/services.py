"""What may happen to a session: create, end, hand out a token, change, and follow its sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
from django.db import transaction
from django.db.models import Q

from accounts.principal import Principal
from accounts.tokens import session_token_issue
from e2a.core.clock import now, seconds
from e2a.core.enqueue import enqueue
from e2a.core.errors import Conflict, E2AError
from e2a.core.hints import publish
from e2a.core.states import advance
from sandboxes.activity import viewer_attached, viewer_left
from sandboxes.egress.rules import EgressRules
from sandboxes.models import DeathReason, Sandbox, SandboxState
from sandboxes.services import (
    sandbox_create,
    sandbox_destroy,
    sandbox_egress_change,
    sandbox_end_move,
    sandbox_end_tell,
)
from sandboxes.workspaces import WorkspaceKey
from secrets_vault.services import bundles_attach, bundles_release, inline_bundle_create
from sessions_app import frames
from sessions_app.frames import Frame
from sessions_app.log import append, group_of
from sessions_app.models import SESSION_TRANSITIONS, Session, SessionStatus, Task, TaskState
from sessions_app.rules import LLMChoice, agent_check, llm_check

log = structlog.get_logger(__name__)

TOKEN_SECONDS = 3600
EXIT_CODE_OF_END = {DeathReason.OOM: 137, DeathReason.TTL: 124, DeathReason.IDLE: 124}
"""What a task that was cut off by the end of its session answers; 130 for all other ends."""


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """What a caller asks for, already checked for form."""

    agent_kind: str
    user_id: str
    template: str = "standard"
    agent: dict[str, Any] = field(default_factory=dict)
    llm: LLMChoice | None = None
    secrets: tuple[str, ...] = ()
    inline_values: dict[str, str] | None = None
    ttl_seconds: int = 3600
    idle_timeout_seconds: int = 900
    budget: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    app: dict[str, Any] | None = None
    env_vars: dict[str, str] = field(default_factory=dict)
    snapshot: str = ""
    workspace: str = ""
    egress: dict[str, Any] = field(default_factory=dict)


def session_create(*, principal: Principal, spec: SessionSpec) -> Session:
    """A session and its sandbox: warm when one is parked, else `starting`.

    Raises the errors of CONTRACT 5: `unknown_agent`, `unknown_template`, `secret_not_found`, `secret_collision`,
    `missing_llm_key`, `origin_mismatch`, `quota_exceeded`, `no_capacity`, `no_node`. A refusal leaves nothing behind.
    """
    template = agent_check(spec.agent_kind, spec.template)
    moment = now()
    with transaction.atomic():
        session = Session.objects.create(
            tenant=principal.tenant,
            api_key_id=principal.key_pk,
            created_by=principal.user,
            user_id=spec.user_id,
            agent_kind=spec.agent_kind,
            agent=spec.agent,
            template_name=spec.template,
            metadata=spec.metadata,
            app=spec.app,
            budget=spec.budget,
            workspace=spec.workspace,
            egress=spec.egress,
            ttl_seconds=spec.ttl_seconds,
            idle_timeout_seconds=spec.idle_timeout_seconds,
            created_at=moment,
            last_active_at=moment,
            expires_at=moment + seconds(spec.ttl_seconds),
        )
        if spec.secrets:
            bundles_attach(tenant=principal.tenant, names=spec.secrets, holder=session.public_id)
        if spec.inline_values:
            inline_bundle_create(tenant=principal.tenant, holder=session.public_id, values=spec.inline_values)
        choice = llm_check(principal=principal, session=session, choice=spec.llm)
        if choice is not None:
            session.llm_vendor, session.llm_model, session.llm_base_url = (
                choice.vendor,
                choice.model,
                choice.base_url,
            )
            session.save(update_fields=["llm_vendor", "llm_model", "llm_base_url"])
    try:
        sandbox = sandbox_create(
            tenant=principal.tenant,
            template_name=spec.template,
            template=template,
            idle_timeout_seconds=spec.idle_timeout_seconds,
            max_lifetime_seconds=spec.ttl_seconds,
            env_vars=spec.env_vars,
            metadata={},
            owner=session.public_id,
            snapshot=spec.snapshot,
            workspace=_workspace_key(spec),
            egress=spec.egress,
        )
    except E2AError:
        with transaction.atomic():
            bundles_release(holder=session.public_id)
            session.delete()
        raise
    session.sandbox = sandbox
    with transaction.atomic():
        if sandbox.state == SandboxState.RUNNING and _session_start(session, sandbox=sandbox):
            return session
        Session.objects.filter(pk=session.pk).update(sandbox=sandbox)
        session_follow_sandbox(session=session, sandbox=sandbox)
    session.refresh_from_db(fields=["status", "last_seq"])
    return session


def _workspace_key(spec: SessionSpec) -> WorkspaceKey | None:
    """Of whom a session's workspace is: this end user, in this app. Capability sets say what an app may, not which it
    is."""
    if not spec.workspace:
        return None
    app = spec.app or {}
    parts = [str(app[name]) for name in ("id", "set_id") if app.get(name)]
    return WorkspaceKey(spec.workspace, user_id=spec.user_id, app="/".join(parts))


def session_follow_sandbox(*, session: Session, sandbox: Sandbox) -> None:
    """Make the session's status agree with its sandbox: ready → `idle` (and its first task starts), gone → `ended`.

    May run twice, and before the session's row names the sandbox.
    """
    if sandbox.state in (SandboxState.STOPPING, SandboxState.DESTROYED):
        session_end(
            session=session,
            reason=DeathReason(sandbox.death_reason or DeathReason.LOST),
            detail=sandbox.death_detail,
        )
        return
    if sandbox.state not in (SandboxState.RUNNING, SandboxState.PAUSED):
        return
    with transaction.atomic():
        _session_start(session)


def _session_start(session: Session, **updates: Any) -> bool:
    """A `starting` session becomes `idle`, and what waits in it is begun. False when it was not `starting` any
    more."""
    if not session_advance(session, SessionStatus.IDLE, only_from=SessionStatus.STARTING, **updates):
        return False
    seq = append(session, [frames.status(SessionStatus.IDLE)])
    # A task that waits has left a frame before this one.
    if seq > 1 and session.tasks.filter(state=TaskState.QUEUED).exists():
        enqueue("sessions_app.tasks.turn_run", session_id=session.pk)
    return True


def session_advance(
    session: Session,
    to: SessionStatus,
    *,
    only_from: SessionStatus | None = None,
    only_if: Q | None = None,
    **updates: Any,
) -> bool:
    """Move the session's status by compare-and-swap; False when somebody else was first, or `only_if` does not
    hold."""
    rows = Session.objects.filter(Q() if only_if is None else only_if, pk=session.pk)
    if only_from is not None:
        rows = rows.filter(status=only_from)
    moved = advance(rows, to=to, field="status", transitions=SESSION_TRANSITIONS, **updates) == 1
    if moved:
        session.status = to
    return moved


def session_token(session: Session) -> tuple[str, Any]:
    """A session JWT and when it ends: at the session's end, at most an hour from now. Raises `Conflict` when ended."""
    if session.status == SessionStatus.ENDED:
        raise Conflict("This session has ended.", code="session_ended")
    expires = min(session.expires_at, now() + seconds(TOKEN_SECONDS))
    token = session_token_issue(
        session_public_id=session.public_id,
        tenant_public_id=session.tenant.public_id,
        version=session.token_version,
        expires_at=expires,
    )
    return token, expires


def session_end(*, session: Session, reason: DeathReason, detail: str = "", only_if: Q | None = None) -> bool:
    """End a session: every open task gets its one `exit`, then the status, then the sandbox goes. Twice is fine.

    Returns whether this call was the one that ended it.
    """
    with transaction.atomic():
        if not session_advance(
            session,
            SessionStatus.ENDED,
            only_if=only_if,
            end_reason=reason,
            end_detail=detail[:500],
            ended_at=now(),
        ):
            return False
        session.end_reason, session.end_detail = reason, detail[:500]
        append(
            session,
            [
                *_exits_of_open_tasks(session, reason),
                frames.status("ended", end_reason=reason, detail=detail),
            ],
        )
        bundles_release(holder=session.public_id)
        public_id = session.public_id
        transaction.on_commit(lambda: publish(group_of(public_id), {"type": "session.over"}))
    sandbox = Sandbox.objects.filter(owner=session.public_id).exclude(state=SandboxState.DESTROYED).first()
    if sandbox is not None:
        sandbox_destroy(sandbox=sandbox, reason=reason, detail=detail)
    log.info("session.ended", session=session.public_id, reason=str(reason))
    return True


def _exits_of_open_tasks(session: Session, reason: DeathReason) -> list[Frame]:
    exits: list[Frame] = []
    for task in session.tasks.exclude(state=TaskState.DONE).order_by("pk"):
        code = EXIT_CODE_OF_END.get(reason, 130)
        if (
            Task.objects.filter(pk=task.pk)
            .exclude(state=TaskState.DONE)
            .update(
                state=TaskState.DONE, exit_code=code, exit_reason=reason, ended_at=now(), lease_until=None
            )
        ):
            exits.append(frames.exit_frame(task.pk, exit_code=code, reason=str(reason)))
    return exits


def session_patch(*, session: Session, changes: dict[str, Any]) -> Session:
    """Change a live session's `budget`, `ttl_seconds` (from its creation on), `metadata`, `egress`.

    The end of its sandbox moves with its own, and so do its egress rules, at once. Raises `Conflict` when it has ended.
    """
    with transaction.atomic():
        updates: dict[str, Any] = {}
        if "budget" in changes:
            updates["budget"] = changes["budget"] or {}
        if "metadata" in changes:
            updates["metadata"] = changes["metadata"]
        if "egress" in changes:
            updates["egress"] = changes["egress"]
        if "ttl_seconds" in changes:
            updates["ttl_seconds"] = changes["ttl_seconds"]
            updates["expires_at"] = session.created_at + seconds(changes["ttl_seconds"])
        rows = Session.objects.filter(pk=session.pk).exclude(status=SessionStatus.ENDED)
        if updates and not rows.update(**updates):
            raise Conflict("This session has ended.", code="session_ended")
        if "expires_at" in updates and session.sandbox_id is not None:
            sandbox_end_move(
                sandbox_pk=session.sandbox_id,
                expires_at=updates["expires_at"],
                lifetime_seconds=updates["ttl_seconds"],
            )
    if "expires_at" in updates and session.sandbox_id is not None:
        sandbox_end_tell(session.sandbox_id)
    if "egress" in updates and session.sandbox_id is not None:
        sandbox = Sandbox.objects.select_related("node", "template").get(pk=session.sandbox_id)
        sandbox_egress_change(sandbox=sandbox, rules=EgressRules.stored(updates["egress"]))
    session.refresh_from_db()
    return session


def session_touch(session_pk: int) -> None:
    """Something happened: idle time starts anew. Its sandbox has a clock too; whichever is later counts."""
    Session.objects.filter(pk=session_pk).update(last_active_at=now())


def session_viewed(session_pk: int, viewer_id: str) -> None:
    """A socket of the session is open: it does not idle for the next 75 s. To be called every `BEAT_SECONDS`."""
    session_touch(session_pk)
    if (sandbox_pk := _sandbox_of(session_pk)) is not None:
        viewer_attached(sandbox_pk, "session", viewer_id)


def session_view_left(session_pk: int, viewer_id: str) -> None:
    """The socket is closed: idle time begins now."""
    session_touch(session_pk)
    if (sandbox_pk := _sandbox_of(session_pk)) is not None:
        viewer_left(sandbox_pk, "session", viewer_id)


def _sandbox_of(session_pk: int) -> int | None:
    found: int | None = Session.objects.filter(pk=session_pk).values_list("sandbox_id", flat=True).first()
    return found


def sessions_disconnect(sessions: Sequence[Session]) -> None:
    """Close these sessions' sockets with 4401 and void their tokens: their key was revoked."""
    for session in sessions:
        Session.objects.filter(pk=session.pk).update(token_version=session.token_version + 1)
        publish(group_of(session.public_id), {"type": "session.revoked"})

"""Agent sessions, their tasks, and the one event log that everybody reads."""

from __future__ import annotations

from typing import Final

from django.db import models

from accounts.models import Tenant, User
from e2a.core.ids import PublicIdField
from e2a.core.states import Transitions
from keys.models import ApiKey
from sandboxes.models import DeathReason, Sandbox


class SessionStatus(models.TextChoices):
    STARTING = "starting"
    IDLE = "idle"
    RUNNING = "running"
    WAITING = "waiting"
    ENDED = "ended"


class StopReason(models.TextChoices):
    END_TURN = "end_turn"
    CANCELLED = "cancelled"
    ERROR = "error"
    MAX_TURNS = "max_turns"
    BUDGET = "budget"


_S = SessionStatus
SESSION_TRANSITIONS: Final[Transitions] = {
    _S.IDLE: frozenset({_S.STARTING, _S.RUNNING, _S.WAITING}),
    _S.RUNNING: frozenset({_S.STARTING, _S.IDLE, _S.WAITING}),
    _S.WAITING: frozenset({_S.RUNNING}),
    _S.ENDED: frozenset({_S.STARTING, _S.IDLE, _S.RUNNING, _S.WAITING}),
}


class Session(models.Model):
    """One agent in one sandbox. `last_seq` heads its event log; it is advanced by UPDATE, which gives the order."""

    public_id = PublicIdField("ses")
    tenant = models.ForeignKey(Tenant, on_delete=models.PROTECT, related_name="agent_sessions")
    api_key = models.ForeignKey(
        ApiKey, on_delete=models.SET_NULL, null=True, blank=True, related_name="agent_sessions"
    )
    created_by = models.ForeignKey(User, on_delete=models.SET_NULL, null=True, blank=True)
    sandbox = models.OneToOneField(
        Sandbox, on_delete=models.SET_NULL, null=True, related_name="agent_session"
    )
    user_id = models.CharField(max_length=128, help_text="The caller's own end user.")
    agent_kind = models.CharField(max_length=32)
    agent = models.JSONField(default=dict, help_text="system, tools, max_turns, approvals, mcp_servers.")
    template_name = models.CharField(max_length=63)
    llm_vendor = models.CharField(max_length=32, blank=True)
    llm_model = models.CharField(max_length=128, blank=True)
    llm_base_url = models.CharField(max_length=2048, blank=True)
    status = models.CharField(max_length=16, choices=SessionStatus, default=SessionStatus.STARTING)
    stop_reason = models.CharField(max_length=16, choices=StopReason, blank=True)
    end_reason = models.CharField(max_length=16, choices=DeathReason, blank=True)
    end_detail = models.CharField(max_length=500, blank=True)
    last_seq = models.PositiveBigIntegerField(default=0)
    first_seq = models.PositiveBigIntegerField(default=1, help_text="The oldest event still stored.")
    budget = models.JSONField(default=dict, blank=True)
    input_tokens = models.PositiveBigIntegerField(default=0)
    output_tokens = models.PositiveBigIntegerField(default=0)
    cache_read_tokens = models.PositiveBigIntegerField(default=0)
    cost_usd = models.DecimalField(max_digits=14, decimal_places=6, default=0)
    metadata = models.JSONField(default=dict, blank=True)
    app = models.JSONField(null=True, blank=True)
    egress = models.JSONField(default=dict, blank=True)
    workspace = models.CharField(max_length=128, blank=True)
    ttl_seconds = models.PositiveIntegerField(default=3600)
    idle_timeout_seconds = models.PositiveIntegerField(default=900)
    token_version = models.PositiveIntegerField(default=1, editable=False)
    created_at = models.DateTimeField(db_index=True)
    expires_at = models.DateTimeField(db_index=True)
    last_active_at = models.DateTimeField()
    ended_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        indexes = [
            models.Index(fields=["tenant", "-id"], name="session_tenant"),
            models.Index(fields=["tenant", "user_id", "-id"], name="session_user"),
            models.Index(fields=["status", "expires_at"], name="session_status"),
        ]

    def __str__(self) -> str:
        return self.public_id


class TaskState(models.TextChoices):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"


TASK_TRANSITIONS: Final[Transitions] = {
    TaskState.RUNNING: frozenset({TaskState.QUEUED}),
    TaskState.DONE: frozenset({TaskState.QUEUED, TaskState.RUNNING}),
}


class Task(models.Model):
    """One prompt. `attempt` is the fencing number: each worker that takes it over has a higher one."""

    public_id = PublicIdField("tsk")
    session = models.ForeignKey(Session, on_delete=models.CASCADE, related_name="tasks")
    client_id = models.CharField(max_length=128, null=True, blank=True)
    prompt = models.TextField()
    state = models.CharField(max_length=16, choices=TaskState, default=TaskState.QUEUED)
    attempt = models.PositiveIntegerField(default=0)
    lease_owner = models.CharField(max_length=80, blank=True)
    lease_until = models.DateTimeField(null=True, blank=True)
    cancel_requested_at = models.DateTimeField(null=True, blank=True)
    exit_code = models.IntegerField(null=True, blank=True)
    exit_reason = models.CharField(max_length=64, blank=True)
    result = models.TextField(blank=True)
    usage = models.JSONField(default=dict, blank=True)
    created_at = models.DateTimeField()
    started_at = models.DateTimeField(null=True, blank=True)
    ended_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["session", "client_id"], name="task_client_id_once"),
            models.UniqueConstraint(
                fields=["session"], condition=models.Q(state="running"), name="one_running_task_a_session"
            ),
        ]
        indexes = [models.Index(fields=["state", "lease_until"], name="task_lease")]

    def __str__(self) -> str:
        return self.public_id


class Event(models.Model):
    """One stored frame. `data` is what clients see; `private` is what a worker needs to go on after a crash (the
    model's message as the vendor sent it, offsets of a command's output) and never leaves."""

    session = models.ForeignKey(Session, on_delete=models.CASCADE, related_name="events")
    seq = models.PositiveBigIntegerField()
    type = models.CharField(max_length=32)
    task = models.ForeignKey(Task, on_delete=models.CASCADE, null=True, blank=True, related_name="events")
    ts = models.DateTimeField()
    data = models.JSONField(default=dict)
    private = models.JSONField(null=True, blank=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["session", "seq"], name="event_seq_once")]

    def __str__(self) -> str:
        return f"{self.session_id}:{self.seq} {self.type}"


class ModelCall(models.Model):
    """The ledger: one row a model call that a vendor answered, of our own loop or of a program in a sandbox."""

    tenant = models.ForeignKey(Tenant, on_delete=models.CASCADE, related_name="model_calls")
    session = models.ForeignKey(
        Session, on_delete=models.SET_NULL, null=True, blank=True, related_name="model_calls"
    )
    task = models.ForeignKey(Task, on_delete=models.SET_NULL, null=True, blank=True, related_name="+")
    sandbox_id = models.CharField(max_length=64, help_text="Its public id; the row may be gone.")
    vendor = models.CharField(max_length=32)
    model = models.CharField(max_length=128)
    status = models.PositiveSmallIntegerField(help_text="The vendor's HTTP status.")
    is_whole = models.BooleanField(help_text="False: it broke off, and cost at least this.")
    input_tokens = models.PositiveBigIntegerField(default=0)
    output_tokens = models.PositiveBigIntegerField(default=0)
    cache_read_tokens = models.PositiveBigIntegerField(default=0)
    cost_usd = models.DecimalField(
        max_digits=14, decimal_places=6, null=True, blank=True, help_text="Empty: the price is not known."
    )
    duration_ms = models.PositiveIntegerField(default=0)
    ended_at = models.DateTimeField()

    class Meta:
        indexes = [models.Index(fields=["tenant", "ended_at"], name="model_call_bill")]

    def __str__(self) -> str:
        return f"{self.sandbox_id} {self.model}"

"""Sandboxes and the hosts that run them. The row is the wish; the engine is the fact; reconcile makes them
agree."""

from __future__ import annotations

from typing import Final

from django.db import models

from accounts.models import Tenant
from e2a.core.ids import PublicIdField
from e2a.core.states import Transitions
from sandboxes.snapshot_models import Snapshot as Snapshot
from sandboxes.snapshot_models import Workspace as Workspace


class Node(models.Model):
    """A Docker host: one `node` process and one `gateway` process. Alive while its heartbeat is younger than
    30 s."""

    name = models.CharField(max_length=64, unique=True)
    address = models.CharField(
        max_length=200, help_text="Where its gateway listens: unix:/path or tcp:host:port."
    )
    engine = models.CharField(max_length=16)
    engine_version = models.CharField(max_length=64, blank=True)
    is_engine_up = models.BooleanField(default=False)
    detail = models.CharField(max_length=300, blank=True)
    soft_limits = models.JSONField(default=list, blank=True)
    capacity = models.PositiveIntegerField(
        default=0, help_text="How many sandboxes it may hold, parked ones too."
    )
    heartbeat_at = models.DateTimeField(null=True)
    pool = models.JSONField(
        default=dict, blank=True, help_text="How many parked ones of each template it keeps: E2A_POOL."
    )
    notice = models.CharField(
        max_length=300, blank=True, help_text="What an operator must look at on this node."
    )
    runtimes = models.JSONField(
        default=list, blank=True, help_text="What its engine can run containers with."
    )
    images = models.JSONField(
        default=dict, blank=True, help_text="By template: the image's tag and the digest that is run."
    )
    old_images = models.JSONField(
        default=list, blank=True, help_text="Tags that newer ones replaced here, to be removed once unused."
    )

    def __str__(self) -> str:
        return self.name


class TemplateState(models.TextChoices):
    TRYING = "trying", "being tried on a node"
    READY = "ready"
    REFUSED = "refused"


class ContainerRuntime(models.TextChoices):
    RUNC = "runc"
    CRUN = "crun"
    RUNSC = "runsc", "runsc (gVisor)"


class Template(models.Model):
    """What a sandbox is made from: the catalogue's, or an operator's own (`is_custom`)."""

    name = models.SlugField(max_length=63, unique=True)
    description = models.CharField(max_length=300, blank=True)
    image = models.CharField(max_length=300, help_text="The image as it was asked for.")
    image_id = models.CharField(max_length=100, blank=True, help_text="The digest that is run.")
    vcpu = models.DecimalField(max_digits=5, decimal_places=2)
    memory_mib = models.PositiveIntegerField()
    disk_mib = models.PositiveIntegerField()
    pids = models.PositiveIntegerField(default=256)
    shm_mib = models.PositiveIntegerField(default=64)
    agents = models.JSONField(default=list)
    runtime = models.CharField(
        max_length=32,
        blank=True,
        choices=ContainerRuntime,
        help_text="Empty: E2A_DOCKER_RUNTIME. Never replaced by another: a node that has not got it makes none.",
    )
    is_custom = models.BooleanField(default=False, editable=False, help_text="An operator's own image.")
    state = models.CharField(
        max_length=16, choices=TemplateState, default=TemplateState.READY, editable=False
    )
    refusal = models.CharField(max_length=500, blank=True, editable=False)
    trial_started_at = models.DateTimeField(null=True, blank=True, editable=False)
    wanted_at = models.DateTimeField(
        null=True,
        blank=True,
        editable=False,
        help_text="Somebody wanted a sandbox, and no node had the image.",
    )
    egress = models.JSONField(
        default=dict,
        blank=True,
        help_text='What every sandbox of it may reach: {"allow": [hosts], "deny": [hosts]}.',
    )
    is_enabled = models.BooleanField(default=True)
    created_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return self.name


class SandboxState(models.TextChoices):
    CREATING = "creating"
    CONFIGURING = "configuring"
    BOOTING = "booting"
    PARKED = "parked"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    DESTROYED = "destroyed"


_S = SandboxState
TRANSITIONS: Final[Transitions] = {
    _S.CREATING: frozenset({_S.CONFIGURING}),
    _S.CONFIGURING: frozenset({_S.CREATING}),
    _S.BOOTING: frozenset({_S.CONFIGURING, _S.PARKED}),
    _S.PARKED: frozenset({_S.BOOTING}),
    _S.RUNNING: frozenset({_S.BOOTING, _S.PAUSED}),
    _S.PAUSED: frozenset({_S.RUNNING}),
    _S.STOPPING: frozenset({_S.CREATING, _S.CONFIGURING, _S.BOOTING, _S.PARKED, _S.RUNNING, _S.PAUSED}),
    _S.DESTROYED: frozenset(
        {_S.CREATING, _S.CONFIGURING, _S.BOOTING, _S.PARKED, _S.RUNNING, _S.PAUSED, _S.STOPPING}
    ),
}
"""For each state, where it may come from.

`creating`: waits for a node with room. `configuring`: a node makes its container. `booting`: its container
runs, its environment is on the way. `parked` is internal: a warm container without an owner; claiming one is
the move parked → booting with the tenant set in the same UPDATE. A row goes back to `creating` when its node
died under it.
"""

LIVE_STATES: Final = frozenset({_S.CREATING, _S.CONFIGURING, _S.BOOTING, _S.RUNNING, _S.PAUSED})
"""What counts against a tenant's quota and is listed by default."""

UNREADY_STATES: Final = frozenset({_S.CREATING, _S.CONFIGURING, _S.BOOTING})
CONTAINED_STATES: Final = frozenset({_S.BOOTING, _S.PARKED, _S.RUNNING, _S.PAUSED})
"""States that are entered only once a container runs: without one, the sandbox is dead."""


class DeathReason(models.TextChoices):
    """Why a sandbox ended. The same words as a session's `end_reason`."""

    FINISHED = "finished"
    USER = "user"
    ADMIN = "admin"
    IDLE = "idle"
    TTL = "ttl"
    QUOTA = "quota"
    DISK = "disk"
    OOM = "oom"
    AGENT_EXIT = "agent_exit"
    IMAGE_ERROR = "image_error"
    HOST_RESTART = "host_restart"
    LOST = "lost"
    POOL = "pool", "parked too long, or the pool shrank (internal)"


class Restore(models.TextChoices):
    """Whether files must be put back before it is its tenant's to use."""

    NOTHING = ""
    WANTED = "wanted"
    DONE = "done"


class PoolMiss(models.TextChoices):
    """Why a create found no parked sandbox to claim."""

    NO_POOL = "no_pool", "no node keeps a pool of this template"
    EMPTY = "empty", "all parked ones are taken, new ones are on their way"
    LOST_RACE = "lost_race", "others were faster, again and again"
    OLD_IMAGE = "old_image", "the parked ones are of another image"
    NODE_DOWN = "node_down", "the node of the parked ones does not answer"
    NODE_FULL = "node_full", "the nodes that keep a pool have no room for one"
    FAILING = "failing", "the pool could not be filled lately"
    NOT_CONFIGURED = "not_configured", "the claimed ones did not take their configuration"


class Sandbox(models.Model):
    public_id = PublicIdField("sbx")
    tenant = models.ForeignKey(
        Tenant, on_delete=models.PROTECT, null=True, blank=True, related_name="sandboxes"
    )
    template = models.ForeignKey(Template, on_delete=models.PROTECT, related_name="sandboxes")
    node = models.ForeignKey(Node, on_delete=models.SET_NULL, null=True, blank=True, related_name="sandboxes")
    state = models.CharField(max_length=16, choices=SandboxState, default=SandboxState.CREATING)
    generation = models.PositiveIntegerField(default=1)
    slot = models.PositiveIntegerField(
        null=True, blank=True, help_text="Its uid on the node is 10000 + slot."
    )
    container_id = models.CharField(max_length=80, blank=True)
    is_warm = models.BooleanField(default=False, help_text="Claimed from the pool.")
    pool_miss = models.CharField(
        max_length=16, choices=PoolMiss, blank=True, help_text="Why none was claimed. Empty: one was."
    )
    image_id = models.CharField(max_length=100, blank=True)
    idle_timeout_seconds = models.PositiveIntegerField(default=300)
    max_lifetime_seconds = models.PositiveIntegerField(default=7200)
    metadata = models.JSONField(default=dict, blank=True)
    env_sealed = models.BinaryField(
        default=b"", editable=False, help_text="The request's env_vars, encrypted."
    )
    configured_with = models.CharField(max_length=300, blank=True, editable=False)
    egress = models.JSONField(default=dict, blank=True, help_text="What it may reach besides its template's.")
    egress_seen = models.JSONField(
        default=list, blank=True, editable=False, help_text="Once gone: what it reached or was refused."
    )
    owner = models.CharField(
        max_length=40, blank=True, db_index=True, help_text="The session it was made for."
    )
    lease_until = models.DateTimeField(
        null=True, blank=True, help_text="Whoever provisions it must renew until then."
    )
    lease_holder = models.CharField(
        max_length=80, blank=True, editable=False, help_text="The process that has the lease."
    )
    created_at = models.DateTimeField(db_index=True)
    claimed_at = models.DateTimeField(null=True, blank=True)
    ready_at = models.DateTimeField(null=True, blank=True)
    expires_at = models.DateTimeField(null=True, blank=True, db_index=True)
    last_active_at = models.DateTimeField(null=True, blank=True)
    frozen_at = models.DateTimeField(
        null=True, blank=True, help_text="Its node froze it, and has not thawed it since."
    )
    snapshot = models.ForeignKey(
        Snapshot,
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        related_name="+",
        help_text="Whose files it starts with.",
    )
    restore = models.CharField(max_length=8, choices=Restore, blank=True, default=Restore.NOTHING)
    workspace = models.ForeignKey(
        Workspace, on_delete=models.SET_NULL, null=True, blank=True, related_name="sandboxes"
    )
    save_until = models.DateTimeField(
        null=True, blank=True, help_text="Its node leaves it until then: its workspace is being saved."
    )
    destroyed_at = models.DateTimeField(null=True, blank=True)
    death_reason = models.CharField(max_length=16, choices=DeathReason, blank=True)
    death_detail = models.CharField(max_length=500, blank=True)
    boot_id = models.CharField(
        max_length=36, blank=True, editable=False, help_text="Which run of its host it was started in."
    )
    death = models.JSONField(
        default=dict,
        blank=True,
        help_text="Evidence: exit_code, oom, memory_peak_mib, memory_curve, last_output.",
    )

    class Meta:
        verbose_name_plural = "sandboxes"
        indexes = [
            models.Index(fields=["tenant", "state"], name="sandbox_tenant_state"),
            models.Index(fields=["template", "state", "id"], name="sandbox_pool"),
            models.Index(fields=["node", "state"], name="sandbox_node_state"),
        ]
        constraints = [
            models.UniqueConstraint(
                fields=["node", "slot"],
                condition=~models.Q(state="destroyed"),
                name="sandbox_slot_once",
            ),
            models.UniqueConstraint(
                fields=["workspace"],
                condition=~models.Q(state="destroyed"),
                name="workspace_one_writer",
            ),
            models.CheckConstraint(
                condition=~models.Q(state="parked") | models.Q(tenant__isnull=True),
                name="parked_has_no_owner",
            ),
        ]

    def __str__(self) -> str:
        return self.public_id


class SandboxMove(models.Model):
    """One row per move of a sandbox's state: when, from, to, why."""

    sandbox = models.ForeignKey(Sandbox, on_delete=models.CASCADE, related_name="moves")
    at = models.DateTimeField()
    from_state = models.CharField(max_length=16, blank=True)
    to_state = models.CharField(max_length=16)
    why = models.CharField(max_length=200, blank=True)

    def __str__(self) -> str:
        return f"{self.from_state} → {self.to_state}"


class SandboxLogEntry(models.Model):
    """What ran in a sandbox through the API, and how it ended: `GET …/logs`. Output is redacted by the
    guest."""

    sandbox = models.ForeignKey(Sandbox, on_delete=models.CASCADE, related_name="log_entries")
    at = models.DateTimeField()
    process_id = models.CharField(max_length=64)
    command = models.TextField()
    exit_code = models.IntegerField(null=True)
    output = models.TextField(blank=True)

    class Meta:
        verbose_name_plural = "sandbox log entries"

    def __str__(self) -> str:
        return f"{self.sandbox} {self.process_id}"


class JobState(models.TextChoices):
    RUNNING = "running"
    EXITED = "exited"
    UNKNOWN = "unknown", "nobody recorded how it ended"


class Job(models.Model):
    """A background process of a sandbox. Its guest knows it while it runs and a while longer; this row stays as
    long as its sandbox's."""

    public_id = PublicIdField("job")
    sandbox = models.ForeignKey(Sandbox, on_delete=models.CASCADE, related_name="jobs")
    state = models.CharField(max_length=16, choices=JobState, default=JobState.RUNNING)
    command = models.TextField(help_text="Its beginning, redacted.")
    created_at = models.DateTimeField()
    ended_at = models.DateTimeField(null=True, blank=True)
    exit_code = models.IntegerField(null=True, blank=True, help_text="Null: it runs, or nobody knows.")
    signal = models.CharField(max_length=16, blank=True)
    timed_out = models.BooleanField(default=False)
    oom = models.BooleanField(default=False)
    reason = models.CharField(max_length=32, blank=True, help_text="Why nobody knows how it ended.")
    output_bytes = models.PositiveBigIntegerField(default=0)

    class Meta:
        indexes = [models.Index(fields=["state", "sandbox"], name="job_state_sandbox")]

    def __str__(self) -> str:
        return self.public_id


class PreviewLink(models.Model):
    """A share link: whoever has it sees one port of one sandbox until it expires or is revoked."""

    public_id = PublicIdField("prv")
    sandbox = models.ForeignKey(Sandbox, on_delete=models.CASCADE, related_name="preview_links")
    port = models.PositiveIntegerField()
    token_digest = models.CharField(max_length=64, unique=True, editable=False)
    made_by = models.CharField(
        max_length=40, help_text="The API key or user that made it; it ends with that."
    )
    created_at = models.DateTimeField()
    expires_at = models.DateTimeField()
    revoked_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        indexes = [models.Index(fields=["sandbox", "-id"], name="preview_link_sandbox")]

    def __str__(self) -> str:
        return self.public_id

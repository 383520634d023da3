"""The warm pool of one node: containers that run, belong to nobody, and wait to be claimed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import structlog
from django.db.models import Count, Q

from e2a.core.clock import now, seconds
from e2a.settings.environment import DEFAULT_POOL_RATE
from sandboxes.arrivals import waiting_rows
from sandboxes.claims import POOL_FAILING
from sandboxes.host import Host
from sandboxes.lifecycle import sandbox_end
from sandboxes.models import UNREADY_STATES, DeathReason, Node, Sandbox, SandboxState, Template
from sandboxes.provision import PARKED_SECONDS, parked_row
from sandboxes.selectors import node_can_make, node_image

log = structlog.get_logger(__name__)

AT_ONCE = 2
"""Containers made at the same time for a pool that is empty."""
LARGEST_BURST = 2.0
"""So many parked ones may be begun at once after a quiet time, however low the rate."""
LONGEST_PAUSE_SECONDS = 60.0

_POOL_STATES = [*UNREADY_STATES, SandboxState.PARKED]


@dataclass(slots=True)
class Rate:
    """A bucket of tokens: `per_second` flow in, each parked sandbox that is begun takes one."""

    per_second: float
    tokens: float = 1.0
    looked_at: float = field(default_factory=lambda: time.monotonic())

    def available(self) -> int:
        """How many may be begun now."""
        moment = time.monotonic()
        flowed = (moment - self.looked_at) * self.per_second
        self.tokens = min(self.tokens + flowed, max(LARGEST_BURST, self.per_second))
        self.looked_at = moment
        return int(self.tokens)


@dataclass(slots=True)
class Pool:
    """Keeps the pool at its sizes. After failures it pauses, twice as long each time, at most a minute."""

    sizes: Mapping[str, int]
    rates: Mapping[str, float] = field(default_factory=dict)
    failures: int = 0
    paused_until: float = 0.0
    _known: set[int] = field(default_factory=set)
    _buckets: dict[str, Rate] = field(default_factory=dict)

    def keep(self, host: Host, start: Callable[[int], None]) -> None:
        """Begin to make what is missing (`start` is handed the row's key, and returns at once); drop what is
        too much.

        Three queries when there is nothing to do. While tenants wait for a sandbox to be made, the pool makes
        none: theirs come first.
        """
        node = Node.objects.filter(name=host.name).first()
        if node is None:
            return
        self._watch_failures(node)
        tenants_wait = waiting_rows().exists()
        for template in _templates(node):
            is_possible = template.is_enabled and node_can_make(node, template)
            size = self.sizes.get(template.name, 0) if is_possible else 0
            self._shrink(node, template, size)
            missing = size - template.parked - template.coming  # type: ignore[attr-defined]  # annotated
            # With some left there is no hurry, and whoever claims those wants the CPU.
            room = (1 if template.parked else AT_ONCE) - template.coming  # type: ignore[attr-defined]
            if tenants_wait or self.is_paused:
                continue
            bucket = self._bucket(template.name)
            for _ in range(min(missing, room, bucket.available())):
                row = parked_row(node, template, host.capacity)
                if row is None:
                    return
                bucket.tokens -= 1
                self._known.add(row.pk)
                start(row.pk)

    @property
    def is_paused(self) -> bool:
        """Whether it makes none for a while, because making them failed."""
        return time.monotonic() < self.paused_until

    def told(self) -> dict[str, int]:
        """For `Node.pool`: the sizes, and beside them how often making one has failed, if it does."""
        return dict(self.sizes) | ({POOL_FAILING: self.failures} if self.failures else {})

    def _bucket(self, template: str) -> Rate:
        if template not in self._buckets:
            rate = self.rates.get(template, self.rates.get("*", DEFAULT_POOL_RATE))
            self._buckets[template] = Rate(rate)
        return self._buckets[template]

    def _watch_failures(self, node: Node) -> None:
        """A row of ours that ended without having been parked is a failure."""
        if not self._known:
            return
        rows = Sandbox.objects.filter(pk__in=self._known).values_list("pk", "state", "tenant_id")
        found = {pk: (state, tenant_id) for pk, state, tenant_id in rows}
        for pk in list(self._known):
            state, tenant_id = found.get(pk, (SandboxState.DESTROYED, None))
            if state in UNREADY_STATES and tenant_id is None:
                continue
            self._known.discard(pk)
            if state in (SandboxState.STOPPING, SandboxState.DESTROYED) and tenant_id is None:
                self.failures += 1
                pause = min(2.0**self.failures, LONGEST_PAUSE_SECONDS)
                self.paused_until = time.monotonic() + pause
                log.warning("pool.failed", node=node.name, failures=self.failures, pause_seconds=pause)
            else:
                self.failures = 0

    def _shrink(self, node: Node, template: Template, size: int) -> None:
        """End parked ones beyond the size, and one a pass that is too old or of another image."""
        parked = Sandbox.objects.filter(node=node, template=template, state=SandboxState.PARKED).order_by(
            "pk"
        )
        if template.parked > size:  # type: ignore[attr-defined]  # annotated
            for sandbox in parked[: template.parked - size]:  # type: ignore[attr-defined]
                pool_end(sandbox, why="the pool is smaller now")
            return
        if not template.parked:  # type: ignore[attr-defined]
            return
        stale = Q(created_at__lt=now() - seconds(PARKED_SECONDS)) | ~Q(image_id=node_image(node, template))
        for sandbox in parked.filter(stale)[:1]:
            pool_end(sandbox, why="parked too long, or made from an older image")


def _templates(node: Node) -> list[Template]:
    """All templates with how many of the node's sandboxes are parked and on their way there."""
    mine = Q(sandboxes__node=node, sandboxes__tenant__isnull=True)
    return list(
        Template.objects.annotate(
            parked=Count("sandboxes", filter=mine & Q(sandboxes__state=SandboxState.PARKED)),
            coming=Count("sandboxes", filter=mine & Q(sandboxes__state__in=UNREADY_STATES)),
        ).order_by("name")
    )


def pool_end(sandbox: Sandbox, *, why: str) -> bool:
    """Take a parked sandbox out of the pool; False when somebody claimed it first."""
    return sandbox_end(
        sandbox, reason=DeathReason.POOL, why=why, only_if=Q(state=SandboxState.PARKED, tenant__isnull=True)
    )


def pool_give_way(host: Host) -> Sandbox | None:
    """End one parked sandbox of a full node, so that a tenant's can be made. None when there is none."""
    parked = (
        Sandbox.objects.filter(node__name=host.name, state=SandboxState.PARKED)
        .select_related("node")
        .order_by("pk")
    )
    for sandbox in parked[:5]:
        if pool_end(sandbox, why="the node is full"):
            return sandbox
    return None

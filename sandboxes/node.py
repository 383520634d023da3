"""The node agent: what a node process does by itself, beside the tasks that it is sent.

Heartbeat (5 s), pool (1 s), sweep of what tasks left undone (5 s), reconcile (30 s and at start), the
engine's events.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import structlog
from django.conf import settings
from django.db import close_old_connections, connection
from django.db.models import Q

from e2a.core.clock import now, seconds
from e2a.core.errors import EngineError
from sandboxes.arrivals import provision_waiting, waiting_rows
from sandboxes.catalogue import templates_sync
from sandboxes.death import memory_sample
from sandboxes.engines.base import EngineStatus, EventStream
from sandboxes.host import Host, this_host
from sandboxes.models import Node, Sandbox, SandboxState
from sandboxes.node_images import ImageKeeper, images_ensure
from sandboxes.pausing import freezing_sweep
from sandboxes.pool import Pool, pool_give_way
from sandboxes.provision import HostFull, leases_renew, sandbox_provision
from sandboxes.reconcile import ReconcileMemory, reconcile, sandbox_check, stopping_sweep
from sandboxes.removal import sandbox_remove
from sandboxes.template_trial import trials_sweep
from sandboxes.witness import SAMPLE_SECONDS

__all__ = ["NodeAgent", "images_ensure", "node_say", "sandbox_provision_or_give_way"]

log = structlog.get_logger(__name__)

HEARTBEAT_SECONDS = 5.0
POOL_SECONDS = 1.0
SWEEP_SECONDS = 5.0
RECONCILE_SECONDS = 30.0
IMAGE_SECONDS = 2.0
NUDGE_SECONDS = 3.0
"""A cold row that no task took up within this time is taken up by the sweep of any node with room."""
MAKERS = 4


class NodeAgent:
    """The threads of one node process. `start` returns at once; `stop` ends them."""

    def __init__(self, host: Host | None = None, *, pool_sizes: dict[str, int] | None = None) -> None:
        self.host = host or this_host()
        self.memory = ReconcileMemory()
        self.pool = Pool(
            settings.E2A.pool if pool_sizes is None else pool_sizes, rates=settings.E2A.pool_rate
        )
        self.images = ImageKeeper(self.host, [name for name, size in self.pool.sizes.items() if size])
        self.is_engine_up = False
        self._stop = threading.Event()
        self._events: EventStream | None = None
        self._threads: list[threading.Thread] = []
        self._makers = ThreadPoolExecutor(MAKERS, thread_name_prefix="sandbox-maker")

    def start(self) -> None:
        templates_sync()
        self.heartbeat()
        for name, loop in (
            ("heartbeat", self._heartbeat_loop),
            ("work", self._work_loop),
            ("images", self._image_loop),
            ("events", self._event_loop),
            ("memory", self._memory_loop),
        ):
            thread = threading.Thread(target=loop, name=f"node-{name}", daemon=True)
            thread.start()
            self._threads.append(thread)
        log.info(
            "node.started", node=self.host.name, engine=self.host.engine.name, capacity=self.host.capacity
        )

    def stop(self, *, wait_seconds: float = 5.0) -> None:
        """Ask all threads to end, and wait a while for them. What they were at goes on after the next
        start."""
        self._stop.set()
        if self._events is not None:
            self._events.close()
        self._makers.shutdown(wait=False, cancel_futures=True)
        give_up_at = time.monotonic() + wait_seconds
        for thread in self._threads:
            thread.join(max(0.0, give_up_at - time.monotonic()))

    # -- heartbeat

    def heartbeat(self) -> None:
        """Look at the engine, say in the database that this node lives and what it can. At most some 3 s."""
        status = self.host.engine.check()
        if self.is_engine_up != status.available:
            log.info("node.engine", node=self.host.name, available=status.available, detail=status.detail)
        if not status.available:
            self.memory.engine_was_down_at = now()
        self.memory.engine_started_at = status.started_at
        node_say(self.host, status, pool=self.pool.told(), notice=self.memory.notice)
        leases_renew(self.host)
        self.is_engine_up = status.available

    def _heartbeat_loop(self) -> None:
        self._every(HEARTBEAT_SECONDS, self.heartbeat, at_once=False)

    # -- pool, sweep, reconcile

    def _work_loop(self) -> None:
        due = {"sweep": 0.0, "reconcile": 0.0}

        def work() -> None:
            if not self.is_engine_up:
                due["reconcile"] = 0.0  # The first thing when it is back.
                return
            moment = time.monotonic()
            if moment >= due["reconcile"]:
                due["reconcile"] = moment + RECONCILE_SECONDS
                reconcile(self.host, self.memory)
            self.pool.keep(self.host, self.make)
            if moment >= due["sweep"]:
                due["sweep"] = moment + SWEEP_SECONDS
                self.sweep()

        self._every(POOL_SECONDS, work, at_once=True)

    def make(self, sandbox_pk: int) -> None:
        """Provision it in a thread of ours."""
        self._makers.submit(self._made, sandbox_pk)

    def _made(self, sandbox_pk: int) -> None:
        try:
            close_old_connections()
            sandbox_provision_or_give_way(self.host, sandbox_pk)
        except HostFull as error:
            log.info("node.full", sandbox_pk=sandbox_pk, error=error.detail)
        except Exception:
            log.exception("node.make_failed", sandbox_pk=sandbox_pk)
        finally:
            connection.close()

    def _waiting_made(self) -> None:
        """Stand in for nudges that were lost."""
        try:
            close_old_connections()
            provision_waiting(self.host, sandbox_provision_or_give_way)
        except HostFull as error:
            log.info("node.full", error=error.detail)
        except Exception:  # In a thread of its own nobody else would see it; the next sweep tries again.
            log.exception("node.make_failed")
        finally:
            connection.close()

    def sweep(self) -> None:
        """Take up what nobody is at: lost messages, expired leases, removals that failed. Level-triggered."""
        stopping_sweep(self.host)
        freezing_sweep(self.host)
        moment = now()
        expired = Q(lease_until__isnull=True) | Q(lease_until__lt=moment)
        mine = Q(node__name=self.host.name) & (
            Q(state__in=[SandboxState.CREATING, SandboxState.CONFIGURING])
            | Q(state=SandboxState.BOOTING, tenant__isnull=True)
        )
        if waiting_rows().filter(created_at__lt=moment - seconds(NUDGE_SECONDS)).exists():
            self._makers.submit(self._waiting_made)
        rows = Sandbox.objects.filter(expired, mine).order_by("pk")
        for pk in rows.values_list("pk", flat=True)[: 2 * MAKERS]:
            if pk not in self.host.busy():
                self.make(pk)

    # -- images

    def _image_loop(self) -> None:
        """Find, build and try images; without one nothing is made from its template here."""

        def work() -> None:
            if self.is_engine_up:
                self.images.keep()
                trials_sweep(self.host)

        self._every(IMAGE_SECONDS, work, at_once=True)

    # -- events

    def _event_loop(self) -> None:
        """Learn of a container's death at once; the reconcile would, within 30 s."""
        while not self._stop.is_set():
            if not self.is_engine_up:
                self._stop.wait(1.0)
                continue
            try:
                self._follow_events()
            except EngineError as error:
                if not self._stop.is_set():
                    # It was away, be it for less than a heartbeat: what died with it did not die by itself.
                    self.memory.engine_was_down_at = now()
                    log.info("node.events_ended", node=self.host.name, error=error.detail)
            except Exception:
                log.exception("node.event_failed", node=self.host.name)
            finally:
                connection.close()
            self._stop.wait(1.0)

    def _follow_events(self) -> None:
        self._events = self.host.engine.events(self.host.instance)
        try:
            for event in self._events:
                if self._stop.is_set():
                    return
                self.host.witness.told(event)
                if event.kind == "died":
                    sandbox_check(self.host, self.memory, event.sandbox_id)
        finally:
            self._events.close()

    # -- memory

    def _memory_loop(self) -> None:
        def memory() -> None:
            memory_sample(self.host)

        self._every(SAMPLE_SECONDS, memory, at_once=False)

    def _every(self, period: float, act: Callable[[], None], *, at_once: bool) -> None:
        if not at_once:
            self._stop.wait(period)
        while not self._stop.is_set():
            try:
                close_old_connections()
                act()
            except EngineError as error:
                log.warning("node.engine_error", node=self.host.name, act=act.__name__, error=error.detail)
            except Exception:
                log.exception("node.failed", node=self.host.name, act=act.__name__)
                connection.close()
            self._stop.wait(period)
        connection.close()


def node_say(
    host: Host, status: EngineStatus, *, pool: dict[str, int] | None = None, notice: str = ""
) -> Node:
    """Write the heartbeat. One query, two the first time."""
    values = {
        "address": host.address,
        "engine": host.engine.name,
        "engine_version": status.version[:64],
        "is_engine_up": status.available,
        "detail": status.detail[:300],
        "soft_limits": list(status.soft_limits),
        "runtimes": list(status.runtimes),
        "capacity": host.capacity,
        "heartbeat_at": now(),
        "pool": pool or {},
        "notice": notice[:300],
    }
    if Node.objects.filter(name=host.name).update(**values):
        return Node.objects.get(name=host.name)
    return Node.objects.update_or_create(name=host.name, defaults=values)[0]


def sandbox_provision_or_give_way(host: Host, sandbox_pk: int) -> None:
    """Provision; on a full node a parked sandbox gives way to a tenant's. Raises HostFull when none is
    left."""
    try:
        sandbox_provision(host, sandbox_pk)
    except HostFull:
        parked = pool_give_way(host)
        if parked is None:
            raise
        sandbox_remove(host, parked.pk)
        sandbox_provision(host, sandbox_pk)

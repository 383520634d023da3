"""The trial run of an operator's own image on this node, with all options that a sandbox has."""

from __future__ import annotations

import time

import structlog
from django.conf import settings
from django.db.models import Q, QuerySet

from e2a.core.clock import now, seconds
from e2a.core.errors import EngineError, GuestError, GuestUnreachable
from e2a.core.ids import new_id
from sandboxes.engines.base import LOWEST_SLOT_UID, SandboxSpec
from sandboxes.guest_probe import probe_health, probe_run
from sandboxes.host import Host
from sandboxes.models import Node, Template, TemplateState
from sandboxes.node_images import image_say
from sandboxes.selectors import node_has_runtime

log = structlog.get_logger(__name__)

LEASE_SECONDS = 900.0
"""A trial that began so long ago is dead with its node, and begun anew."""
START_SECONDS = 30.0
COMMAND_SECONDS = 10.0
"""Together below reconcile's grace for a container without a row."""

COMMANDS = (
    ("true", "`true` does not run in it"),
    ('[ "$(id -u)" -ge 10000 ]', "its commands do not run as the sandbox's user"),
    (
        'cd /workspace && echo works >trial && [ "$(cat trial)" = works ] && rm trial',
        "its commands cannot write in /workspace",
    ),
    (
        'cd "$HOME" && touch trial && rm trial && touch /tmp/trial && rm /tmp/trial',
        "home or /tmp is not writable",
    ),
)
"""What must run inside, and what is said when it does not."""


class TrialFailed(EngineError):
    code = "trial_failed"


def trials_sweep(host: Host) -> None:
    """Try what waits for a trial: messages get lost, and nodes die. One query when nothing waits."""
    if host.engine.name != "process":
        for pk in _waiting().values_list("pk", flat=True):
            template_try(host, pk)


def template_try(host: Host, template_pk: int) -> None:
    """Try it, and write down that it is `ready`, and enabled, or `refused` with the reason. Fine to run twice."""
    if not _waiting().filter(pk=template_pk).update(trial_started_at=now()):
        return
    template = Template.objects.get(pk=template_pk)
    rows = Template.objects.filter(pk=template_pk, state=TemplateState.TRYING)
    try:
        tag, image_id = _trial(host, template)
    except EngineError as error:
        if error.retryable and error.code != "runtime_failed":
            # Docker's fault and not the image's: the next look tries again, half a minute from now.
            rows.update(trial_started_at=now() - seconds(LEASE_SECONDS - 30), refusal=error.detail[:500])
        else:
            rows.update(state=TemplateState.REFUSED, refusal=error.detail[:500])
        log.warning("template.refused", template=template.name, error=error.detail, retryable=error.retryable)
        return
    except Exception:
        rows.update(
            state=TemplateState.REFUSED, refusal="The trial failed by a fault of ours: see the node's log."
        )
        raise
    image_say(host, template, {"tag": tag, "id": image_id})
    rows.update(state=TemplateState.READY, is_enabled=True, refusal="", image_id=image_id)
    log.info("template.ready", template=template.name, image=tag)


def _waiting() -> QuerySet[Template]:
    stale = Q(trial_started_at__isnull=True) | Q(trial_started_at__lt=now() - seconds(LEASE_SECONDS))
    return Template.objects.filter(stale, state=TemplateState.TRYING)


def _trial(host: Host, template: Template) -> tuple[str, str]:
    """The tag and digest of what passed. Raises EngineError with a sentence for the operator."""
    from sandboxes.custom_image import custom_image  # Speaks to Docker: only where the engine does.

    node = Node.objects.get(name=host.name)
    if not node_has_runtime(node, template):
        known = ", ".join(node.runtimes)
        raise TrialFailed(f"this node has no runtime {template.runtime}; it has {known}")
    made = custom_image(template, docker_host=settings.E2A.docker_host)
    sandbox_id = new_id("sbx")
    uid = LOWEST_SLOT_UID + host.capacity  # No slot has it.
    spec = SandboxSpec(
        sandbox_id=sandbox_id,
        instance=host.instance,
        generation=1,
        image=made.image_id,
        memory_mib=template.memory_mib,
        cpu=float(template.vcpu),
        disk_mib=template.disk_mib,
        pids=template.pids,
        uid=uid,
        gid=uid,
        folder=host.sandboxes_folder / sandbox_id,
        lifetime_seconds=120,
        runtime=template.runtime or host.runtime,
        shm_mib=template.shm_mib,
    )
    try:
        host.engine.start(host.engine.create(spec))
        _await_guest(host, spec)
        for command, refusal in COMMANDS:
            try:
                code = probe_run(host.sandboxes_folder, sandbox_id, command, timeout_seconds=COMMAND_SECONDS)
            except (GuestUnreachable, GuestError) as error:
                raise TrialFailed(f"{refusal}: {error.detail}") from error
            if code != 0:
                raise TrialFailed(f"{refusal} (exit code {code})")
    finally:
        host.engine.destroy(sandbox_id, 1)
    return made.tag, made.image_id


def _await_guest(host: Host, spec: SandboxSpec) -> None:
    give_up_at = time.monotonic() + START_SECONDS
    while True:
        try:
            probe_health(host.sandboxes_folder, spec.sandbox_id)
            return
        except (GuestUnreachable, GuestError) as error:
            state = host.engine.inspect(spec.sandbox_id, 1)
            if state is None or state.status == "exited":
                words = host.engine.last_output(spec.sandbox_id).strip()[-300:]
                code = "" if state is None else f" with {state.exit_code}"
                why = "it ran out of memory" if state is not None and state.oom else words
                raise TrialFailed(f"its guest ended{code} instead of answering: {why}") from error
            if time.monotonic() > give_up_at:
                raise TrialFailed(
                    f"its guest does not answer within {START_SECONDS:g} s: {error.detail}"
                ) from error
        time.sleep(0.05)

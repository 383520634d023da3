"""What may happen to a template: an operator's own is added and tried, and who can make sandboxes of one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal

import structlog
from django.db import transaction

from e2a.core.clock import now
from e2a.core.enqueue import enqueue
from e2a.core.errors import Conflict, FieldError, Unavailable, ValidationFailed
from sandboxes.image_names import is_image_name
from sandboxes.lifecycle import node_queue
from sandboxes.models import Node, Sandbox, SandboxState, Template, TemplateState
from sandboxes.pool import pool_end
from sandboxes.selectors import node_has_runtime, node_image, nodes_usable

log = structlog.get_logger(__name__)

BUILD_SECONDS = 30
"""What `Retry-After` says while an image is built."""
CUSTOM_AGENTS = ["deictic", "shell"]
_NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")


class TemplateNotReady(Unavailable):
    """No living node has the template's image. One of them was asked to build it."""

    code = "template_not_ready"
    title = "The template's image is not there yet"


def template_nodes(template: Template, nodes: Iterable[Node]) -> list[Node]:
    """Those of `nodes` that can make a sandbox of it.

    Raises TemplateNotReady when none has its image, 503 `runtime_unavailable` when none that has it knows its
    runtime.
    """
    with_image = [node for node in nodes if node_image(node, template)]
    if not with_image:
        raise TemplateNotReady(
            f"No node has the image of the template {template.name} yet; it is being built. Try again later.",
            retry_after=BUILD_SECONDS,
        )
    able = [node for node in with_image if node_has_runtime(node, template)]
    if not able:
        raise Unavailable(
            f"The template {template.name} runs on {template.runtime}, which no living node has.",
            code="runtime_unavailable",
        )
    return able


def template_want(template: Template) -> None:
    """A node is to build its image: the next look of any one, within seconds, does."""
    Template.objects.filter(pk=template.pk, wanted_at__isnull=True).update(wanted_at=now())


def templates_available(templates: Iterable[Template]) -> set[str]:
    """The names of those that some living node could make a sandbox of now. One query."""
    nodes = list(nodes_usable())
    return {
        template.name
        for template in templates
        if any(node_image(node, template) and node_has_runtime(node, template) for node in nodes)
    }


def template_add(
    *,
    name: str,
    image: str,
    vcpu: Decimal,
    memory_mib: int,
    disk_mib: int,
    pids: int = 256,
    shm_mib: int = 64,
    description: str = "",
    runtime: str = "",
) -> Template:
    """Register an operator's own image: `trying` until a node's trial run makes it `ready` or `refused`.

    Nobody can use it before. Raises ValidationFailed for values that make no sandbox, Conflict (`already_exists`).
    """
    errors = template_problems(
        name=name,
        image=image,
        vcpu=vcpu,
        memory_mib=memory_mib,
        disk_mib=disk_mib,
        pids=pids,
        shm_mib=shm_mib,
    )
    if errors:
        raise ValidationFailed(errors=errors)
    with transaction.atomic():
        if Template.objects.filter(name=name).exists():
            raise Conflict(f"There is a template {name!r} already.", code="already_exists")
        template = Template.objects.create(
            name=name,
            image=image,
            description=description,
            vcpu=vcpu,
            memory_mib=memory_mib,
            disk_mib=disk_mib,
            pids=pids,
            shm_mib=shm_mib,
            runtime=runtime,
            agents=CUSTOM_AGENTS,
            is_custom=True,
            is_enabled=False,
            state=TemplateState.TRYING,
        )
        trial_ask(template)
    return template


def template_problems(
    *, name: str, image: str, vcpu: Decimal, memory_mib: int, disk_mib: int, pids: int, shm_mib: int
) -> list[FieldError]:
    """What is wrong with an operator's template before any node looks at it, by field."""
    checks = [
        (
            "name",
            _NAME.fullmatch(name) is not None,
            "It has small letters, digits and dashes, a letter first.",
        ),
        ("image", is_image_name(image), "It is not the name of an image, such as python:3.12-slim."),
        ("vcpu", Decimal("0.05") <= vcpu <= 64, "It is between 0.05 and 64."),
        ("memory_mib", 64 <= memory_mib <= 1 << 20, "It is at least 64."),
        ("disk_mib", 64 <= disk_mib <= 1 << 20, "It is at least 64."),
        ("pids", 32 <= pids <= 32768, "It is between 32 and 32768."),
        ("shm_mib", 1 <= shm_mib <= memory_mib, "It is at least 1, and at most the memory."),
    ]
    return [FieldError(field, "invalid_value", detail) for field, is_fine, detail in checks if not is_fine]


def template_try_again(*, template: Template) -> bool:
    """Give a refused one another trial, or a ready one that is to be made anew. False: it is not custom, or is
    being tried."""
    with transaction.atomic():
        rows = Template.objects.filter(pk=template.pk, is_custom=True).exclude(state=TemplateState.TRYING)
        moved = rows.update(
            state=TemplateState.TRYING, refusal="", is_enabled=False, trial_started_at=None, image_id=""
        )
        if moved:
            trial_ask(template)
    return bool(moved)


def trial_ask(template: Template) -> None:
    """One node with an engine tries it; when none is there now, the first one that comes."""
    node = next((node for node in nodes_usable().order_by("name") if node.engine != "process"), None)
    if node is not None:
        enqueue("sandboxes.tasks.template_try", queue=node_queue(node.name), template_id=template.pk)


def template_changed(template: Template) -> int:
    """After its runtime or limits changed: parked sandboxes of the old kind are taken away. How many."""
    parked = Sandbox.objects.filter(template=template, state=SandboxState.PARKED).select_related("node")
    return sum(pool_end(sandbox, why="its template was changed") for sandbox in parked)

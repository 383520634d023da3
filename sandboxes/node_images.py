"""Which templates' images are on this host: found, built when they are needed, and said in the node's row.

`standard`, the pool's templates and whatever was here before are needed from the start. Another one is built
when somebody wants a sandbox of it (`Template.wanted_at`), or when an operator runs `manage.py image_build`.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import structlog
from django.conf import settings
from django.db import transaction

from e2a.core.clock import now
from e2a.core.errors import EngineError
from sandboxes.host import Host
from sandboxes.models import Node, Template, TemplateState

log = structlog.get_logger(__name__)

FIRST = "standard"
LOOK_SECONDS = 60.0
"""How long an image that was built or removed by hand may go unnoticed."""


@dataclass(slots=True)
class ImageKeeper:
    """Keeps the images of one node process. Costs one query a call when nothing is to be done."""

    host: Host
    pooled: Collection[str] = ()
    due_at: float = field(default=0.0)
    """When it looks next, by `time.monotonic`."""

    def keep(self) -> None:
        """May take minutes, when an image must be built."""
        is_wanted = Template.objects.filter(is_enabled=True, wanted_at__isnull=False).exists()
        if is_wanted or time.monotonic() >= self.due_at:
            images_ensure(self.host, pooled=self.pooled)
            self.due_at = time.monotonic() + LOOK_SECONDS


def images_ensure(host: Host, *, pooled: Collection[str] = ()) -> bool:
    """Make sure that each needed template's image is on this host, and say in the node's row which are.

    May take minutes. Whether all needed ones are there; a failure is logged, and tried again later.
    """
    node = Node.objects.filter(name=host.name).first() or _node_row(host)
    needed = {FIRST, *(name for name in pooled), *node.images}
    everything = True
    templates = Template.objects.filter(is_enabled=True, state=TemplateState.READY)
    for template in sorted(templates, key=lambda one: (one.name not in needed, one.name != FIRST, one.name)):
        is_needed = template.name in needed or template.is_custom or template.wanted_at is not None
        try:
            found = _image_ensure(host, template, is_needed=is_needed)
        except EngineError as error:
            log.error("node.image", template=template.name, error=error.detail)
            everything = everything and template.name not in needed
            if error.retryable:
                continue
            found = None
        image_say(host, template, found)
    _old_images_remove(host)
    return everything


def node_image_forget(host: Host, template: Template) -> None:
    """The engine says that it has not got the image: nothing is made from it here until it is found again."""
    image_say(host, template, None)
    Template.objects.filter(pk=template.pk).update(wanted_at=now())


def _node_row(host: Host) -> Node:
    values = {"address": host.address, "engine": host.engine.name, "capacity": host.capacity}
    return Node.objects.get_or_create(name=host.name, defaults=values)[0]


def _image_ensure(host: Host, template: Template, *, is_needed: bool) -> dict[str, str] | None:
    """The tag and the digest of its image here, built when it `is_needed`; None when it is not here."""
    if host.engine.name == "process":
        return {"tag": "process", "id": "process"} if template.name == FIRST else None
    # These speak to Docker: only where the engine does.
    if template.is_custom:
        from sandboxes.custom_image import custom_image

        made = custom_image(template, docker_host=settings.E2A.docker_host)
        return {"tag": made.tag, "id": made.image_id}
    from sandboxes.image_build import build_image, image_find
    from sandboxes.image_files import template_names

    if template.name not in template_names():
        return None
    found = image_find(template.name, docker_host=settings.E2A.docker_host)
    if found is None and is_needed:
        found = build_image(
            template.name,
            docker_host=settings.E2A.docker_host,
            say=lambda line: log.info("node.image_build", template=template.name, line=line),
        )
    return None if found is None else {"tag": found.tag, "id": found.image_id}


def image_say(host: Host, template: Template, found: dict[str, str] | None) -> None:
    """Write into the node's row what it has of the template, and remember the tag that this replaces."""
    with transaction.atomic():
        node = Node.objects.select_for_update().get(name=host.name)
        before: dict[str, Any] | None = node.images.get(template.name)
        if found != before:
            images = {name: image for name, image in node.images.items() if name != template.name}
            old = list(node.old_images)
            if found is not None:
                images[template.name] = found
                if before is not None and before["tag"] != found["tag"]:
                    old.append(before["tag"])
            Node.objects.filter(pk=node.pk).update(images=images, old_images=old)
            log.info("node.image", template=template.name, image=found)
        values: dict[str, Any] = {}
        if template.wanted_at is not None:
            values["wanted_at"] = None  # Built, or in vain: the next who wants it asks again.
        if found is not None:
            values["image_id"] = found["id"]
            if not template.is_custom:
                values["image"] = found["tag"]
        if values:
            Template.objects.filter(pk=template.pk).update(**values)


def _old_images_remove(host: Host) -> None:
    """Remove the images that this installation itself replaced here, unless something still uses them."""
    node = Node.objects.get(name=host.name)
    if not node.old_images or host.engine.name == "process":
        return
    from sandboxes.image_prune import image_remove

    used = {image["tag"] for image in node.images.values()}
    left = [tag for tag in dict.fromkeys(node.old_images) if tag not in used]
    left = [tag for tag in left if not image_remove(tag, docker_host=settings.E2A.docker_host)]
    Node.objects.filter(pk=node.pk).update(old_images=left)

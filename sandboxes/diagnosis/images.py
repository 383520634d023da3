"""Whether the image of each template is on this host, and made of what the source says now."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from django.conf import settings

from e2a.core.diagnosis import Finding, fail, ok, warn
from e2a.core.errors import EngineError
from sandboxes.diagnosis.engine import CALL_SECONDS
from sandboxes.engines.docker import DockerConnection
from sandboxes.image_files import image_tag, template_names
from sandboxes.models import Template

BUILD = (
    "Run `manage.py image_build {name}`, then start the node again: parked ones are replaced by themselves."
)


def image_findings() -> Iterator[Finding]:
    """One line for each enabled template."""
    if settings.E2A.engine == "process":
        return
    connection = DockerConnection(settings.E2A.docker_host, timeout_seconds=CALL_SECONDS)
    built = set(template_names())
    templates = list(Template.objects.filter(is_enabled=True).order_by("name"))
    if not templates:
        yield fail(
            "images", "no template is enabled", "Enable one in the admin, or run `manage.py templates_sync`."
        )
    for template in templates:
        yield _finding(connection, template, is_ours=template.name in built)


def _finding(connection: DockerConnection, template: Template, *, is_ours: bool) -> Finding:
    check = f"image of {template.name}"
    advice = BUILD.format(name=template.name) if is_ours else f"Pull {template.image} on this host."
    if not template.image_id:
        if settings.E2A.pool.get(template.name):
            return fail(check, "never built, and E2A_POOL wants some parked", advice)
        return warn(check, "not built yet; the first who asks for it waits", advice)
    try:
        used = _image_id(connection, template.image_id)
        current = _image_id(connection, image_tag(template.name)) if is_ours else used
    except EngineError as error:
        return fail(check, error.detail, "See the line on the engine.")
    if used is None:
        return fail(check, f"{template.image_id} is not on this host", advice)
    if current != used:
        return warn(check, f"{template.image_id} is not made of the present Dockerfile and guest", advice)
    return ok(check, f"{template.image_id} is there and current")


def _image_id(connection: DockerConnection, name: str) -> str | None:
    rows: list[dict[str, Any]] = connection.run("list images", lambda client: client.images(all=False))
    for row in rows:
        names = {row["Id"], *(row.get("RepoTags") or ()), *(row.get("RepoDigests") or ())}
        if name in names:
            return str(row["Id"])
    return None

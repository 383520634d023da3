"""Taking away images of ours that nothing uses any more. Never by force: what a container uses stays."""

from __future__ import annotations

from collections.abc import Collection

from e2a.core.errors import EngineError
from sandboxes.engines.docker import DockerConnection
from sandboxes.image_build import LABEL, image_inspect
from sandboxes.image_files import REPOSITORY, image_tag, layers_of, template_names
from sandboxes.models import Node


def image_remove(tag: str, *, docker_host: str | None = None) -> bool:
    """Whether it is gone now. False: a container still uses it, or Docker does not answer."""
    connection = DockerConnection(docker_host, timeout_seconds=60)
    try:
        if image_inspect(connection, tag) is not None:
            connection.run(f"remove {tag}", lambda client: client.remove_image(tag))
    except EngineError:
        return False
    return True


def images_kept() -> set[str]:
    """The tags that this code builds, and those that a node of this installation runs."""
    kept = {image_tag(name) for name in template_names()}
    kept |= {image_tag(layer) for name in template_names() for layer in layers_of(name)}
    for images in Node.objects.values_list("images", flat=True):
        kept |= {image["tag"] for image in images.values()}
    return kept


def images_prune(
    keep: Collection[str], *, docker_host: str | None = None, repository: str = REPOSITORY
) -> list[str]:
    """Remove the tags of `repository/*` that we built, that are not in `keep` and that no container uses.

    The tags removed. Another installation of another version on this host builds its own anew when it starts.
    """
    connection = DockerConnection(docker_host, timeout_seconds=60)
    rows = connection.run("list images", lambda client: client.images(filters={"label": LABEL}))
    containers = connection.run("list containers", lambda client: client.containers(all=True))
    used = {container["ImageID"] for container in containers}
    removed = []
    for row in rows:
        for tag in row["RepoTags"] or ():
            is_old = tag.startswith(f"{repository}/") and tag not in keep and row["Id"] not in used
            if is_old and image_remove(tag, docker_host=docker_host):
                removed.append(tag)
    return sorted(removed)

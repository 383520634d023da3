"""An operator's own image made a sandbox's: a derived image with the guest in it, pinned by digest.

A derived image and not a mounted guest: what is run is one digest, checked once, and neither a changed tag
nor a changed guest alters it behind anybody's back. The operator's name reaches Docker's API as a parameter
and the Dockerfile as a digest: no shell and no Dockerfile ever sees it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from e2a.core.errors import EngineError
from sandboxes.engines.docker import DockerConnection
from sandboxes.image_build import LABEL, daemon_architecture, docker_build, image_inspect, image_pull
from sandboxes.image_files import REPOSITORY, custom_files, tar_of
from sandboxes.image_names import is_image_name
from sandboxes.models import Template

PULL_SECONDS = 60.0
"""How long a registry may be silent."""
BUILD_SECONDS = 300.0
_REFUSED = "e2a-refused: "


class ImageRefused(EngineError):
    """This image can be no sandbox; `detail` says why, for the operator."""

    code = "image_refused"


@dataclass(frozen=True, slots=True)
class CustomImage:
    """The derived image: its tag, and the digest that is run."""

    tag: str
    image_id: str


def custom_image(template: Template, *, docker_host: str | None = None) -> CustomImage:
    """The derived image of an operator's template, built when it is not here.

    Raises ImageRefused when the image is missing or can be no sandbox, EngineError when Docker fails.
    """
    if not is_image_name(template.image):
        raise ImageRefused("this is not the name of an image")
    connection = DockerConnection(docker_host, timeout_seconds=60)
    base = image_inspect(connection, template.image)
    if base is None:
        why = image_pull(connection, template.image, seconds=PULL_SECONDS)
        base = image_inspect(connection, template.image)
        if base is None:
            raise ImageRefused(f"there is no image {template.image} on the node, nor can it be pulled: {why}")
    _check(connection, base)
    files = list(custom_files())
    digest = hashlib.sha256(base["Id"].encode())
    for path, content, _mode in files:
        digest.update(f"{path}\0{len(content)}\0".encode() + content)
    tag = f"{REPOSITORY}/own-{template.name}:{digest.hexdigest()[:12]}"
    if (there := image_inspect(connection, tag)) is None:
        _build(connection, tag, base["Id"], tar_of(files), template.name)
        there = image_inspect(connection, tag)
        assert there is not None, "a build that succeeded leaves its tag"
    return CustomImage(tag, there["Id"])


def _check(connection: DockerConnection, base: dict[str, Any]) -> None:
    """What Docker's description alone says. Raises ImageRefused."""
    ours = daemon_architecture(connection)
    theirs = str(base.get("Architecture", ""))
    if base.get("Os") != "linux" or theirs != ours:
        raise ImageRefused(f"it is for {base.get('Os')}/{theirs}, and the node is linux/{ours}")
    config = base.get("Config") or {}
    if volumes := sorted(config.get("Volumes") or {}):
        # Docker would give each sandbox anonymous volumes, which no disk limit holds.
        raise ImageRefused(f"it declares volumes ({', '.join(volumes)}), which no limit of the sandbox holds")
    if config.get("OnBuild"):
        raise ImageRefused("it has ONBUILD triggers: it is made to be built on, not to be run")


def _build(connection: DockerConnection, tag: str, base_id: str, folder: bytes, name: str) -> None:
    lines: list[str] = []
    try:
        docker_build(
            connection, tag, folder, {"BASE": base_id}, labels={LABEL: f"own-{name}"}, say=lines.append,
            network="none", seconds=BUILD_SECONDS,
        )  # fmt: skip
    except EngineError as error:
        for line in lines:
            if line.strip().startswith(_REFUSED):
                raise ImageRefused(line.strip().removeprefix(_REFUSED)) from error
        if "/bin/sh" in error.detail and "no such file" in error.detail:
            raise ImageRefused("it has no /bin/sh") from error
        if "returned a non-zero code" in error.detail:
            words = " ".join(" ".join(lines[-3:]).split())[-200:]
            raise ImageRefused(f"it could not be made a sandbox's: {words}") from error
        raise

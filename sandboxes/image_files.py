"""What goes into an image: which files, on which layer, and the tag that follows from them.

A template is a folder of `images/`; a layer is one of `image_layers/`, which several templates share. A
Dockerfile whose first line is `# built-on: NAME` starts from that layer, one without from a Debian base.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from e2a.core.errors import EngineError

PACKAGE = Path(__file__).parent
IMAGES = PACKAGE / "images"
LAYERS = PACKAGE / "image_layers"
GUEST = PACKAGE / "guest"
SHAPE = LAYERS / "shape.sh"

REPOSITORY = "e2a"
LAYER_PREFIX = "layer-"

File = tuple[str, bytes, int]
"""Its path in the build folder, its content, its mode."""


def template_names() -> list[str]:
    """The templates that have an image."""
    return sorted(path.parent.name for path in IMAGES.glob("*/Dockerfile"))


def built_on(name: str) -> str | None:
    """The layer that an image or layer starts from, as `layer-chromium`; None for a Debian base."""
    first = _folder(name).joinpath("Dockerfile").read_text().partition("\n")[0]
    match = re.fullmatch(r"# built-on: ([a-z]+)", first)
    return f"{LAYER_PREFIX}{match[1]}" if match else None


def image_tag(name: str) -> str:
    """The tag that a template's image bears now, such as `e2a/standard:3f2a…`. Costs a few file reads.

    Raises EngineError for a name that is no template.
    """
    digest = hashlib.sha256()
    for path, content, mode in build_files(name):
        digest.update(f"{path}\0{mode:o}\0{len(content)}\0".encode())
        digest.update(content)
    if (layer := built_on(name)) is not None:
        digest.update(image_tag(layer).encode())
    return f"{REPOSITORY}/{name}:{digest.hexdigest()[:12]}"


def build_folder(name: str, more: Iterable[File] = ()) -> bytes:
    """The build's files as a tar without times or owners, so that unchanged content is a cache hit."""
    return tar_of([*build_files(name), *more])


def tar_of(files: Iterable[File]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, content, mode in files:
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(content), mode
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def build_files(name: str) -> Iterator[File]:
    """What the build sees: the folder of the template at the top; for a template also what makes it one."""
    yield from _files_below(_folder(name), "", "*")
    if not name.startswith(LAYER_PREFIX):
        yield from sandbox_files()


def sandbox_files() -> Iterator[File]:
    """What makes an image a sandbox's: `shape.sh`, and the guest's code below `guest/`."""
    yield SHAPE.name, SHAPE.read_bytes(), 0o644
    yield from _files_below(GUEST, "guest/", "*.py")


def custom_files() -> Iterator[File]:
    """What the build of an operator's own image sees."""
    yield from _files_below(LAYERS / "custom", "", "*")
    yield from sandbox_files()


def layers_of(name: str) -> list[str]:
    """The layers that it stands on, from the lowest."""
    layers: list[str] = []
    on = built_on(name)
    while on is not None:
        layers.insert(0, on)
        on = built_on(on)
    return layers


def wheels_wanted(name: str) -> Path | None:
    """The requirements whose wheels its build finds below `wheels/`; None when it wants none."""
    path = _folder(name) / "wheels.txt"
    return path if path.is_file() else None


def _folder(name: str) -> Path:
    if name.startswith(LAYER_PREFIX):
        return LAYERS / name.removeprefix(LAYER_PREFIX)
    if name not in template_names():
        raise EngineError(f"there is no template {name!r}; there are {', '.join(template_names())}")
    return IMAGES / name


def _files_below(top: Path, prefix: str, pattern: str) -> Iterator[File]:
    for path in sorted(top.rglob(pattern)):
        if path.is_file() and "__pycache__" not in path.parts:
            mode = 0o755 if os.access(path, os.X_OK) else 0o644
            yield prefix + path.relative_to(top).as_posix(), path.read_bytes(), mode

"""Build the images that sandboxes start from: choose a base, send the build folder, show what happens.

No registry host stands in this file. The base is, in this order: what the caller names;
`debian:bookworm-slim` when this host has it; the same pulled, when a registry answers in time; else one made
by debootstrap from the Debian mirror that the host's own apt uses.

An image's tag is a digest of its folder, its layers and the guest, so a changed guest is a new tag whose last
steps alone are built, and an unchanged one is found and not built at all.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
from docker.errors import ImageNotFound

from e2a.core.errors import EngineError
from sandboxes.engines.docker import DockerConnection
from sandboxes.image_files import File, build_folder, image_tag, layers_of, wheels_wanted
from sandboxes.image_wheels import wheels_fetch

LABEL = "e2a.template"
RELEASE = "bookworm"
PUBLIC_BASE = f"debian:{RELEASE}-slim"
OWN_BASE = f"e2a/base:{RELEASE}"
PULL_SECONDS = 15.0
BUILD_SECONDS = 1800.0
BOOTSTRAP_SECONDS = 900.0

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BuiltImage:
    """An image that is there. `built` is false when it was there already; `base` is then empty."""

    tag: str
    image_id: str
    built: bool
    base: str
    size_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class AptSource:
    """One line of apt's sources of this host: where, which suite, which components."""

    uri: str
    suite: str
    components: tuple[str, ...]

    @property
    def line(self) -> str:
        return f"deb {self.uri} {self.suite} {' '.join(self.components)}"


def build_image(
    template: str,
    *,
    docker_host: str | None = None,
    say: Say = print,
    base: str | None = None,
    mirror: str | None = None,
    work_folder: Path | None = None,
    proxies: Mapping[str, str] | None = None,
    again: bool = False,
) -> BuiltImage:
    """Make sure that a template's image exists, saying each step. Raises EngineError when it cannot be made.

    `mirror` is the Debian mirror for debootstrap, when the host's own apt is to be overruled. `proxies` are
    the build's `http_proxy`, `https_proxy` and `no_proxy`; Docker keeps them out of the image. `again` builds
    although the tag is there. `work_folder` is where debootstrap unpacks: 400 MB, not on a nodev mount.
    """
    started = time.monotonic()
    connection = DockerConnection(docker_host, timeout_seconds=60)
    tag = image_tag(template)
    if not again and (found := image_find(template, docker_host=docker_host)) is not None:
        say(f"{tag} is up to date")
        return found
    chosen = base or choose_base(connection, say=say, mirror=mirror, work_folder=work_folder)
    for name, on in _chain(template, chosen):
        if name == template or again or _image_size(connection, image_tag(name)) is None:
            say(f"building {image_tag(name)} from {on}")
            _build(connection, name, on, proxies or {}, say)
    there = image_inspect(connection, tag)
    if there is None:
        raise EngineError(f"the build of {tag} ended, but the image is not there")
    seconds = time.monotonic() - started
    size = int(there["Size"])
    say(f"built {tag}: {size / 1e6:.0f} MB in {seconds:.1f} s")
    return BuiltImage(tag, there["Id"], built=True, base=chosen, size_bytes=size, seconds=seconds)


def image_find(template: str, *, docker_host: str | None = None) -> BuiltImage | None:
    """The image that a template has here now; None when it is not built. Raises EngineError."""
    tag = image_tag(template)
    there = image_inspect(DockerConnection(docker_host, timeout_seconds=60), tag)
    if there is None:
        return None
    return BuiltImage(tag, there["Id"], built=False, base="", size_bytes=int(there["Size"]), seconds=0.0)


def choose_base(
    connection: DockerConnection, *, say: Say, mirror: str | None = None, work_folder: Path | None = None
) -> str:
    """The base image to build on, made when there is none. Says which one and why."""
    for candidate in (PUBLIC_BASE, OWN_BASE):
        if _image_size(connection, candidate) is not None:
            say(f"base: {candidate}, which this host has already")
            return candidate
    say(f"base: {PUBLIC_BASE} is not on this host; asking the registry for it, at most {PULL_SECONDS:g} s")
    refusal = _pull(connection, PUBLIC_BASE, say)
    if refusal is None:
        say(f"base: {PUBLIC_BASE}, pulled")
        return PUBLIC_BASE
    say(f"base: it cannot be pulled here ({refusal}); making {OWN_BASE} with debootstrap instead")
    bootstrap_base(connection, say=say, mirror=mirror, work_folder=work_folder)
    return OWN_BASE


def bootstrap_base(
    connection: DockerConnection, *, say: Say, mirror: str | None = None, work_folder: Path | None = None
) -> None:
    """Make `e2a/base:bookworm` with debootstrap. Needs root. About 25 s near a mirror."""
    if os.geteuid() != 0:
        raise EngineError(f"debootstrap needs root: build once as root, or load {PUBLIC_BASE} into Docker")
    sources = debian_sources()
    main = mirror or next((source.uri for source in sources if source.suite == RELEASE), None)
    if main is None:
        raise EngineError(
            f"this host's apt has no Debian {RELEASE} mirror: name one, or load {PUBLIC_BASE} into Docker"
        )
    with tempfile.TemporaryDirectory(prefix="e2a-base-", dir=work_folder or Path("/var/tmp")) as folder:  # noqa: S108
        root = Path(folder) / "root"
        command = ("debootstrap", "--variant=minbase", RELEASE, str(root), main)
        for line in _lines_of(command, BOOTSTRAP_SECONDS):
            say(f"  {line}")
        _shape_base(root, sources if mirror is None else [AptSource(mirror, RELEASE, ("main",))])
        say(f"  importing it as {OWN_BASE}")
        _import_folder(connection, root, OWN_BASE)


def debian_sources(folder: Path = Path("/etc/apt")) -> list[AptSource]:
    """The Debian sources of this host's apt for our release, in both of apt's formats."""
    lists = [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*.list"))]
    found = [source for path in lists if path.is_file() for source in _one_line_sources(path.read_text())]
    for path in sorted((folder / "sources.list.d").glob("*.sources")):
        found += _deb822_sources(path.read_text())
    suites = {RELEASE, f"{RELEASE}-updates", f"{RELEASE}-security"}
    return [source for source in found if source.suite in suites and "main" in source.components]


def _one_line_sources(text: str) -> Iterator[AptSource]:
    for line in text.splitlines():
        if match := re.match(r"\s*deb\s+(?:\[[^\]]*\]\s+)?(\S+)\s+(\S+)\s+([^#]+)", line):
            yield AptSource(match[1], match[2], tuple(match[3].split()))


def _deb822_sources(text: str) -> Iterator[AptSource]:
    for block in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in block.splitlines():
            if line.startswith("#"):
                continue
            if line[:1].isspace():
                fields[name] = f"{fields.get(name, '')} {line.strip()}"
            elif ":" in line:
                name, _colon, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() == "no":
            continue
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                yield AptSource(uri, suite, tuple(fields.get("components", "").split()))


def _shape_base(root: Path, sources: list[AptSource]) -> None:
    """Give a bootstrapped tree the host's apt sources and clock checks; take away what no image needs."""
    (root / "etc/apt/sources.list").write_text("".join(f"{source.line}\n" for source in sources))
    if checks := _apt_clock_checks():
        (root / "etc/apt/apt.conf.d/90host").write_text(checks)
    (root / "etc/dpkg/dpkg.cfg.d/90image").write_text(
        "path-exclude /usr/share/doc/*\npath-exclude /usr/share/man/*\npath-exclude /usr/share/locale/*\n"
        "path-exclude /usr/share/info/*\npath-exclude /usr/share/lintian/*\n"
    )
    for name in (
        "var/cache/apt/archives",
        "var/lib/apt/lists",
        "usr/share/doc",
        "usr/share/man",
        "usr/share/locale",
    ):
        subprocess.run(("find", str(root / name), "-mindepth", "1", "-delete"), check=True, timeout=60)


def _apt_clock_checks() -> str:
    """The host's own verdict on old Release files: a mirror that is a snapshot works there only so."""
    done = subprocess.run(("apt-config", "dump"), capture_output=True, text=True, timeout=20, check=False)
    kept = [
        line for line in done.stdout.splitlines() if re.match(r'Acquire::Check-(Valid-Until|Date) "', line)
    ]
    return "".join(f"{line}\n" for line in kept)


def _lines_of(command: tuple[str, ...], seconds: float) -> Iterator[str]:
    """Run a command, giving its output line by line. Raises EngineError when it fails or takes too long."""
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except FileNotFoundError as error:
        raise EngineError(f"{command[0]} is not installed on this host") from error
    deadline = time.monotonic() + seconds
    last = ""
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            last = line.rstrip()
            yield last
            if time.monotonic() > deadline:
                process.kill()
                raise EngineError(f"{command[0]} did not end within {seconds:g} s", retryable=True)
    if process.returncode:
        raise EngineError(f"{command[0]} failed with {process.returncode}: {last}", retryable=True)


def _import_folder(connection: DockerConnection, root: Path, tag: str) -> None:
    repository, _colon, version = tag.partition(":")
    client = connection.client(BUILD_SECONDS)
    with subprocess.Popen(("tar", "-C", str(root), "-c", "."), stdout=subprocess.PIPE) as tar:
        try:
            answer = connection.translated(
                f"import {tag}",
                lambda: client.import_image_from_data(tar.stdout, repository=repository, tag=version),
            )
        finally:
            client.close()
    if "error" in answer:
        raise EngineError(f"Docker could not import {tag}: {answer}")


def _pull(connection: DockerConnection, image: str, say: Say) -> str | None:
    return image_pull(connection, image, say=say)


def image_pull(
    connection: DockerConnection, image: str, *, seconds: float = PULL_SECONDS, say: Say = lambda _line: None
) -> str | None:
    """Pull an image. None when it worked, else why it did not. `seconds`: how long the registry may be silent."""
    client = connection.client(seconds)
    try:
        # Without a tag the library asks for `latest` alone, and it takes a digest as it stands.
        steps = connection.translated(f"pull {image}", lambda: client.pull(image, stream=True, decode=True))
        for step in _steps(connection, f"pull {image}", steps):
            if step.get("status") == "Pull complete":
                say(f"  {step['status']} {step.get('id', '')}")
    except EngineError as error:
        return error.detail
    finally:
        client.close()
    return None


def _chain(template: str, base: str) -> list[tuple[str, str]]:
    """The layers of a template from the lowest, then itself, each with the image that it starts from."""
    names = [*layers_of(template), template]
    return list(zip(names, [base, *map(image_tag, names)], strict=False))


def _build(connection: DockerConnection, name: str, base: str, proxies: Mapping[str, str], say: Say) -> None:
    wheels: list[File] = []
    if (requirements := wheels_wanted(name)) is not None:
        say(f"  fetching the packages of {requirements.parent.name}/{requirements.name} with pip")
        wheels = wheels_fetch(requirements, architecture=daemon_architecture(connection))
    docker_build(
        connection, image_tag(name), build_folder(name, wheels), {"BASE": base, **proxies},
        labels={LABEL: name}, say=say,
    )  # fmt: skip


def daemon_architecture(connection: DockerConnection) -> str:
    """Docker's word for this machine, such as `amd64`."""
    return str(connection.run("say its version", lambda client: client.version())["Arch"])


def docker_build(
    connection: DockerConnection,
    tag: str,
    folder: bytes,
    arguments: Mapping[str, str],
    *,
    labels: Mapping[str, str],
    say: Say,
    network: str = "host",
    seconds: float = BUILD_SECONDS,
) -> None:
    """Build the tar `folder` as `tag`, saying Docker's steps. Raises EngineError with the words of a failed one."""
    client = connection.client(seconds)
    try:
        steps = connection.translated(
            f"build {tag}",
            lambda: client.build(
                fileobj=io.BytesIO(folder),
                custom_context=True,
                tag=tag,
                buildargs=dict(arguments),
                labels=dict(labels),
                network_mode=network,
                rm=True,
                forcerm=True,
                decode=True,
            ),
        )
        for step in _steps(connection, f"build {tag}", steps):
            for line in str(step.get("stream", "")).splitlines():
                if line.strip():
                    say(f"  {line.rstrip()}")
    finally:
        client.close()


def _steps(connection: DockerConnection, what: str, steps: Any) -> Iterator[dict[str, Any]]:
    """What Docker tells while it works. Raises EngineError with its words when a step failed."""
    while (step := connection.translated(what, lambda: next(steps, None))) is not None:
        if "error" in step:
            raise EngineError(f"Docker could not {what}: {step['error'].strip()}")
        yield step


def image_inspect(connection: DockerConnection, name: str) -> dict[str, Any] | None:
    """What Docker knows of an image; None when it has none of that name or digest."""

    def look(client: docker.APIClient) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = client.inspect_image(name)  # type: ignore[no-untyped-call]
        except ImageNotFound:
            return None
        return found

    return connection.run(f"inspect {name}", look)


def _image_size(connection: DockerConnection, tag: str) -> int | None:
    there = image_inspect(connection, tag)
    return None if there is None else int(there["Size"])

"""The image: which base is taken and why, when it is built again, and what is in it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from e2a.core.errors import EngineError, EngineUnavailable
from sandboxes import image_build, image_files, image_wheels
from sandboxes.engines.base import SandboxSpec
from sandboxes.engines.docker import DockerConnection, DockerEngine
from sandboxes.image_build import (
    AptSource,
    build_image,
    choose_base,
    debian_sources,
)
from sandboxes.image_files import image_tag, template_names, wheels_wanted
from tests.engines.conftest import SpecMaker, Starter
from tests.engines.inside import run

TOOLS = "bash git curl rg jq less nano patch ps make gcc python pip sqlite3 tar tree unzip wget xz zip ssh"


def test_the_image_is_found_and_not_built_again() -> None:
    said: list[str] = []
    first = build_image("standard", say=lambda _line: None)
    again = build_image("standard", say=said.append)
    assert (again.tag, again.built) == (first.tag, False)
    assert said == [f"{first.tag} is up to date"]
    assert again.size_bytes < 1.1e9


def test_a_changed_guest_is_another_tag_and_a_changed_cache_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = tmp_path / "guest"
    shutil.copytree(image_files.GUEST, guest)
    before = image_tag("standard")
    monkeypatch.setattr(image_files, "GUEST", guest)
    assert image_tag("standard") == before
    (guest / "__pycache__").mkdir(exist_ok=True)
    (guest / "__pycache__" / "x.pyc").write_bytes(b"x")
    assert image_tag("standard") == before
    (guest / "more.py").write_text("x = 1\n")
    assert image_tag("standard") != before


def test_wheels_with_hashes_are_fetched_alone_and_those_without_with_what_they_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands: list[list[str]] = []

    def fetched(command: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("sandboxes.image_wheels.subprocess.run", fetched)
    wanted = {name: wheels_wanted(name) for name in ("layer-claude", "layer-codex", "browser", "standard")}
    assert wanted["standard"] is None
    for requirements in wanted.values():
        if requirements is not None:
            image_wheels.wheels_fetch(requirements, architecture="amd64")
    assert ["--no-deps" in command for command in commands] == [True, True, False]


def test_an_unknown_template_names_the_known_ones() -> None:
    assert "standard" in template_names()
    with pytest.raises(EngineError, match="standard"):
        image_tag("../standard")


def test_a_daemon_that_is_down_is_said_so() -> None:
    with pytest.raises(EngineUnavailable):
        build_image("standard", docker_host="unix:///nonexistent/docker.sock", say=lambda _line: None)


def test_both_formats_of_apts_sources_are_read(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text(
        "# deb http://off.test/debian bookworm main\n"
        "deb [signed-by=/x.gpg arch=amd64] http://one.test/debian bookworm main contrib # why\n"
        "deb-src http://one.test/debian bookworm main\n"
        "deb http://other.test/tool stable main\n"
    )
    (tmp_path / "sources.list.d" / "debian.sources").write_text(
        "Types: deb deb-src\n# a word\nURIs: http://two.test/debian\nSuites: bookworm bookworm-updates\n"
        "Components: main\nSigned-By:\n -----BEGIN\n .\n\n"
        "Types: deb\nURIs: http://three.test/debian\nSuites: bookworm\nComponents: main\nEnabled: no\n"
    )
    assert debian_sources(tmp_path) == [
        AptSource("http://one.test/debian", "bookworm", ("main", "contrib")),
        AptSource("http://two.test/debian", "bookworm", ("main",)),
        AptSource("http://two.test/debian", "bookworm-updates", ("main",)),
    ]


@pytest.mark.parametrize(
    ("on_host", "registry", "chosen", "said"),
    [
        ({"debian:bookworm-slim", "e2a/base:bookworm"}, None, "debian:bookworm-slim", "has already"),
        ({"e2a/base:bookworm"}, None, "e2a/base:bookworm", "has already"),
        (set(), None, "debian:bookworm-slim", "pulled"),
        (set(), "no such host", "e2a/base:bookworm", "no such host"),
    ],
)
def test_the_base_is_chosen_in_order_and_the_choice_is_explained(
    monkeypatch: pytest.MonkeyPatch, on_host: set[str], registry: str | None, chosen: str, said: str
) -> None:
    lines: list[str] = []
    made: list[str] = []
    monkeypatch.setattr(image_build, "_image_size", lambda _connection, tag: 1 if tag in on_host else None)
    monkeypatch.setattr(image_build, "_pull", lambda _host, _image, _say: registry)
    monkeypatch.setattr(image_build, "bootstrap_base", lambda *_args, **_options: made.append("base"))
    assert choose_base(DockerConnection(None), say=lines.append) == chosen
    assert said in lines[-1]
    assert made == (["base"] if registry else [])


def test_the_image_has_an_agents_everyday_tools_and_they_work_on_a_read_only_root(
    docker_engine: DockerEngine, make_spec: SpecMaker, started: Starter
) -> None:
    spec: SandboxSpec = make_spec(disk_mib=256, memory_mib=512)
    started(docker_engine, spec)
    assert run(spec, f"for t in {TOOLS}; do command -v $t >/dev/null || echo missing $t; done").output == ""
    commit = "git init -q && git -c user.name=a -c user.email=a@b.test commit -q --allow-empty -m x"
    assert run(spec, commit).exit_code == 0
    assert run(spec, "echo 'int main(){return 7;}' > a.c && gcc a.c && ./a.out").exit_code == 7
    assert run(spec, "python3 -m venv v && v/bin/python -c 'print(1)'").output == "1\n"
    assert run(spec, "echo hi | rg -c hi").output == "1\n"
    assert "2.1.330" in run(spec, "claude --version").output
    assert run(spec, "codex --version").output.endswith("codex-cli 0.163.0\n")
    assert run(spec, "date; locale charmap 2>/dev/null || echo $LANG").exit_code == 0

"""What script/server and script/test promise beyond the happy path, which CI itself walks."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from django.conf import settings

from e2a import processes as product
from tests.live import ROOT, free_port, wait_for

pytestmark = pytest.mark.alone

NO_ENGINE = "unix:///nonexistent/docker.sock"
SECRET_NAMES = ("E2A_VAULT_KEYS", "E2A_SIGNING_KEYS", "E2A_NODE_KEY", "SECRET_KEY", "EMAIL_URL")


def environment(**changes: str) -> dict[str, str]:
    """This process's environment as a person's shell has it: nothing of e2a but what is given."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("E2A_")}
    for name in ("REDIS_URL", "DATABASE_URL", "CI"):
        clean.pop(name, None)
    return clean | changes


def run(*command: str, seconds: float = 240, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment(**changes),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )


def library(body: str, *, folder: Path, docker_host: str = "") -> subprocess.CompletedProcess[str]:
    """Run lines of bash with the scripts' library loaded."""
    lines = f". script/lib/setup.sh\n{body}"
    return run("bash", "-euo", "pipefail", "-c", lines, E2A_DATA_DIR=str(folder), DOCKER_HOST=docker_host)


@pytest.fixture
def serving_without_docker(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], str]]]:
    """script/server where no engine answers: its process, and what it has printed."""
    log = tmp_path / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["script/server"],
            cwd=ROOT,
            env=environment(
                DOCKER_HOST=NO_ENGINE,
                E2A_BIND=f"127.0.0.1:{free_port()}",
                E2A_DATA_DIR=str(tmp_path / "var"),
                E2A_POOL="standard=1",
            ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    yield process, lambda: log.read_text(errors="replace")
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


def test_without_docker_the_server_says_so_loudly_and_serves(
    serving_without_docker: tuple[subprocess.Popen[bytes], Callable[[], str]],
) -> None:
    process, printed = serving_without_docker

    def is_ready() -> bool:
        assert process.poll() is None, printed()
        return "ready: http://127.0.0.1:" in printed()

    wait_for(is_ready, what="script/server ready", seconds=200, every=0.2)
    assert f"NO ISOLATION: no Docker daemon answers at {NO_ENGINE}." in printed()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert printed().rstrip().endswith("stopped")


def test_production_does_not_start_without_docker(tmp_path: Path) -> None:
    done = run(
        "script/server",
        DOCKER_HOST=NO_ENGINE,
        E2A_ENV="production",
        E2A_DATA_DIR=str(tmp_path / "var"),
        seconds=120,
    )
    assert done.returncode == 1
    assert "Production does not run without Docker." in done.stdout
    assert "Starting e2a" not in done.stdout


def test_set_up_that_was_done_is_not_done_again(tmp_path: Path) -> None:
    first = library("python_ready requirements.txt; echo ready", folder=tmp_path)
    again = library("python_ready requirements.txt; echo ready", folder=tmp_path)
    assert first.stdout.splitlines()[-1] == "ready"
    assert again.stdout == "ready\n"


def test_what_is_missing_is_named_by_its_package(tmp_path: Path) -> None:
    wanted = "bash=bash no-such-program=its-package libc.so.6=libc6 libnone.so.1=libnone1"
    done = library(f"packages_need {wanted}", folder=tmp_path)
    assert done.stdout == "its-package\nlibnone1\n"


def test_without_root_a_missing_package_is_named_with_what_to_type(tmp_path: Path) -> None:
    done = library("is_root() { false; }; packages_install some-package || echo refused", folder=tmp_path)
    assert "apt-get install some-package" in done.stdout
    assert done.stdout.endswith("refused\n")


def test_a_failed_step_shows_the_end_of_what_it_said(tmp_path: Path) -> None:
    done = library("logged 'Trying' sh -c 'echo reason; exit 3' || echo code $?", folder=tmp_path)
    assert "==> Trying" in done.stdout
    assert "    | reason" in done.stdout
    assert done.stdout.endswith("code 3\n")


def test_someone_elses_engine_is_never_started(tmp_path: Path) -> None:
    done = library('engine_ready || echo "none: $NO_ENGINE"', folder=tmp_path, docker_host=NO_ENGINE)
    assert done.stdout == f"none: no Docker daemon answers at {NO_ENGINE}\n"


SELECTION_SAMPLE = """
import pytest
@pytest.fixture
def docker_engine(): return 1
def test_plain(): pass
@pytest.mark.docker
def test_marked(): pass
def test_by_fixture(docker_engine): pass
@pytest.mark.django_db
def test_database(): pass
@pytest.mark.django_db
@pytest.mark.one_database
def test_inside(): pass
@pytest.mark.browser
def test_page(): pass
@pytest.mark.alone
@pytest.mark.parametrize("n", [1, 2])
def test_whole(n): pass
"""
PAGE = "test_sample.py::test_page"


@pytest.fixture
def select(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run pytest on the sample with these options of the selection."""
    (tmp_path / "test_sample.py").write_text(SELECTION_SAMPLE)
    markers = "docker django_db one_database browser alone".replace(" ", "\n    ")
    (tmp_path / "pytest.ini").write_text(f"[pytest]\nmarkers =\n    {markers}\n")
    plugins = ["-p", "script.lib.selection", "-p", "xdist.plugin", "-p", "no:cacheprovider"]

    def run_sample(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-v", *plugins, *options]
        where = ["-c", f"{tmp_path}/pytest.ini", str(tmp_path)]
        return run(*command, *where, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")

    return run_sample


@pytest.mark.parametrize(
    ("options", "ran"),
    [
        (["--without-docker", "no engine"], {"plain", "database", "inside", "page", "whole"}),
        (["--only-database"], {"database"}),
        (["--part", "together"], {"plain", "database", "inside"}),
        (["--part", "alone"], {"marked", "by_fixture", "page", "whole"}),
        (["--part", "alone", "--without-docker", "no engine"], {"page", "whole"}),
    ],
)
def test_the_selection_keeps_what_can_run(
    select: Callable[..., subprocess.CompletedProcess[str]], options: list[str], ran: set[str]
) -> None:
    done = select(*options)
    assert done.returncode == 0, done.stdout
    assert set(re.findall(r"test_sample.py::test_([a-z_]+)\S* PASSED", done.stdout)) == ran
    if "--without-docker" in options:
        assert "2 tests that need Docker were NOT run: no engine." in done.stdout


def test_a_test_that_ran_in_no_part_or_in_two_or_was_skipped_fails_the_sum(
    select: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    together, alone, fewer, skipped = (str(tmp_path / name) for name in ("one", "two", "three", "four"))
    side_by_side = select("--part", "together", "-n", "1", "--without-docker", "none", f"--tally={together}")
    assert side_by_side.returncode == 0, side_by_side.stdout
    assert "2 tests that need Docker were NOT run: none." in side_by_side.stdout
    assert select("--part", "alone", "--without-docker", "none", f"--tally={alone}").returncode == 0
    tally = json.loads(Path(alone).read_text())
    tally["ran"].remove(PAGE)
    Path(fewer).write_text(json.dumps(tally))
    Path(skipped).write_text(json.dumps(tally | {"skipped": [PAGE]}))

    def summed(*files: str) -> tuple[int, list[str]]:
        done = run(sys.executable, "script/lib/selection.py", *files)
        return done.returncode, [line.strip() for line in done.stdout.splitlines()]

    whole = "of 6 tests ran; 0 skipped, 2 left out for want of Docker"
    assert summed(together, alone) == (0, [f"3 + 3 {whole}"])
    assert summed(together, fewer) == (1, [f"3 + 2 {whole}", f"ran in no part: {PAGE}"])
    assert summed(together, skipped)[1][1:] == [f"skipped: {PAGE}"]
    code, lines = summed(together, alone, fewer)
    assert (code, lines[0]) == (1, f"3 + 3 + 2 {whole}")
    assert "ran 2 times: test_sample.py::test_whole[1]" in lines


def test_in_ci_a_missing_docker_engine_is_a_failure(tmp_path: Path) -> None:
    sample = "tests/product/test_scripts.py::test_what_is_missing_is_named_by_its_package"
    done = run("script/test", sample, DOCKER_HOST=NO_ENGINE, E2A_DATA_DIR=str(tmp_path), CI="true")
    assert done.returncode == 1
    assert "1 passed" in done.stdout
    assert done.stdout.count("\n  - ") == 1
    assert "0 tests that need Docker were NOT run" in done.stdout
    assert done.stdout.rstrip().endswith(f"(CI must run them: no Docker daemon answers at {NO_ENGINE})")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    return loaded


def test_compose_runs_the_processes_that_up_runs(compose: dict[str, Any]) -> None:
    ours = dataclasses.replace(settings.E2A, data_dir=Path("/data"), node_name="${E2A_NODE_NAME:-local}")
    for process in product.processes(ours, Path("/base")):
        service = compose["services"][process.name]
        argv = ["python", *(word.removeprefix("/base/") for word in process.argv[1:])]
        assert _without_warning_filter(service["command"]) == _without_warning_filter(argv)
        assert service["environment"]["E2A_ROLE"] == process.role


NOT_IN_COMPOSE = {
    "DOCKER_HOST": "its socket is mounted",
    "E2A_ENGINE": "production has one",
    "E2A_LOG_FORMAT": "json in production",
    "E2A_GOOGLE_URL": "the vendor is not built yet",
    "E2A_DEEPSEEK_URL": "the vendor is not built yet",
    "LLM_API_KEY": "of quickstart",
}


def test_compose_passes_every_setting_on() -> None:
    """One that is set in e2a.env and reaches no process would be ignored without a word."""
    documented = set(
        re.findall(
            r"^\| `([A-Z0-9_]+)`", (ROOT / "docs/reference/configuration.md").read_text(), re.MULTILINE
        )
    )
    passed_on = set(re.findall(r"\b[A-Z0-9_]+\b", (ROOT / "compose.yaml").read_text()))
    assert len(documented) > 40
    assert documented - passed_on == set(NOT_IN_COMPOSE)


def test_compose_gives_each_process_only_its_secrets(compose: dict[str, Any]) -> None:
    for name in ("web", "worker", "turns", "node", "gateway", "broker", "beat"):
        given = compose["services"][name]["environment"]
        assert set(given) & set(SECRET_NAMES) == set(
            product.environment_of(given["E2A_ROLE"], dict.fromkeys(SECRET_NAMES, "x"))
        ) & set(SECRET_NAMES)


def _without_warning_filter(argv: list[str]) -> list[str]:
    """Only processes of root need the filter, and in compose most are not root's."""
    return [word for word in argv if word != "-W" and not word.startswith("ignore:")]

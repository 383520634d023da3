"""`manage.py doctor`: on a healthy stack, and where something is broken. Each run is a process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2a.core.diagnosis import Look, findings_of, ok
from sandboxes.diagnosis.advisories import ADVISORIES, AS_OF, open_advisories, version_of
from sandboxes.diagnosis.engine import holes_finding
from tests.live import ROOT, LiveStack, wait_for

Found = dict[str, dict[str, str]]


def doctor(*arguments: str, **environment: str) -> tuple[int, Found, str]:
    """Exit code, findings by check (the worst of each), and all output."""
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("E2A_") and k not in ("REDIS_URL", "DATABASE_URL")
    }
    done = subprocess.run(
        [sys.executable, "manage.py", "doctor", *arguments],
        cwd=ROOT, env=clean | environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found: Found = {}
    if "--json" in arguments:
        worst = {"ok": 0, "warn": 1, "fail": 2}
        for one in json.loads(done.stdout):
            assert set(one) == {"check", "level", "seen", "advice"}
            before = found.get(one["check"])
            if before is None or worst[before["level"]] < worst[one["level"]]:
                found[one["check"]] = one
    return done.returncode, found, done.stdout + done.stderr


def levels(found: Found, level: str) -> set[str]:
    return {check for check, one in found.items() if one["level"] == level}


@pytest.fixture
def of_stack(live: LiveStack) -> dict[str, str]:
    """The environment of the running stack's processes."""
    return {"E2A_DATA_DIR": str(live.data_dir), "E2A_ENGINE": "docker"}


@pytest.fixture
def alone(tmp_path: Path) -> dict[str, str]:
    """An installation of which nothing runs."""
    return {"E2A_DATA_DIR": str(tmp_path / "var")}


@pytest.mark.docker
def test_a_healthy_stack_fails_nothing(of_stack: dict[str, str]) -> None:
    # Beat's first sign comes 10 s after its start.
    wait_for(
        lambda: doctor("--json", **of_stack)[1]["beat"]["level"] == "ok",
        what="a sign of beat",
        seconds=60,
        every=1,
    )
    code, found, output = doctor("--json", "--min-free-gib", "0.1", **of_stack)
    assert levels(found, "fail") == set(), output
    assert code == 0
    healthy = {
        "database", "migrations", "redis", "clock", "engine", "storage driver", "runtime", "image of standard",
        "disk of the data folder", "disk of Docker", "node local", "gateway of local", "broker",
        "queue control", "queue turns", "queue provision", "queue node.local", "beat", "pool of standard", "mail",
    }  # fmt: skip
    assert healthy <= set(found)
    for check in healthy - {"pool of standard", "storage driver", "clock", "database", "redis"}:
        assert found[check]["level"] == "ok", found[check]


@pytest.mark.docker
def test_it_reads_well_and_says_what_to_do(of_stack: dict[str, str]) -> None:
    code, _, output = doctor("--min-free-gib", "1000000", **of_stack)
    assert code == 1
    lines = output.splitlines()
    (at,) = [index for index, line in enumerate(lines) if line.startswith("fail disk of the data folder:")]
    assert " GiB free at " in lines[at]
    assert lines[at + 1].startswith("     → Free some")
    assert " fail" in lines[-1]


@pytest.mark.docker
def test_a_low_disk_warns_before_it_fails(of_stack: dict[str, str]) -> None:
    import shutil

    free = shutil.disk_usage(of_stack["E2A_DATA_DIR"]).free / 1024**3
    code, found, _ = doctor("--json", "--min-free-gib", str(free * 2), **of_stack)
    assert (code, found["disk of the data folder"]["level"]) == (0, "warn")
    code, found, _ = doctor("--json", "--min-free-gib", str(free * 10), **of_stack)
    assert (code, found["disk of the data folder"]["level"]) == (1, "fail")


@pytest.mark.docker
def test_an_old_and_a_missing_image_are_told_apart(alone: dict[str, str]) -> None:
    subprocess.run(
        [sys.executable, "manage.py", "migrate", "-v0"], cwd=ROOT, env=os.environ | alone | {"DATABASE_URL": ""},
        check=True, timeout=120,
    )  # fmt: skip
    import sqlite3

    def image(name: str) -> dict[str, str]:
        with sqlite3.connect(Path(alone["E2A_DATA_DIR"]) / "db.sqlite3") as database:
            database.execute("UPDATE sandboxes_template SET image_id = ? WHERE name = 'standard'", [name])
        return doctor("--json", **alone)[1]["image of standard"]

    assert image("") | {"advice": ""} == {
        "check": "image of standard", "level": "fail", "advice": "",
        "seen": "never built, and E2A_POOL wants some parked",
    }  # fmt: skip
    missing = image("e2a/standard:never")
    assert (missing["level"], missing["seen"]) == ("fail", "e2a/standard:never is not on this host")
    assert "manage.py image_build standard" in missing["advice"]
    subprocess.run(
        ["docker", "build", "-qt", "e2a-doctor-test:old", "-"], input=b"FROM scratch\nLABEL a=b\n", check=True,
        capture_output=True, timeout=120,
    )  # fmt: skip
    try:
        old = image("e2a-doctor-test:old")
    finally:
        subprocess.run(
            ["docker", "rmi", "-f", "e2a-doctor-test:old"], check=True, capture_output=True, timeout=60
        )
    assert old["level"] == "warn"
    assert "not made of the present Dockerfile and guest" in old["seen"]


@pytest.fixture
def mute_docker(tmp_path: Path) -> Iterator[str]:
    """A Docker that takes calls and never answers."""
    path = f"/tmp/e2a-mute-{os.getpid()}.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    held: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                held.append(listener.accept()[0])
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    yield f"unix://{path}"
    listener.close()
    os.unlink(path)
    for one in held:
        one.close()


def test_with_nothing_running_it_says_so_and_ends(alone: dict[str, str], mute_docker: str) -> None:
    started = time.monotonic()
    code, found, output = doctor("--json", **alone, DOCKER_HOST=mute_docker)
    assert code == 1
    assert time.monotonic() - started < 90
    assert {"migrations", "redis", "engine", "workers", "nodes", "images"} <= levels(found, "fail"), output
    assert "Traceback" not in json.dumps(found)
    assert "manage.py up" in found["redis"]["advice"]
    assert "in time" in found["engine"]["seen"] or "timed out" in found["engine"]["seen"]
    assert found["mail"]["level"] == "ok"
    for check in levels(found, "fail") | levels(found, "warn"):
        assert found[check]["advice"], check


def test_a_docker_that_is_away_is_named(alone: dict[str, str]) -> None:
    code, found, _ = doctor("--json", **alone, DOCKER_HOST="unix:///nowhere/docker.sock")
    assert (code, found["engine"]["level"]) == (1, "fail")
    assert "/nowhere/docker.sock does not answer" in found["engine"]["seen"]
    assert "DOCKER_HOST" in found["engine"]["advice"]


def test_a_redis_that_is_away_is_named(alone: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # Nobody listens there, and nobody else gets it.
        code, found, _ = doctor("--json", **alone, REDIS_URL=f"redis://127.0.0.1:{taken.getsockname()[1]}/0")
    assert (code, found["redis"]["level"], found["workers"]["level"]) == (1, "fail", "fail")
    assert "REDIS_URL" in found["redis"]["advice"]


def test_a_runtime_that_docker_does_not_know_fails(alone: dict[str, str]) -> None:
    migrated = os.environ | alone | {"DATABASE_URL": ""}
    subprocess.run(
        [sys.executable, "manage.py", "migrate", "-v0"], cwd=ROOT, env=migrated, check=True, timeout=120
    )
    _, found, _ = doctor("--json", **alone, E2A_DOCKER_RUNTIME="runsc-nowhere")
    assert found["runtime"]["level"] == "fail"
    assert "runsc-nowhere (E2A_DOCKER_RUNTIME) is not known to Docker; it knows" in found["runtime"]["seen"]


def test_missing_secrets_of_production_are_named(alone: dict[str, str]) -> None:
    code, found, output = doctor("--json", **alone, E2A_ENV="production")
    assert (code, found["settings"]["level"]) == (1, "fail")
    for name in ("E2A_VAULT_KEYS", "E2A_SIGNING_KEYS", "E2A_NODE_KEY", "SECRET_KEY", "E2A_PUBLIC_URL"):
        assert name in output


class MailServer:
    """A server that greets, and keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        try:
            caller, _ = self._listener.accept()
            with caller, caller.makefile("rwb") as lines:
                lines.write(b"220 mail.example.com\r\n")
                lines.flush()
                for line in lines:
                    self.told.append(line.decode().strip())
                    lines.write(
                        b"221 bye\r\n" if line.upper().startswith(b"QUIT") else b"250 mail.example.com\r\n"
                    )
                    lines.flush()
        except OSError:
            return

    def close(self) -> None:
        self._listener.close()


def test_a_mail_server_is_greeted_and_gets_no_mail(alone: dict[str, str]) -> None:
    server = MailServer()
    _, found, _ = doctor("--json", **alone, EMAIL_URL=f"smtp://127.0.0.1:{server.port}")
    server.close()
    assert found["mail"]["level"] == "ok", found["mail"]
    assert [line.split()[0].upper() for line in server.told] == ["EHLO", "QUIT"] or [
        line.split()[0].upper() for line in server.told
    ] == ["EHLO", "EHLO", "QUIT"]
    assert not any("MAIL" in line.upper().split()[:1] for line in server.told)


def test_a_mail_server_that_is_away_is_named(alone: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        _, found, _ = doctor(
            "--json", **alone, EMAIL_URL=f"smtp://someone:secret-4711@127.0.0.1:{taken.getsockname()[1]}"
        )
    assert found["mail"]["level"] == "fail"
    assert "secret-4711" not in json.dumps(found)


# -- in this process


def test_a_look_that_hangs_or_fails_is_a_finding_and_the_others_are_told() -> None:
    never = threading.Event()

    def hangs() -> Iterator[Any]:
        yield ok("first", "seen before it hung")
        never.wait(60)

    def fails() -> Iterator[Any]:
        yield from ()
        raise ValueError("broken")

    started = time.monotonic()
    found = findings_of(
        [Look("hangs", hangs, 0.2), Look("fails", fails), Look("works", lambda: [ok("works", "yes")])]
    )
    never.set()
    assert time.monotonic() - started < 20
    assert [(one.check, one.level) for one in found] == [
        ("first", "ok"), ("hangs", "fail"), ("fails", "fail"), ("works", "ok")
    ]  # fmt: skip
    assert found[1].seen == "no answer within 0.2 s"
    assert found[2].seen == "could not be looked at: ValueError: broken"


@pytest.mark.parametrize(
    ("component", "version", "cves"),
    [
        ("runc", "1.4.3", set()),
        ("runc", "1.3.6", set()),
        ("runc", "1.3.2", {"CVE-2025-31133", "CVE-2025-52565", "CVE-2025-52881", "CVE-2026-41579"}),
        ("runc", "1.4.0-rc.2", {"CVE-2025-31133", "CVE-2025-52565", "CVE-2025-52881", "CVE-2026-41579"}),
        ("runc", "1.5.0", set()),
        ("containerd", "1.7.29", set()),
        ("containerd", "v1.7.28", {"CVE-2024-25621"}),
        ("containerd", "2.2.0", set()),
        ("docker", "29.5.1", set()),
        ("docker", "29.3.0", {"CVE-2026-41567"}),
        ("docker", "something else", set()),
    ],
)
def test_holes_are_known_by_version_and_branch(component: str, version: str, cves: set[str]) -> None:
    assert {one.cve for one in open_advisories(component, version)} == cves


def test_what_concerns_authorization_plugins_is_said_only_where_there_are_some() -> None:
    assert {one.cve for one in open_advisories("docker", "29.3.0", has_authorization_plugin=True)} == {
        "CVE-2026-34040", "CVE-2026-41567"
    }  # fmt: skip


def test_a_way_out_fails_unless_a_distribution_may_have_mended_it() -> None:
    assert holes_finding("runc", "1.1.5").level == "fail"
    packaged = holes_finding("runc", "1.1.5+ds1-1+deb12u1")
    assert packaged.level == "warn"
    assert "CVE-2024-21626" in packaged.seen
    assert "changelog" in packaged.advice
    assert holes_finding("runc", "1.4.3").seen == f"1.4.3: none known on {AS_OF}"


def test_the_table_can_be_read_by_its_own_reader() -> None:
    for advisory in ADVISORIES:
        assert advisory.cve.startswith("CVE-")
        assert all(version_of(fixed) is not None for fixed in advisory.fixed)

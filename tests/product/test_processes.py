"""Which process holds what (ARCHITECTURE 2), and how the supervisor keeps them."""

from __future__ import annotations

import base64
import io
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import get_args

import pytest
from django.conf import settings

from e2a.processes import environment_of, processes
from e2a.settings.environment import Role, read
from e2a.supervisor import Supervisor
from tests.live import wait_for

SECRETS = {
    name: f"planted-{name}"
    for name in (
        "E2A_VAULT_KEYS",
        "E2A_SIGNING_KEYS",
        "E2A_NODE_KEY",
        "SECRET_KEY",
        "EMAIL_URL",
        "DOCKER_HOST",
        "E2A_STORAGE_SECRET_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
    )
}


@pytest.mark.parametrize(
    ("role", "held"),
    [
        ("web", {"E2A_VAULT_KEYS", "E2A_SIGNING_KEYS", "E2A_NODE_KEY", "SECRET_KEY", "EMAIL_URL"}),
        ("worker", SECRETS.keys() - {"DOCKER_HOST"}),
        ("node", {"DOCKER_HOST"}),
        ("gateway", {"E2A_NODE_KEY"}),
        ("broker", {"E2A_VAULT_KEYS", "E2A_NODE_KEY"}),
        ("beat", set()),
    ],
)
def test_a_process_gets_only_the_secrets_that_its_role_needs(role: Role, held: set[str]) -> None:
    environment = environment_of(role, SECRETS | {"PATH": "/bin"})
    assert {name for name in SECRETS if name in environment} == held
    assert environment["PATH"] == "/bin"
    assert environment["E2A_ROLE"] == role


@pytest.mark.parametrize("role", ["node", "gateway", "beat"])
def test_key_rings_are_not_even_read_from_the_data_folder_where_they_may_not_be(
    role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("E2A_ROLE", role)
    ours = read(settings.BASE_DIR)
    assert ours.vault_keys.keys == ()
    assert ours.signing_keys.keys == ()
    assert bool(ours.node_key) == (role == "gateway")


def test_the_broker_opens_secrets_and_can_sign_nobody_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E2A_ROLE", "broker")
    ours = read(settings.BASE_DIR)
    assert ours.vault_keys.keys
    assert ours.node_key
    assert ours.signing_keys.keys == ()


def test_every_role_is_run_and_every_queue_is_served() -> None:
    running = processes(settings.E2A, settings.BASE_DIR)
    assert {process.role for process in running} == set(get_args(Role)) - {"all"}
    queues = {q for p in running if "-Q" in p.argv for q in p.argv[p.argv.index("-Q") + 1].split(",")}
    assert queues == {"control", "turns", "archives", "provision", f"node.{settings.E2A.node_name}"}


@pytest.mark.parametrize(
    ("name", "value", "check_id"),
    [
        ("E2A_ROLE", "cook", "e2a.E004"),
        ("E2A_ENGINE", "podman", "e2a.E005"),
        ("E2A_POOL", "standard", "e2a.E003"),
        ("E2A_VAULT_KEYS", "a:c2hvcnQ=", "e2a.E002"),
    ],
)
def test_nonsense_in_the_environment_is_refused_by_name(
    name: str, value: str, check_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    found = read(settings.BASE_DIR).problems
    assert [problem for problem in found if problem[0] == check_id and name in problem[1]]


def test_production_has_no_default_for_a_secret_and_refuses_the_process_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("E2A_ENV", "production")
    monkeypatch.setenv("E2A_ENGINE", "process")
    found = dict.fromkeys(
        message.split(" ")[0].split("=")[0] for _, message in read(settings.BASE_DIR).problems
    )
    assert {
        "SECRET_KEY",
        "E2A_VAULT_KEYS",
        "E2A_SIGNING_KEYS",
        "E2A_NODE_KEY",
        "E2A_PUBLIC_URL",
        "E2A_ENGINE",
    } <= set(found)


def test_the_supervisor_prefixes_output_restarts_a_child_and_stops_cleanly(tmp_path: Path) -> None:
    output = io.StringIO()
    pids = tmp_path / "pids"
    note = f"import os, time; open({str(pids)!r}, 'a').write(str(os.getpid()) + chr(10))"
    script = f"{note}; print('hello', flush=True); time.sleep(60)"
    supervisor = Supervisor(output=output, stop_seconds=5)

    def seen() -> list[int]:
        return [int(line) for line in pids.read_text().split()] if pids.exists() else []

    def drive() -> None:
        wait_for(lambda: len(seen()) == 1, what="the first start")
        os.kill(seen()[0], signal.SIGKILL)
        wait_for(lambda: len(seen()) == 2, what="the restart")
        wait_for(lambda: output.getvalue().count("child   | hello\n") == 2, what="its second output")
        supervisor.stop()

    driver = threading.Thread(target=drive)
    supervisor.add("child", (sys.executable, "-c", script), os.environ)
    driver.start()
    supervisor.run()
    driver.join(30)
    assert "was ended by SIGKILL" in output.getvalue()
    for pid in seen():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_the_admin_of_production_is_at_a_path_that_nobody_guesses_and_that_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SECURITY 9.12"""
    monkeypatch.delenv("E2A_ADMIN_PATH", raising=False)
    assert read(settings.BASE_DIR).admin_path == "admin"
    old, new = (base64.b64encode(os.urandom(32)).decode() for _ in range(2))
    monkeypatch.setenv("E2A_ENV", "production")
    monkeypatch.setenv("E2A_SIGNING_KEYS", f"a:{old}")
    made = read(settings.BASE_DIR).admin_path
    assert re.fullmatch("admin-[0-9a-f]{20}", made)
    monkeypatch.setenv("E2A_SIGNING_KEYS", f"b:{new},a:{old}")
    assert read(settings.BASE_DIR).admin_path == made
    monkeypatch.setenv("E2A_ADMIN_PATH", "desk")
    assert read(settings.BASE_DIR).admin_path == "desk"

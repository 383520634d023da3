"""SECURITY 4.5: the ring rotates while everything runs, resumably, and no value is lost or mixed."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.core.management import call_command
from django.core.management.base import CommandError
from django.db import connections

from accounts.services import user_get_or_create
from e2a.core.keyring import Key, KeyRing
from e2a.core.models import AuditEvent
from secrets_vault import services
from secrets_vault.crypto import VaultKeyMissing
from secrets_vault.models import DataKey
from secrets_vault.rotation import data_keys_rewrap, wrapped_by
from tests.secrets_vault.conftest import PLANTED

ROOT = Path(__file__).resolve().parents[2]
OLD: Key = settings.E2A.vault_keys.newest
NEW = Key("rotated", os.urandom(32))
BOTH = KeyRing((NEW, OLD))


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As if all processes had been restarted with these keys."""

    def change(*keys: Key) -> KeyRing:
        ring = KeyRing(keys)
        monkeypatch.setattr(settings, "E2A", dataclasses.replace(settings.E2A, vault_keys=ring))
        return ring

    return change


def planted(count: int) -> list[Any]:
    """So many tenants with a bundle each, whose data keys the old key wraps."""
    tenants = [user_get_or_create(address=f"r{number}@example.com").tenant for number in range(count)]
    for tenant in tenants:
        services.bundle_create(tenant=tenant, name="default", values={"A_SECRET": f"{PLANTED}-{tenant.pk}"})
        services.bundles_attach(tenant=tenant, names=["default"], holder=f"ses_{tenant.pk}")
    return tenants


def read(tenant: Any) -> str:
    environment, _ = services.holder_environment(f"ses_{tenant.pk}")
    return environment["A_SECRET"].reveal()


@pytest.mark.django_db
def test_4_5_all_data_keys_move_and_the_old_key_may_go(ring: Any) -> None:
    tenants = planted(7)
    before = {row.pk: bytes(row.wrapped) for row in DataKey.objects.all()}
    steps: list[int] = []
    done = data_keys_rewrap(ring(NEW, OLD), batch=3, progress=lambda state: steps.append(state.rewrapped))
    assert (done.rewrapped, done.failed, steps) == (7, {}, [3, 6, 7])
    assert wrapped_by() == {"rotated": 7}
    assert all(bytes(row.wrapped) != before[row.pk] for row in DataKey.objects.all())
    ring(NEW)  # The old key is out of the ring.
    assert [read(tenant) for tenant in tenants] == [f"{PLANTED}-{tenant.pk}" for tenant in tenants]
    assert AuditEvent.objects.get(action="vault.rotated").detail == {"rewrapped": 7, "failed": []}


@pytest.mark.django_db
def test_4_5_a_second_run_has_nothing_to_do(ring: Any) -> None:
    planted(2)
    both = ring(NEW, OLD)
    data_keys_rewrap(both)
    assert data_keys_rewrap(both).rewrapped == 0
    assert AuditEvent.objects.filter(action="vault.rotated").count() == 1


@pytest.mark.django_db
def test_4_5_one_that_does_not_open_stays_and_is_named_and_the_others_move(ring: Any) -> None:
    good, bad, gone = planted(3)
    wrapped = bytearray(DataKey.objects.get(tenant=bad).wrapped)
    wrapped[-1] ^= 1
    DataKey.objects.filter(tenant=bad).update(wrapped=bytes(wrapped))
    DataKey.objects.filter(tenant=gone).update(wrapping_key_id="removed")
    ring(NEW, OLD)
    out, err = io.StringIO(), io.StringIO()
    with pytest.raises(CommandError, match="2 data keys do not open"):
        call_command("rotate_vault_key", stdout=out, stderr=err)
    assert "1 data keys are wrapped by 'rotated' now." in out.getvalue()
    assert f"{bad.public_id}: secret_corrupt" in err.getvalue()
    assert f"{gone.public_id}: vault_key_missing" in err.getvalue()
    assert "'removed' is not in the ring, and 1 data keys need it." in err.getvalue()
    assert bytes(DataKey.objects.get(tenant=bad).wrapped) == bytes(wrapped)
    assert read(good) == f"{PLANTED}-{good.pk}"
    with pytest.raises(VaultKeyMissing):
        read(gone)


@pytest.mark.django_db
def test_the_command_says_when_the_old_key_may_be_taken_out(ring: Any) -> None:
    planted(2)
    ring(NEW, OLD)
    told = io.StringIO()
    call_command("rotate_vault_key", check=True, stdout=told)
    assert f"'{OLD.id}' still wraps 2: keep it" in told.getvalue()
    assert wrapped_by() == {OLD.id: 2}
    told = io.StringIO()
    call_command("rotate_vault_key", stdout=told)
    assert f"'{OLD.id}' wraps none: take it out" in told.getvalue()


def test_a_new_key_fits_in_front_of_the_ring() -> None:
    told = io.StringIO()
    call_command("rotate_vault_key", new_key=True, stdout=told)
    ring = KeyRing.parse(f"{told.getvalue().strip()},old:{base64.b64encode(OLD.secret).decode()}")
    assert len(ring.newest.secret) == 32
    assert ring.keys[1].id == "old"


@pytest.mark.django_db(transaction=True)
def test_4_5_reads_and_writes_go_on_while_it_rotates(ring: Any) -> None:
    """Two rotations at once, with readers and writers beside them: no error, and the last writes are there."""
    tenants = planted(12)
    both = ring(NEW, OLD)
    errors: list[BaseException] = []
    counted = {"reads": 0, "writes": 0}
    over = threading.Event()

    def in_thread(work: Any) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)
            finally:
                connections.close_all()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def reader() -> None:
        while not over.is_set() or not counted["reads"]:
            for tenant in tenants:
                assert read(tenant).startswith(PLANTED)
                counted["reads"] += 1

    def writer() -> None:
        while not over.is_set() or not counted["writes"]:
            for tenant in tenants:
                services.bundle_replace(
                    tenant=tenant, name="default", values={"A_SECRET": f"{PLANTED}-new-{tenant.pk}"}
                )
                counted["writes"] += 1

    beside = [in_thread(reader), in_thread(writer)]
    rotations = [in_thread(lambda: data_keys_rewrap(both, batch=1)) for _ in range(2)]
    for thread in rotations:
        thread.join(120)
    over.set()
    for thread in beside:
        thread.join(120)
    assert errors == []
    assert min(counted.values()) >= 1
    assert wrapped_by() == {"rotated": 12}
    ring(NEW)
    assert [read(tenant) for tenant in tenants] == [f"{PLANTED}-new-{tenant.pk}" for tenant in tenants]


_PLANT = """
from accounts.services import user_get_or_create
from secrets_vault import services
for number in range(60):
    tenant = user_get_or_create(address=f"k{number}@example.com").tenant
    services.bundle_create(tenant=tenant, name="default", values={"A_SECRET": f"planted-value-{number}"})
    services.bundles_attach(tenant=tenant, names=["default"], holder=f"ses_{number}")
"""
_READ = """
from secrets_vault import services
for number in range(60):
    value = services.holder_environment(f"ses_{number}")[0]["A_SECRET"].reveal()
    assert value == f"planted-value-{number}", number
print("ALL READ")
"""


def test_4_5_killed_in_the_middle_it_is_resumed(tmp_path: Path) -> None:
    """kill -9 of the command; everything opens before, between and after, at last without the old key."""
    old, new = (f"{name}:{base64.b64encode(os.urandom(32)).decode()}" for name in ("old", "new"))
    clean = {k: v for k, v in os.environ.items() if not k.startswith("E2A_") and k != "DATABASE_URL"}

    def manage(ring: str, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-u", "manage.py", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env=clean | {"E2A_DATA_DIR": str(tmp_path), "E2A_VAULT_KEYS": ring},
        )  # fmt: skip

    def done(ring: str, *arguments: str) -> str:
        process = manage(ring, *arguments)
        told, _ = process.communicate(timeout=120)
        assert process.returncode == 0, told
        return told

    done(old, "migrate", "--verbosity", "0")
    done(old, "shell", "-c", _PLANT)
    both = f"{new},{old}"
    process = manage(both, "rotate_vault_key", "--batch", "1")
    assert process.stdout is not None
    while "  20 " not in process.stdout.readline():
        assert process.poll() is None, "it ended before it was killed"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    between = done(both, "rotate_vault_key", "--check")
    assert "'old' still wraps" in between, between
    assert "'new' is the newest: it wraps 0." not in between
    assert "ALL READ" in done(both, "shell", "-c", _READ)
    assert "'old' wraps none" in done(both, "rotate_vault_key")
    assert "ALL READ" in done(new, "shell", "-c", _READ)

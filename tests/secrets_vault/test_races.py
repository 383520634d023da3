"""Many at once: caps hold, versions are consecutive, nothing is mixed."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from django.db import connections

from secrets_vault import services
from secrets_vault.models import Bundle, BundleUse, BundleVersion, DataKey
from tests.secrets_vault.conftest import SECRETS

pytestmark = pytest.mark.django_db(transaction=True)


def at_once(count: int, call: Callable[[int], Any]) -> list[Any]:
    """Run `call(0)` … `call(count - 1)` in threads that start together; their results or exceptions."""
    barrier = threading.Barrier(count)
    results: list[Any] = [None] * count

    def run(index: int) -> None:
        barrier.wait(timeout=30)
        try:
            results[index] = call(index)
        except Exception as error:  # The test asserts on what came out, whatever it is.
            results[index] = error
        finally:
            connections.close_all()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    return results


def test_4_4_sixty_parallel_creates_end_at_fifty(alice: Any, alice_key: str, api: Any) -> None:
    answers = at_once(
        60, lambda i: api(alice_key).post(SECRETS, {"name": f"b{i}", "values": {"A": "12345678"}})
    )
    codes = Counter((a.status_code, a.json().get("code")) for a in answers)
    assert codes == {(201, None): 50, (409, "secrets_too_large"): 10}
    assert Bundle.objects.count() == 50
    assert DataKey.objects.count() == 1


def test_twenty_parallel_creates_of_one_name_make_one(alice: Any, alice_key: str, api: Any) -> None:
    body = {"name": "default", "values": {"A": "12345678"}}
    answers = at_once(20, lambda i: api(alice_key).post(SECRETS, body))
    codes = Counter((a.status_code, a.json().get("code")) for a in answers)
    assert codes == {(201, None): 1, (409, "already_exists"): 19}
    assert BundleVersion.objects.count() == 1


def test_4_6_twenty_parallel_puts_give_twenty_consecutive_versions(
    alice: Any, alice_key: str, api: Any
) -> None:
    services.bundle_create(tenant=alice.tenant, name="default", values={"A": "12345678"})
    services.bundles_attach(tenant=alice.tenant, names=["default"], holder="ses_a")

    def put(index: int) -> Any:
        values = {"A": f"value-{index:04}", "B": f"value-{index:04}", f"ONLY_{index}": f"value-{index:04}"}
        return api(alice_key).put(f"{SECRETS}/default", {"values": values})

    answers = at_once(20, put)
    assert {a.status_code for a in answers} == {200}
    assert sorted(a.json()["version"] for a in answers) == list(range(2, 22))
    last = next(index for index, a in enumerate(answers) if a.json()["version"] == 21)
    values = services.values_read(holder="ses_a", purpose="test")
    assert {name: v.text.reveal() for name, v in values.items()} == dict.fromkeys(
        ("A", "B", f"ONLY_{last}"), f"value-{last:04}"
    )
    kept = BundleVersion.objects.order_by("version").values_list("version", flat=True)
    assert list(kept) == list(range(12, 22))


def test_parallel_patches_of_different_names_lose_none(alice: Any, alice_key: str, api: Any) -> None:
    services.bundle_create(tenant=alice.tenant, name="default", values={"A": "12345678"})
    answers = at_once(
        12, lambda i: api(alice_key).patch(f"{SECRETS}/default", {"values": {f"N{i}": "12345678"}})
    )
    assert {a.status_code for a in answers} == {200}
    body = api(alice_key).get(f"{SECRETS}/default").json()
    assert body["version"] == 13
    assert body["keys"] == sorted(["A", *(f"N{i}" for i in range(12))])


def test_4_6_a_reader_never_sees_a_mix_of_two_bodies(alice: Any) -> None:
    services.bundle_create(tenant=alice.tenant, name="default", values={"A": "value-0000", "B": "value-0000"})
    services.bundles_attach(tenant=alice.tenant, names=["default"], holder="ses_a")
    writers_left = threading.Semaphore(0)

    def work(index: int) -> Any:
        if index < 2:
            for number in range(15):
                text = f"value-{index}{number:03}"
                services.bundle_replace(tenant=alice.tenant, name="default", values={"A": text, "B": text})
            writers_left.release()
            return []
        seen = []
        while True:
            values = services.values_read(holder="ses_a", purpose="test")
            seen.append({value.text.reveal() for value in values.values()})
            if index == 2 and len(seen) >= 20 and writers_left.acquire(blocking=False):
                return seen
            if index > 2 and len(seen) >= 20:
                return seen

    results = at_once(4, work)
    for seen in results:
        assert isinstance(seen, list), seen
        assert all(len(texts) == 1 for texts in seen)


def test_a_bundle_that_is_deleted_while_sessions_take_it_is_held_or_missing(alice: Any) -> None:
    for round_number in range(5):
        services.bundle_create(tenant=alice.tenant, name="b", values={"A": "12345678"})

        def work(index: int, round_number: int = round_number) -> Any:
            if index == 0:
                services.bundle_delete(tenant=alice.tenant, name="b")
                return "deleted"
            services.bundles_attach(tenant=alice.tenant, names=["b"], holder=f"ses_{round_number}_{index}")
            return "held"

        results = at_once(6, work)
        outcomes = [r if isinstance(r, str) else getattr(r, "code", repr(r)) for r in results]
        held = BundleUse.objects.count()
        if outcomes[0] == "deleted":
            assert set(outcomes[1:]) == {"secret_not_found"}
            assert held == 0
        else:
            assert outcomes[0] == "in_use"
            assert outcomes[1:] == ["held"] * 5
            assert held == 5
        Bundle.objects.all().delete()


def test_a_tenants_first_data_key_is_made_once(alice: Any) -> None:
    sealed = at_once(12, lambda i: services.seal(tenant=alice.tenant, purpose="p", data=b"data-%d" % i))
    assert DataKey.objects.count() == 1
    opened = [services.unseal(tenant=alice.tenant, purpose="p", data=one) for one in sealed]
    assert opened == [b"data-%d" % i for i in range(12)]

"""SECURITY 4.1 and 4.2: what is stored opens only where it belongs, and a changed bit is noticed and told."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any

import pytest
from django.conf import settings
from django.db import connection
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from e2a.core.keyring import Key, KeyRing
from e2a.core.models import AuditEvent
from secrets_vault import crypto, services
from secrets_vault.crypto import SecretCorrupt, SecretText, VaultKeyMissing
from secrets_vault.models import Bundle, BundleVersion, DataKey, SecretValue
from secrets_vault.sealing import PassphraseSealer
from tests.secrets_vault.conftest import PLANTED, SECRETS

RING = KeyRing((Key("new", bytes(range(32))), Key("old", bytes(range(32, 64)))))
PLACE: dict[str, Any] = {"tenant_id": "ten_a", "bundle_id": "sec_a", "name": "A", "version": 1}


def _row(**filters: Any) -> SecretValue:
    return SecretValue.objects.get(**filters)


def _put(tenant: Any, name: str = "default", **values: str) -> Bundle:
    services.bundle_create(tenant=tenant, name=name, values=values)
    return Bundle.objects.get(tenant=tenant, name=name)


# ---- The primitives ----------------------------------------------------------------------------------


@given(st.text(), st.integers(min_value=0))
def test_4_2_a_value_opens_in_its_place_and_no_flipped_bit_goes_unnoticed(text: str, position: int) -> None:
    data_key = bytes(range(32))
    stored = crypto.value_encrypt(SecretText(text), data_key=data_key, **PLACE)
    assert crypto.value_decrypt(stored, data_key=data_key, **PLACE).reveal() == text
    bit = position % (len(stored) * 8)
    changed = bytearray(stored)
    changed[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(SecretCorrupt):
        crypto.value_decrypt(bytes(changed), data_key=data_key, **PLACE)


@pytest.mark.parametrize(
    "change", [{"tenant_id": "ten_b"}, {"bundle_id": "sec_b"}, {"name": "B"}, {"version": 2}]
)
def test_4_2_a_value_does_not_open_anywhere_else(change: dict[str, Any]) -> None:
    data_key = crypto.data_key_make()
    stored = crypto.value_encrypt(SecretText(PLANTED), data_key=data_key, **PLACE)
    with pytest.raises(SecretCorrupt) as caught:
        crypto.value_decrypt(stored, data_key=data_key, **{**PLACE, **change})
    assert PLANTED not in repr(caught.value)


def test_parts_of_a_place_cannot_slide_into_one_another() -> None:
    data_key = crypto.data_key_make()
    here: dict[str, Any] = {"tenant_id": "ten_a", "bundle_id": "sec_ab", "name": "A", "version": 1}
    there: dict[str, Any] = {"tenant_id": "ten_as", "bundle_id": "ec_ab", "name": "A", "version": 1}
    stored = crypto.value_encrypt(SecretText(PLANTED), data_key=data_key, **here)
    with pytest.raises(SecretCorrupt):
        crypto.value_decrypt(stored, data_key=data_key, **there)


@pytest.mark.parametrize("stored", [b"", b"\x01", b"\x01" + b"x" * 27, b"\x02" + b"x" * 60, b"x" * 1000])
def test_bytes_of_another_form_are_corrupt_not_a_crash(stored: bytes) -> None:
    with pytest.raises(SecretCorrupt):
        crypto.value_decrypt(stored, data_key=bytes(32), **PLACE)
    with pytest.raises((SecretCorrupt, VaultKeyMissing)):
        crypto.passphrase_decrypt(stored, passphrase="p", ring=RING)


def test_4_1_no_nonce_comes_twice_in_a_hundred_thousand_writes() -> None:
    data_key = crypto.data_key_make()
    text = SecretText("12345678")
    nonces = {crypto.value_encrypt(text, data_key=data_key, **PLACE)[1:13] for _ in range(100_000)}
    assert len(nonces) == 100_000


def test_a_data_key_is_bound_to_its_tenant_and_to_the_key_that_wraps_it() -> None:
    data_key = crypto.data_key_make()
    wrapped = crypto.data_key_wrap(data_key, key=RING.newest, tenant_id="ten_a")
    assert data_key not in wrapped
    assert crypto.data_key_unwrap(wrapped, ring=RING, key_id="new", tenant_id="ten_a") == data_key
    for key_id, tenant_id in (("new", "ten_b"), ("old", "ten_a")):
        with pytest.raises(SecretCorrupt):
            crypto.data_key_unwrap(wrapped, ring=RING, key_id=key_id, tenant_id=tenant_id)
    with pytest.raises(VaultKeyMissing):
        crypto.data_key_unwrap(wrapped, ring=RING, key_id="gone", tenant_id="ten_a")
    same_secret = KeyRing((Key("renamed", RING.newest.secret),))
    with pytest.raises(SecretCorrupt):
        crypto.data_key_unwrap(wrapped, ring=same_secret, key_id="renamed", tenant_id="ten_a")


def test_a_passphrase_opens_only_with_the_ring_and_the_ring_only_with_the_passphrase() -> None:
    sealed = crypto.passphrase_encrypt(PLANTED.encode(), passphrase="weak", ring=RING)
    assert PLANTED.encode() not in sealed
    assert b"weak" not in sealed
    older_first = KeyRing(tuple(reversed(RING.keys)))
    assert crypto.passphrase_decrypt(sealed, passphrase="weak", ring=older_first) == PLANTED.encode()
    with pytest.raises(SecretCorrupt):
        crypto.passphrase_decrypt(sealed, passphrase="Weak", ring=RING)
    with pytest.raises(SecretCorrupt):
        other = KeyRing((Key("new", bytes(range(1, 33))),))
        crypto.passphrase_decrypt(sealed, passphrase="weak", ring=other)
    with pytest.raises(VaultKeyMissing):
        crypto.passphrase_decrypt(sealed, passphrase="weak", ring=KeyRing((Key("x", bytes(range(32))),)))


# ---- Text that hides ---------------------------------------------------------------------------------


def test_4_3_secret_text_shows_itself_nowhere() -> None:
    secret = SecretText(PLANTED)

    @dataclasses.dataclass
    class Holder:
        text: SecretText

    shown = [
        repr(secret),
        str(secret),
        f"{secret}",
        f"{secret:>40}",
        repr(Holder(secret)),
        repr([secret]),
    ]
    assert not any(PLANTED in text for text in shown)
    assert secret.reveal() == PLANTED
    assert not hasattr(secret, "__dict__")


def test_secret_text_cannot_be_carried_away() -> None:
    secret = SecretText(PLANTED)
    for carry in (pickle.dumps, copy.copy, copy.deepcopy, json.dumps, hash):
        with pytest.raises(TypeError) as caught:
            carry(secret)
        assert PLANTED not in str(caught.value)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError):
            pickle.dumps(secret, protocol)


def test_secret_texts_compare_by_content_and_only_among_themselves() -> None:
    assert SecretText("ä") == SecretText("ä")
    assert SecretText("a") != SecretText("b")
    assert SecretText("a") != "a"


# ---- In the database ---------------------------------------------------------------------------------


@pytest.mark.django_db
def test_4_1_the_database_alone_holds_no_value(alice: Any) -> None:
    _put(alice.tenant, A=PLANTED, LLM_API_KEY=PLANTED)
    services.seal(tenant=alice.tenant, purpose="test", data=PLANTED.encode())
    tables = connection.introspection.table_names()
    with connection.cursor() as cursor:
        for table in tables:
            cursor.execute(f'SELECT * FROM "{table}"')
            for row in cursor.fetchall():
                for cell in row:
                    shown = bytes(cell) if isinstance(cell, bytes | memoryview) else str(cell).encode()
                    assert PLANTED.encode() not in shown, table


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("how", ["tenant", "bundle", "name", "version"])
def test_4_2_a_ciphertext_that_was_copied_elsewhere_does_not_open(
    alice: Any, mallory: Any, logged: Any, how: str
) -> None:
    _put(alice.tenant, A=PLANTED, B="another-value")
    _put(alice.tenant, "other", A="another-value")
    _put(mallory.tenant, A="mallorys-value")
    newest = {"A": "newest-value", "B": "another-value"}
    services.bundle_replace(tenant=alice.tenant, name="default", values=newest)
    here = {"bundle_version__bundle__tenant": alice.tenant, "bundle_version__bundle__name": "default"}
    source = _row(**here, bundle_version__version=1, name="A")
    target = {
        "tenant": {"bundle_version__bundle__tenant": mallory.tenant},
        "bundle": {"bundle_version__bundle__tenant": alice.tenant, "bundle_version__bundle__name": "other"},
        "name": {**here, "bundle_version__version": 2, "name": "B"},
        "version": {**here, "bundle_version__version": 2, "name": "A"},
    }[how]
    copied = _row(**target)
    SecretValue.objects.filter(pk=copied.pk).update(ciphertext=source.ciphertext)
    bundle = copied.bundle_version.bundle

    with pytest.raises(SecretCorrupt) as caught:
        services.values_read(bundles=[bundle], purpose="test")
    assert caught.value.code == "secret_corrupt"
    assert caught.value.names == (copied.name,)
    assert PLANTED not in str(caught.value)
    event = AuditEvent.objects.get(action="secret_corrupt")
    assert (event.tenant_id, event.target) == (bundle.tenant_id, bundle.public_id)
    assert event.detail["names"] == [copied.name]
    assert "vault.secret_corrupt" in logged.getvalue()
    assert PLANTED not in logged.getvalue()


@pytest.mark.django_db(transaction=True)
def test_4_2_over_http_a_corrupt_value_is_an_opaque_500_with_an_audit_row_and_a_put_heals_it(
    as_alice: Any, alice: Any
) -> None:
    as_alice.post(SECRETS, {"name": "default", "values": {"A": PLANTED, "B": "12345678"}})
    row = _row(name="A")
    stored = bytearray(bytes(row.ciphertext))
    stored[-1] ^= 1
    SecretValue.objects.filter(pk=row.pk).update(ciphertext=bytes(stored))

    answer = as_alice.patch(f"{SECRETS}/default", {"values": {"B": "87654321"}})
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert PLANTED not in answer.content.decode()
    assert AuditEvent.objects.filter(action="secret_corrupt", tenant_id=alice.tenant_id).count() == 1
    assert as_alice.get(f"{SECRETS}/default").json()["version"] == 1

    assert as_alice.put(f"{SECRETS}/default", {"values": {"A": "whole-again"}}).json()["version"] == 2
    assert as_alice.patch(f"{SECRETS}/default", {"values": {"B": "87654321"}}).status_code == 200
    assert as_alice.post(f"{SECRETS}/default/rollback", {"version": 1}).status_code == 500


@pytest.mark.django_db(transaction=True)
def test_a_copied_or_changed_data_key_does_not_open(alice: Any, mallory: Any) -> None:
    bundle = _put(alice.tenant, A=PLANTED)
    _put(mallory.tenant, A="mallorys-value")
    hers = DataKey.objects.get(tenant=mallory.tenant)
    DataKey.objects.filter(tenant=alice.tenant).update(wrapped=hers.wrapped)
    with pytest.raises(SecretCorrupt):
        services.values_read(bundles=[bundle], purpose="test")


@pytest.mark.django_db(transaction=True)
def test_4_5_a_shredded_tenant_reads_nothing_any_more(alice: Any) -> None:
    bundle = _put(alice.tenant, A=PLANTED)
    sealed = services.seal(tenant=alice.tenant, purpose="test", data=b"data")
    DataKey.objects.filter(tenant=alice.tenant).delete()
    for read in (
        lambda: services.values_read(bundles=[bundle], purpose="test"),
        lambda: services.unseal(tenant=alice.tenant, purpose="test", data=sealed),
    ):
        with pytest.raises(SecretCorrupt):
            read()


@pytest.mark.django_db
def test_4_5_a_new_vault_key_wraps_new_tenants_while_the_old_ones_still_read(
    alice: Any, mallory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = _put(alice.tenant, A=PLANTED)
    grown = KeyRing((Key("second", bytes(range(7, 39))), *settings.E2A.vault_keys.keys))
    monkeypatch.setattr(settings, "E2A", dataclasses.replace(settings.E2A, vault_keys=grown))
    _put(mallory.tenant, A="mallorys-value")
    assert DataKey.objects.get(tenant=mallory.tenant).wrapping_key_id == "second"
    assert DataKey.objects.get(tenant=alice.tenant).wrapping_key_id != "second"
    assert services.values_read(bundles=[bundle], purpose="test")["A"].text.reveal() == PLANTED

    without = KeyRing(grown.keys[:1])
    monkeypatch.setattr(settings, "E2A", dataclasses.replace(settings.E2A, vault_keys=without))
    with pytest.raises(VaultKeyMissing):
        services.values_read(bundles=[bundle], purpose="test")


@pytest.mark.django_db
def test_the_same_value_is_stored_differently_each_time(alice: Any) -> None:
    _put(alice.tenant, A=PLANTED, B=PLANTED)
    stored = [bytes(row.ciphertext)[13:] for row in SecretValue.objects.all()]
    assert stored[0] != stored[1]
    assert BundleVersion.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_a_sealed_blob_opens_for_its_tenant_and_purpose_only(alice: Any, mallory: Any) -> None:
    sealed = services.seal(tenant=alice.tenant, purpose="env", data=b"\x00\xff" + PLANTED.encode())
    services.seal(tenant=mallory.tenant, purpose="env", data=b"")
    opened = services.unseal(tenant=alice.tenant, purpose="env", data=memoryview(sealed))
    assert opened == b"\x00\xff" + PLANTED.encode()
    for tenant, purpose in ((mallory.tenant, "env"), (alice.tenant, "other")):
        with pytest.raises(SecretCorrupt):
            services.unseal(tenant=tenant, purpose=purpose, data=sealed)
    assert AuditEvent.objects.filter(action="secret_corrupt").count() == 2


@pytest.mark.django_db
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(data=st.binary(max_size=4096), passphrase=st.text(max_size=255))
def test_an_idempotent_answer_opens_under_its_own_key(data: bytes, passphrase: str) -> None:
    sealer = PassphraseSealer()
    assert sealer.unseal(passphrase, sealer.seal(passphrase, data)) == data
    with pytest.raises(SecretCorrupt):
        sealer.unseal(passphrase + "x", sealer.seal(passphrase, data))

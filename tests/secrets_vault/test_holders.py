"""Who holds a bundle, what its commands get, and what stays with the model outside."""

from __future__ import annotations

from typing import Any

import pytest
from django.conf import settings

from e2a.core.errors import NotFound, ValidationFailed
from secrets_vault import services
from secrets_vault.models import Bundle, BundleUse

pytestmark = pytest.mark.django_db


def put(tenant: Any, name: str, **values: Any) -> None:
    services.bundle_create(tenant=tenant, name=name, values=values)


def code_of(call: Any) -> str:
    with pytest.raises((ValidationFailed, NotFound)) as caught:
        call()
    return str(caught.value.code)


def test_4_7_the_model_values_never_enter_the_environment(alice: Any, hold: Any) -> None:
    put(
        alice.tenant,
        "b",
        LLM_API_KEY="sk-12345678",
        LLM_MODEL="m",
        LLM_BASE_URL="https://a.example.com",
        OTHER="12345678",
    )
    hold("ses_a", "b")
    environment, fingerprint = services.holder_environment("ses_a")
    assert {name: value.reveal() for name, value in environment.items()} == {"OTHER": "12345678"}
    assert services.holder_environment_names("ses_a") == {"OTHER"}
    assert fingerprint == services.holder_fingerprint("ses_a") == f"{Bundle.objects.get().pk}:1"


def test_reading_the_environment_does_not_even_open_the_model_key(alice: Any, hold: Any, logged: Any) -> None:
    put(alice.tenant, "b", LLM_API_KEY="sk-12345678", OTHER="12345678")
    hold("ses_a", "b")
    services.holder_environment("ses_a")
    line = next(line for line in logged.getvalue().splitlines() if "vault.values_read" in line)
    assert "OTHER" in line
    assert "LLM_API_KEY" not in line


def test_a_holder_without_bundles_has_nothing(alice: Any) -> None:
    assert services.holder_environment("ses_none") == ({}, "")
    assert services.holder_fingerprint("ses_none") == ""
    assert services.holder_llm("ses_none") is None
    assert services.holder_environment_names("ses_none") == frozenset()


def test_4_10_the_next_reading_after_a_replacement_has_the_new_values(alice: Any, hold: Any) -> None:
    put(alice.tenant, "b", LLM_API_KEY="first-key", TOKEN="first-token")
    hold("ses_a", "b")
    before = services.holder_fingerprint("ses_a")
    services.bundle_replace(
        tenant=alice.tenant, name="b", values={"LLM_API_KEY": "second-key", "TOKEN": "second-token"}
    )
    assert services.holder_fingerprint("ses_a") != before
    secret = services.holder_llm("ses_a")
    assert secret is not None
    assert secret.api_key.reveal() == "second-key"
    assert services.holder_environment("ses_a")[0]["TOKEN"].reveal() == "second-token"


def test_bundles_are_attached_in_order_and_twice_is_once(alice: Any, hold: Any) -> None:
    for name in ("c", "a", "b"):
        put(alice.tenant, name, **{f"{name.upper()}_TOKEN": "12345678"})
    hold("ses_a", "b", "a", "b", "c")
    hold("ses_a", "a")
    held = (
        BundleUse.objects.filter(holder="ses_a").order_by("position").values_list("bundle__name", flat=True)
    )
    assert list(held) == ["b", "a", "c"]


def test_4_4_a_missing_bundle_and_a_strangers_are_404_secret_not_found(
    alice: Any, mallory: Any, hold: Any
) -> None:
    put(mallory.tenant, "hers", A="12345678")
    put(alice.tenant, "mine", A="12345678")
    for name in ("hers", "nothing", "NOT A NAME", "a\0b", ""):
        assert code_of(lambda name=name: hold("ses_a", "mine", name)) == "secret_not_found"
    assert not BundleUse.objects.exists()


def test_4_4_one_name_in_two_bundles_is_400_secret_collision(alice: Any, hold: Any) -> None:
    put(alice.tenant, "one", SHARED="12345678", A="12345678")
    put(alice.tenant, "two", SHARED="87654321", B="12345678")
    assert code_of(lambda: hold("ses_a", "one", "two")) == "secret_collision"
    assert not BundleUse.objects.exists()
    hold("ses_a", "one")
    hold("ses_b", "two")


def test_a_replacement_cannot_bring_a_collision_into_a_running_session(
    alice: Any, as_alice: Any, hold: Any
) -> None:
    put(alice.tenant, "one", A="12345678")
    put(alice.tenant, "two", B="12345678")
    hold("ses_a", "one", "two")
    answer = as_alice.patch("/v1/tenants/me/secrets/two", {"values": {"A": "87654321"}})
    assert (answer.status_code, answer.json()["code"]) == (400, "secret_collision")
    assert as_alice.get("/v1/tenants/me/secrets/two").json()["version"] == 1
    assert as_alice.patch("/v1/tenants/me/secrets/two", {"values": {"C": "87654321"}}).status_code == 200


def test_4_4_ten_bundles_fit_and_eleven_do_not(alice: Any, hold: Any) -> None:
    for index in range(11):
        put(alice.tenant, f"b{index}", **{f"N{index}": "12345678"})
    assert code_of(lambda: hold("ses_a", *(f"b{index}" for index in range(11)))) == "secrets_too_large"
    hold("ses_a", *(f"b{index}" for index in range(10)))


def test_4_4_all_bundles_of_a_holder_fit_one_mebibyte(alice: Any, as_alice: Any, hold: Any) -> None:
    for name in ("x", "y"):
        put(alice.tenant, name, **{f"{name.upper()}{index}": "v" * 65000 for index in range(8)})
    hold("ses_a", "x", "y")
    put(alice.tenant, "z", Z="v" * 65000)
    assert code_of(lambda: hold("ses_b", "x", "y", "z")) == "secrets_too_large"
    answer = as_alice.patch("/v1/tenants/me/secrets/y", {"values": {"MORE": "v" * 65000}})
    assert (answer.status_code, answer.json()["code"]) == (400, "secrets_too_large")


def test_release_ends_the_use_and_removes_what_was_made_for_the_holder(
    alice: Any, as_alice: Any, hold: Any
) -> None:
    put(alice.tenant, "b", A="12345678")
    hold("ses_a", "b")
    services.inline_bundle_create(tenant=alice.tenant, holder="ses_a", values={"LLM_API_KEY": "inline-key"})
    secret = services.holder_llm("ses_a")
    assert secret is not None
    assert secret.api_key.reveal() == "inline-key"
    services.bundles_release(holder="ses_a")
    services.bundles_release(holder="ses_a")
    assert list(Bundle.objects.values_list("name", flat=True)) == ["b"]
    assert services.holder_fingerprint("ses_a") == ""
    assert as_alice.delete("/v1/tenants/me/secrets/b").status_code == 204


def test_values_from_the_request_collide_with_a_bundles_too(alice: Any, hold: Any) -> None:
    put(alice.tenant, "b", LLM_API_KEY="12345678")
    hold("ses_a", "b")
    inline = {"LLM_API_KEY": "inline-key"}
    collides = code_of(
        lambda: services.inline_bundle_create(tenant=alice.tenant, holder="ses_a", values=inline)
    )
    assert collides == "secret_collision"
    assert Bundle.objects.count() == 1


def test_4_9_a_key_belongs_to_the_origin_of_its_own_bundle(alice: Any, hold: Any) -> None:
    put(alice.tenant, "own", LLM_API_KEY="12345678", LLM_BASE_URL="https://llm.example.com/v1")
    put(alice.tenant, "key", LLM_API_KEY="12345678", LLM_MODEL="some-model")
    put(alice.tenant, "url", LLM_BASE_URL="https://other.example.com/v1")
    hold("ses_own", "own")
    hold("ses_key", "key")
    hold("ses_two", "key", "url")
    own, key, two = (services.holder_llm(holder) for holder in ("ses_own", "ses_key", "ses_two"))
    assert own is not None
    assert key is not None
    assert two is not None
    assert (own.base_url, own.key_origin) == ("https://llm.example.com/v1", "https://llm.example.com")
    assert (key.base_url, key.key_origin, key.model) == (None, None, "some-model")
    assert (two.base_url, two.key_origin) == ("https://other.example.com/v1", None)


def test_4_9_a_stored_key_does_not_follow_a_patched_base_url(as_alice: Any) -> None:
    path = "/v1/tenants/me/secrets/b"
    values = {"LLM_API_KEY": "12345678", "LLM_BASE_URL": "https://llm.example.com/v1"}
    as_alice.post("/v1/tenants/me/secrets", {"name": "b", "values": values})

    def patch(**values: Any) -> Any:
        answer = as_alice.patch(path, {"values": values})
        return answer.json().get("code", answer.status_code)

    assert patch(LLM_BASE_URL="https://evil.example.net") == "origin_mismatch"
    assert patch(LLM_BASE_URL="https://llm.example.com.evil.example.net") == "origin_mismatch"
    assert patch(LLM_BASE_URL=None) == "origin_mismatch"
    assert as_alice.get(path).json()["version"] == 1
    assert patch(LLM_BASE_URL="https://llm.example.com/v2") == 200
    assert patch(LLM_BASE_URL="https://new.example.net", LLM_API_KEY="87654321") == 200
    assert patch(LLM_BASE_URL="https://last.example.net", LLM_API_KEY=None) == 200


def test_4_9_a_key_for_the_vendor_itself_stays_with_vendors(as_alice: Any) -> None:
    path = "/v1/tenants/me/secrets/b"
    as_alice.post("/v1/tenants/me/secrets", {"name": "b", "values": {"LLM_API_KEY": "12345678"}})
    vendor = settings.E2A.vendor_urls["anthropic"]
    assert as_alice.patch(path, {"values": {"LLM_BASE_URL": vendor}}).status_code == 200
    answer = as_alice.patch(path, {"values": {"LLM_BASE_URL": "https://evil.example.net"}})
    assert (answer.status_code, answer.json()["code"]) == (400, "origin_mismatch")
    assert as_alice.patch(path, {"values": {"LLM_BASE_URL": None}}).status_code == 200

"""Names, sizes and forms: each cap at its edge, each refusal with its code, none of them quoting a value."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2a.core.errors import ValidationFailed
from secrets_vault import rules
from tests.secrets_vault.conftest import PLANTED, SECRETS

pytestmark = pytest.mark.django_db


def refusal(client: Any, values: Any, name: str = "b") -> tuple[int, str]:
    answer = client.post(SECRETS, {"name": name, "values": values})
    body = answer.json()
    assert answer["Content-Type"].startswith("application/problem+json"), answer.content
    return answer.status_code, body["code"]


@pytest.mark.parametrize(
    "name", ["", "UPPER", "-a", "a_b", "a.b", "a b", "a\n", "\na", "ä", "a" * 64, "~x", "a/b"]
)
def test_4_4_a_bundle_name_is_anchored(as_alice: Any, name: str) -> None:
    assert refusal(as_alice, {"A": "12345678"}, name) == (400, "invalid_name")


@pytest.mark.parametrize("name", ["a", "0", "a-", "a" * 63, "a--b"])
def test_4_4_a_good_bundle_name_is_taken(as_alice: Any, name: str) -> None:
    assert as_alice.post(SECRETS, {"name": name, "values": {"A": "12345678"}}).status_code == 201


@pytest.mark.parametrize("name", ["", "lower", "1A", "A-B", "A B", "A\n", "Ä", "A" * 129, "A=B", "A\0"])
def test_4_4_a_value_name_is_anchored(as_alice: Any, name: str) -> None:
    assert refusal(as_alice, {name: "12345678"}) == (400, "invalid_name")


@pytest.mark.parametrize(
    "name",
    [
        "E2A_X", "E2A_", "PATH", "LD_PRELOAD", "LD_", "PYTHONPATH", "PYTHON", "PYTHON_X", "NODE_OPTIONS",
        "HOME", "USER", "SHELL", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "FTP_PROXY",
    ],
)  # fmt: skip
def test_a_reserved_name_is_400_reserved_name(as_alice: Any, name: str) -> None:
    assert refusal(as_alice, {name: "12345678"}) == (400, "reserved_name")
    assert rules.is_reserved_name(name.lower())


@pytest.mark.parametrize(
    "name", ["E2A", "PATHS", "MY_PATH", "LD", "LDX", "HOMEPAGE", "USERNAME", "SHELLS", "_", "PROXY"]
)
def test_a_name_that_only_looks_reserved_is_taken(as_alice: Any, name: str) -> None:
    assert as_alice.post(SECRETS, {"name": "b", "values": {name: "12345678"}}).status_code == 201


def test_a_value_of_seven_characters_is_too_short_and_of_eight_is_not(as_alice: Any) -> None:
    assert refusal(as_alice, {"A": "1234567"}) == (400, "value_too_short")
    assert refusal(as_alice, {"A": ""}) == (400, "value_too_short")
    assert refusal(as_alice, {"A": " " * 20}) == (400, "value_too_short")
    assert as_alice.post(SECRETS, {"name": "b", "values": {"A": "12345678"}}).status_code == 201


def test_base_url_and_model_are_settings_and_may_be_short(as_alice: Any) -> None:
    values = {"LLM_API_KEY": "12345678", "LLM_MODEL": "o1", "LLM_BASE_URL": "https://a.example.com"}
    assert as_alice.post(SECRETS, {"name": "b", "values": values}).status_code == 201


def test_4_4_a_value_of_64_kib_fits_and_one_byte_more_does_not(as_alice: Any) -> None:
    assert as_alice.post(SECRETS, {"name": "b", "values": {"A": "x" * 65536}}).status_code == 201
    assert refusal(as_alice, {"A": "x" * 65537}, "c") == (400, "secrets_too_large")
    assert refusal(as_alice, {"A": "ü" * 32769}, "c") == (400, "secrets_too_large")


def test_4_4_fifty_names_fit_and_fifty_one_do_not(as_alice: Any) -> None:
    fifty = {f"N{index}": "12345678" for index in range(50)}
    assert as_alice.post(SECRETS, {"name": "b", "values": fifty}).status_code == 201
    assert refusal(as_alice, {**fifty, "ONE_MORE": "12345678"}, "c") == (400, "secrets_too_large")
    answer = as_alice.patch(f"{SECRETS}/b", {"values": {"ONE_MORE": "12345678"}})
    assert (answer.status_code, answer.json()["code"]) == (400, "secrets_too_large")
    assert as_alice.get(f"{SECRETS}/b").json()["version"] == 1
    assert as_alice.patch(f"{SECRETS}/b", {"values": {"ONE_MORE": "12345678", "N0": None}}).status_code == 200


def test_4_4_fifty_bundles_fit_and_fifty_one_do_not(as_alice: Any, as_mallory: Any) -> None:
    for index in range(50):
        assert as_alice.post(SECRETS, {"name": f"b{index}", "values": {"A": "12345678"}}).status_code == 201
    assert refusal(as_alice, {"A": "12345678"}, "one-more") == (409, "secrets_too_large")
    assert refusal(as_alice, {"A": "12345678"}, "b0") == (409, "already_exists")
    assert as_mallory.post(SECRETS, {"name": "hers", "values": {"A": "12345678"}}).status_code == 201
    as_alice.delete(f"{SECRETS}/b0")
    assert as_alice.post(SECRETS, {"name": "one-more", "values": {"A": "12345678"}}).status_code == 201


def test_a_bundle_stays_below_one_environment(as_alice: Any) -> None:
    assert as_alice.post(SECRETS, {"name": "b", "values": {"A0": "x" * 65000}}).status_code == 201
    for index in range(1, 16):
        assert as_alice.patch(f"{SECRETS}/b", {"values": {f"A{index}": "x" * 65000}}).status_code == 200
    answer = as_alice.patch(f"{SECRETS}/b", {"values": {"A16": "x" * 65000}})
    assert (answer.status_code, answer.json()["code"]) == (400, "secrets_too_large")


@pytest.mark.parametrize(
    "values",
    [
        None, [], "x", 1, {}, {"A": 12345678}, {"A": None}, {"A": ["12345678"]}, {"A": {}},
        {"A": {"value": None}}, {"A": {"value": "12345678", "more": 1}}, {"A": "1234567\0"}, {"A": True},
    ],
)  # fmt: skip
def test_a_wrong_type_is_a_400_problem(as_alice: Any, values: Any) -> None:
    assert refusal(as_alice, values)[0] == 400


def test_unknown_fields_are_refused(as_alice: Any) -> None:
    answer = as_alice.post(SECRETS, {"name": "b", "values": {"A": "12345678"}, "tenant_id": 1})
    assert (answer.status_code, answer.json()["code"]) == (400, "unknown_field")


def test_a_lone_surrogate_is_a_400_problem(as_alice: Any) -> None:
    answer = as_alice.post(SECRETS, b'{"name": "b", "values": {"A": "\\ud800aaaaaaaa"}}')
    assert answer.status_code == 400


def test_every_wrong_value_is_named_at_once_and_none_is_quoted(as_alice: Any) -> None:
    answer = as_alice.post(
        SECRETS,
        {"name": "b", "values": {"PATH": PLANTED, "A": "short", PLANTED: "12345678", "B": {"value": 1}}},
    )
    body = answer.json()
    assert body["code"] == "validation_failed"
    assert [(e["field"], e["code"]) for e in body["errors"]] == [
        ("values.PATH", "reserved_name"),
        ("values.A", "value_too_short"),
        ("values", "invalid_name"),
        ("values.B", "invalid"),
    ]
    assert PLANTED not in answer.content.decode()


@pytest.mark.parametrize(
    "url",
    [
        "http://api.example.com", "https://127.0.0.1", "https://localhost", "https://10.0.0.1/v1",
        "https://user@api.example.com", "https://api.example.com/?a=1", "https://169.254.169.254",
        "ftp://api.example.com", "https://[::1]", "x", "",
    ],
)  # fmt: skip
def test_a_private_or_odd_base_url_is_400_forbidden_url(as_alice: Any, url: str) -> None:
    assert refusal(as_alice, {"LLM_API_KEY": "12345678", "LLM_BASE_URL": url}) == (400, "forbidden_url")


@pytest.mark.parametrize("model", ["", "a b", "x" * 129, "m\n", "ü"])
def test_a_malformed_model_is_400_invalid_model(as_alice: Any, model: str) -> None:
    assert refusal(as_alice, {"LLM_MODEL": model}) == (400, "invalid_model")


@pytest.mark.parametrize("key", ["sk-12345678\n", "sk 12345678", "sk-1234567\x7f", "schlüssel"])
def test_a_model_key_that_could_break_a_header_is_refused(as_alice: Any, key: str) -> None:
    assert refusal(as_alice, {"LLM_API_KEY": key}) == (400, "invalid_value")


GOOD_INJECT = {"hosts": ["api.example.com"], "header": "Authorization: Bearer {value}"}


@pytest.mark.parametrize(
    "inject",
    [
        "x", [], {}, {"hosts": ["api.example.com"]}, {**GOOD_INJECT, "more": 1},
        *({**GOOD_INJECT, "hosts": hosts} for hosts in (
            [], ["*"], ["localhost"], ["10.0.0.1"], ["https://api.example.com"], ["api.example.com:70000"],
            [1], ["api.example.com"] * 17, "x",
        )),
        *({**GOOD_INJECT, "header": header} for header in (
            "Authorization: Bearer", "{value}", "A: {value} {value}", "A: {value}\r\nB: c", "Host: {value}",
            "transfer-encoding: {value}", "A" * 300 + ": {value}", 1,
        )),
    ],
)  # fmt: skip
def test_a_malformed_inject_is_400_invalid_inject(as_alice: Any, inject: Any) -> None:
    assert refusal(as_alice, {"TOKEN": {"value": "12345678", "inject": inject}}) == (400, "invalid_inject")


def test_a_model_value_cannot_be_injected_and_a_multi_line_one_neither(as_alice: Any) -> None:
    assert refusal(as_alice, {"LLM_API_KEY": {"value": "12345678", "inject": GOOD_INJECT}}) == (
        400,
        "invalid_inject",
    )
    assert refusal(as_alice, {"TOKEN": {"value": "1234\n5678", "inject": GOOD_INJECT}}) == (
        400,
        "invalid_inject",
    )


def test_an_inject_rule_survives_a_patch_of_the_value_and_goes_only_when_asked(
    as_alice: Any, hold: Any
) -> None:
    from secrets_vault.services import holder_environment, holder_environment_names, values_read

    hosts = ["API.example.com", "*.example.org:443"]
    values = {
        "TOKEN": {"value": "first-token", "inject": {**GOOD_INJECT, "hosts": hosts}},
        "PLAIN": {"value": "12345678"},
    }
    assert as_alice.post(SECRETS, {"name": "b", "values": values}).status_code == 201
    hold("ses_a", "b")
    assert list(holder_environment("ses_a")[0]) == ["PLAIN"]
    assert holder_environment_names("ses_a") == {"PLAIN"}

    as_alice.patch(f"{SECRETS}/b", {"values": {"TOKEN": "second-token"}})
    read = values_read(holder="ses_a", purpose="test")["TOKEN"]
    assert read.text.reveal() == "second-token"
    assert read.inject == {"hosts": ["api.example.com", "*.example.org:443"], "header": GOOD_INJECT["header"]}
    broken = as_alice.patch(f"{SECRETS}/b", {"values": {"TOKEN": "1234\n5678"}})
    assert (broken.status_code, broken.json()["code"]) == (400, "invalid_inject")

    as_alice.patch(f"{SECRETS}/b", {"values": {"TOKEN": {"value": "third-token", "inject": None}}})
    assert sorted(holder_environment("ses_a")[0]) == ["PLAIN", "TOKEN"]


@given(
    st.dictionaries(
        st.text(max_size=12),
        st.none() | st.text(max_size=12) | st.integers() | st.lists(st.text()),
        max_size=4,
    )
)
def test_whatever_is_sent_is_taken_or_refused_with_a_field(values: dict[str, Any]) -> None:
    try:
        taken = rules.values_check(values, may_remove=True)
    except ValidationFailed as error:
        assert error.errors
        return
    for name, value in taken.items():
        assert rules._VALUE_NAME.fullmatch(name)
        assert not rules.is_reserved_name(name)
        assert value is None or (name in rules.SETTINGS or len(value.text.reveal()) >= 8)

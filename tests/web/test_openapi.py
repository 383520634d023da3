"""The OpenAPI document is valid, whole, and true: a fuzzer finds no answer that it does not describe (CONTRACT 1)."""

from __future__ import annotations

import re
from typing import Any

import pytest
import schemathesis
from django.core.wsgi import get_wsgi_application
from django.urls import URLResolver, get_resolver
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from sandboxes.models import Node

pytestmark = [pytest.mark.django_db, pytest.mark.long]

EXAMPLES = 10
schemathesis.serializer.alias("application/x-tar", "application/octet-stream")
HTTP_METHODS = {"get", "post", "put", "patch", "delete"}


def v1_routes() -> set[str]:
    """Every path below `/v1/` of the URL configuration."""
    found = set()
    for entry in get_resolver().url_patterns:
        if isinstance(entry, URLResolver) and str(entry.pattern) == "v1/":
            found |= {
                "/v1/" + re.sub(r"<\w+:(\w+)>", r"{\1}", str(route.pattern)) for route in entry.url_patterns
            }
    return found


def test_it_is_openapi_3_1_and_valid(openapi: dict[str, Any]) -> None:
    from drf_spectacular.validation import validate_schema

    assert openapi["openapi"].startswith("3.1.")
    validate_schema(openapi)  # type: ignore[no-untyped-call]


def test_every_route_of_the_api_is_in_it(openapi: dict[str, Any]) -> None:
    assert v1_routes() - {"/v1/openapi.json", "/v1/docs"} == set(openapi["paths"])


def test_every_operation_says_who_may_call_it_what_it_answers_and_that_errors_are_problems(
    openapi: dict[str, Any],
) -> None:
    names = set()
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            where = f"{method} {path}"
            names.add(operation["operationId"])
            assert operation.get("security", []) == ([] if path in OPEN else [{"bearer": []}]), where
            assert [status for status in operation["responses"] if status.startswith("2")], where
            for status in ("4XX", "5XX"):
                assert list(operation["responses"][status]["content"]) == ["application/problem+json"], where
    assert len(names) == sum(len(operations) for operations in openapi["paths"].values()), (
        "operation ids are unique"
    )


OPEN = {"/v1/auth/login", "/v1/auth/verify-otp", "/v1/auth/refresh"}


def test_anyone_may_read_it_and_its_page(client: Any) -> None:
    assert client.get("/v1/openapi.json")["Content-Type"].startswith("application/vnd.oai.openapi+json")
    page = client.get("/v1/docs")
    assert page.status_code == 200
    assert "e2a" in page.content.decode()


def test_no_example_shows_a_key(openapi: dict[str, Any]) -> None:
    import json

    assert not re.search(r"e2a_live_[0-9A-Za-z]{8}|sk-ant-[0-9A-Za-z]{8}|eyJ[\w-]{10}", json.dumps(openapi))


# ---- The fuzzer


@pytest.fixture
def fuzzed(openapi: dict[str, Any], node_row: Node, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The schema with the application behind it. A node is there by its row only: nothing ever runs."""
    monkeypatch.setattr("keys.authentication.CALLS_PER_MINUTE", 1_000_000)
    monkeypatch.setattr("sandboxes.services.WAIT_SECONDS", 0.1, raising=False)
    monkeypatch.setattr("sandboxes.snapshots.WAIT_SECONDS", 0.01)
    schema = schemathesis.openapi.from_dict(openapi)
    schema.app = get_wsgi_application()
    return schema


def no_500(ctx: Any, response: Any, case: Any) -> None:
    """503 and 501 are documented answers: no sandbox can run here, and some of the contract is not built yet."""
    if response.status_code >= 500:
        assert response.status_code in (501, 503), response.text
        assert response.json()["code"] in ("not_built", "no_node", "sandbox_unreachable", "unavailable"), (
            response.text
        )


def findings_of(schema: Any, mode: GenerationMode, headers: dict[str, str], ids: dict[str, str]) -> list[str]:
    """What the fuzzer finds wrong, with `headers` and, where `ids` has them, path parameters that are there."""
    checks = [no_500, status_code_conformance, content_type_conformance, response_schema_conformance]
    if mode is GenerationMode.NEGATIVE:
        checks.append(negative_data_rejection)
    findings: list[str] = []
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.label == "POST /v1/auth/logout":  # Would end the credential of all the others.
            continue

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def probe(case: Any) -> None:
            for name in set(case.path_parameters or {}) & set(ids):
                case.path_parameters[name] = ids[name]
            case.validate_response(case.call(headers=headers), checks=checks)

        try:
            probe()
        except FailureGroup as group:
            findings += [f"{operation.label}: {error}" for error in group.exceptions]
        except Unsatisfiable:
            continue  # Nothing negative can be made of an operation without parameters.
    return findings


@pytest.mark.django_db(transaction=True)  # The application closes connections after each request.
@pytest.mark.parametrize(
    "mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value
)
@pytest.mark.parametrize("credential", ["key", "account"])
def test_a_fuzzer_finds_no_500_and_nothing_that_is_not_documented(
    fuzzed: Any,
    mode: GenerationMode,
    credential: str,
    things: dict[str, str],
    alice: Any,
    api_key: Any,
    account_token: Any,
) -> None:
    token = api_key(alice) if credential == "key" else account_token(alice)
    ids = things if mode is GenerationMode.POSITIVE and credential == "account" else {}
    found = findings_of(fuzzed, mode, {"Authorization": f"Bearer {token}"}, ids)
    assert found == [], "\n\n".join(found)

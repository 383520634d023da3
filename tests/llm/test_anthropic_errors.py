"""What each failure of a model endpoint becomes, and that no key is in it."""

from __future__ import annotations

import dataclasses
import random
import traceback
from email.utils import format_datetime

import pytest
from django.conf import settings
from django.test import override_settings

from e2a.core.clock import now, seconds
from e2a.core.errors import NotBuilt, ValidationFailed
from e2a.core.outbound import Timeouts, outbound_client, trusted_url
from sessions_app.llm import model_endpoint, open_model
from sessions_app.llm.anthropic import AnthropicModel
from sessions_app.llm.base import ModelError, RetryPolicy, TextDelta, retry_delay
from tests.llm.conftest import KEY, Opened
from tests.llm.test_anthropic_stream import asked, said
from tests.model_server import (
    Answer,
    ModelServer,
    Step,
    cut,
    fail,
    garbage,
    hang,
    midstream_error,
    redirect,
    say,
    then,
)


def failure(client: AnthropicModel) -> ModelError:
    with pytest.raises(ModelError) as caught:
        list(client.stream(asked()))
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + caught.value.detail
    assert KEY not in shown
    return caught.value


@pytest.mark.parametrize(
    ("status", "code", "retryable"),
    [
        (400, "llm_bad_request", False),
        (401, "llm_auth", False),
        (402, "llm_billing", False),
        (403, "llm_auth", False),
        (404, "llm_bad_request", False),
        (408, "llm_server_error", True),
        (413, "llm_context_too_long", False),
        (422, "llm_bad_request", False),
        (429, "llm_rate_limited", True),
        (500, "llm_server_error", True),
        (502, "llm_server_error", True),
        (503, "llm_overloaded", True),
        (529, "llm_overloaded", True),
    ],
)
def test_a_status_becomes_a_code(open_client: Opened, status: int, code: str, retryable: bool) -> None:
    with ModelServer(then(fail(status, f"because of {KEY}"), say("not asked for"))) as models:
        error = failure(open_client(models))
        assert (error.code, error.retryable, error.status) == (code, retryable, status)
        assert error.detail == "because of [redacted:LLM_API_KEY]"
        assert len(models.requests) == 1, "the client must not retry by itself"


def test_a_conversation_that_does_not_fit_has_a_code_of_its_own(open_client: Opened) -> None:
    too_long = fail(400, "prompt is too long: 1000001 tokens > 1000000 maximum")
    with ModelServer(then(too_long)) as models:
        assert failure(open_client(models)).code == "llm_context_too_long"


def test_retry_after_is_read_in_all_its_forms(open_client: Opened) -> None:
    in_ten = format_datetime(now() + seconds(10), usegmt=True)
    steps: list[Step] = [
        fail(429, retry_after=2.5),
        fail(529, retry_after=in_ten),
        fail(429, retry_after="soon"),
        fail(429, retry_after="nan"),
        fail(429, retry_after=-3),
        Answer(503, b"busy", {"retry-after-ms": "1500"}),
        Answer(429, b"no", {"x-should-retry": "false"}),
    ]
    with ModelServer(then(*steps)) as models:
        client = open_client(models)
        errors = [failure(client) for _ in steps]
    assert errors[0].retry_after == 2.5
    assert errors[1].retry_after == pytest.approx(10, abs=3)
    assert [error.retry_after for error in errors[2:6]] == [None, None, 0.0, 1.5]
    assert errors[5].detail == "The model's endpoint answered 503."
    assert (errors[6].code, errors[6].retryable) == ("llm_rate_limited", False)


@pytest.mark.parametrize(
    "body",
    [
        b"event: message_start\ndata: {this is not json\n\n",
        b"event: message_start\ndata: [1, 2]\n\n",
        b'event: message_start\ndata: {"type": "message_start"}\n\n',
        b'event: message_stop\ndata: {"type": "message_stop"}\n\n',
        b'event: x\ndata: {"type": "content_block_delta", "index": 0, "delta": {}}\n\n',
        b'event: x\ndata: {"type": "message_start", "message": {"usage": {"input_tokens": NaN}}}\n\n',
        b"event: \xff\xfe\ndata: {}\n\n",
        b"data: " + b"[" * 200_000 + b"\n\n",
        b"data: " + b"x" * (9 * 1024 * 1024),
        b"data: x\n" * (2 * 1024 * 1024),
    ],
)
def test_garbage_is_a_bad_response(open_client: Opened, body: bytes) -> None:
    with ModelServer(then(garbage(body))) as models:
        error = failure(open_client(models))
    assert (error.code, error.retryable) == ("llm_bad_response", False)


def test_a_page_or_a_redirect_instead_of_a_stream_is_a_bad_response(open_client: Opened) -> None:
    page = Answer(200, b"<html>hello</html>", {"content-type": "text/html"})
    with ModelServer(then(say("inside"))) as inside, ModelServer(then(page, redirect(inside.url))) as models:
        client = open_client(models)
        assert [failure(client).code for _ in range(2)] == ["llm_bad_response"] * 2
        assert inside.requests == []


def test_an_error_in_the_middle_of_a_stream_keeps_what_was_spent(open_client: Opened) -> None:
    reply = say("one two three").with_(usage={"input_tokens": 77})
    kinds = ("overloaded_error", "api_error", "rate_limit_error", "authentication_error", "something_new")
    with ModelServer(then(*(midstream_error(reply, kind) for kind in kinds))) as models:
        client = open_client(models)
        errors = [failure(client) for _ in kinds]
    assert [error.code for error in errors] == [
        "llm_overloaded",
        "llm_server_error",
        "llm_rate_limited",
        "llm_auth",
        "llm_server_error",
    ]
    assert [error.retryable for error in errors] == [True, True, True, False, True]
    assert errors[0].usage is not None
    assert errors[0].usage.input_tokens == 77


def test_a_connection_that_breaks_in_the_middle_is_retryable(open_client: Opened) -> None:
    with ModelServer(then(cut(say("one two three")))) as models:
        client = open_client(models)
        seen: list[str] = []
        with pytest.raises(ModelError) as caught:
            seen.extend(event.text for event in client.stream(asked()) if isinstance(event, TextDelta))
    assert seen == ["one t"]
    assert (caught.value.code, caught.value.retryable) == ("llm_unreachable", True)


def test_silence_is_a_timeout(open_client: Opened) -> None:
    with ModelServer(then(hang())) as models:
        error = failure(open_client(models, timeouts=Timeouts(first_byte=0.2)))
    assert (error.code, error.retryable) == ("llm_timeout", True)


def test_a_closed_port_and_a_refused_address_look_the_same(open_client: Opened) -> None:
    with ModelServer(then(say("never"))) as models:
        gone = models
        refused = AnthropicModel(
            api_key=KEY, base_url=trusted_url(models.url), http=outbound_client(allow_private=())
        )
        first = failure(refused)
        assert models.requests == []
        refused.close()
    second = failure(open_client(gone))
    assert (first.code, first.detail, first.retryable) == (second.code, second.detail, second.retryable)
    assert first.code == "llm_unreachable"


@pytest.mark.parametrize("key", ["", "  ", "sk-ant\r\nx-evil: 1", "sk-änt", "sk ant", "x" * 5000])
def test_a_key_that_cannot_be_one_is_not_sent(open_client: Opened, key: str) -> None:
    with ModelServer(then(say("never"))) as models:
        assert failure(open_client(models, key=key)).code == "llm_auth"
        assert models.requests == []


def test_a_wrong_conversation_is_refused_by_the_server(open_client: Opened) -> None:
    with ModelServer(then(say("never"))) as models:
        client = open_client(models)
        with pytest.raises(ModelError) as caught:
            list(client.stream(asked(said("a"), said("b"))))
    assert caught.value.code == "llm_bad_request"
    assert "roles must alternate" in caught.value.detail
    assert models.requests[0].refusal == caught.value.detail


def test_the_client_does_not_show_its_key(open_client: Opened) -> None:
    with ModelServer(then()) as models:
        client = open_client(models)
        assert KEY not in repr(client)
        assert KEY not in str(client)


def test_back_off_grows_jitters_is_capped_and_heeds_the_vendor() -> None:
    policy = RetryPolicy(random=random.Random(1))
    plain = ModelError("llm_overloaded", "", retryable=True)
    for attempt, base in ((1, 1), (2, 2), (3, 4), (5, 16), (6, 30), (40, 30), (5000, 30)):
        delays = [policy.delay(attempt, plain) for _ in range(50)]
        assert base / 2 <= min(delays) < max(delays) <= base
    for asked_for, least in ((3.0, 3.0), (59.0, 59.0), (3600.0, 60.0)):
        told = ModelError("llm_rate_limited", "", retryable=True, retry_after=asked_for)
        delays = [policy.delay(1, told) for _ in range(50)]
        assert least <= min(delays) < max(delays) <= least + 1
    assert 0.5 <= retry_delay(1, plain) <= 1.0


def test_the_endpoint_is_the_operators_or_one_that_passes_the_url_rules() -> None:
    ours = dataclasses.replace(
        settings.E2A,
        llm_allow_private=frozenset({"models.lan:8080"}),
        vendor_urls={"anthropic": "http://127.0.0.1:9/", "openai": "https://api.openai.com"},
    )
    with override_settings(E2A=ours):
        default = model_endpoint("anthropic", None)
        assert default.url.url == "http://127.0.0.1:9"
        assert default.allow_private == {"models.lan:8080", "127.0.0.1:9"}
        assert model_endpoint("anthropic", "http://127.0.0.1:9/") == default
        named = model_endpoint("anthropic", "http://models.lan:8080/x")
        assert (named.url.path, named.allow_private) == ("/x", frozenset({"models.lan:8080"}))
        for refused in ("http://127.0.0.1:9/other", "http://127.0.0.1:10", "https://10.0.0.1"):
            with pytest.raises(ValidationFailed) as error:
                model_endpoint("anthropic", refused)
            assert error.value.code == "forbidden_url"
        for vendor in ("google", "deepseek"):
            with pytest.raises(NotBuilt) as not_built:
                model_endpoint(vendor, None)
            assert not_built.value.code == "vendor_unavailable"


def test_open_model_gives_a_client_that_works() -> None:
    with ModelServer(then(say("ok"))) as models:
        ours = dataclasses.replace(settings.E2A, vendor_urls={"anthropic": models.url})
        with override_settings(E2A=ours):
            endpoint = model_endpoint("anthropic", None)
            client = open_model(vendor="anthropic", api_key=KEY, endpoint=endpoint)
        list(client.stream(asked()))
        client.close()
    assert models.requests[0].key == KEY

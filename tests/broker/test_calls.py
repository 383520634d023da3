"""What a program in a sandbox gets of the model broker (SECURITY 4.7 to 4.9, 6.5): the model, and never the key."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import threading
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from typing import Any

import anthropic
import httpx2
import pytest
from asgiref.sync import sync_to_async
from django.conf import settings
from django.utils import timezone

from accounts.models import Tenant
from sandboxes.gateway.address import socket_path
from sandboxes.models import Sandbox, SandboxState
from secrets_vault.services import bundle_replace, bundles_release
from sessions_app.models import Event, ModelCall, Session, SessionStatus, Task, TaskState
from tests.broker.conftest import KEY, SANDBOX, Program, Stack, asks
from tests.egress.conftest import Heard, serving, until
from tests.model_server import Gate, ModelServer, cut, fail, hang, say

pytestmark = pytest.mark.django_db(transaction=True)

Start = Callable[..., Any]


async def ledger() -> list[dict[str, Any]]:
    return await sync_to_async(lambda: [dict(row) for row in ModelCall.objects.order_by("pk").values()])()


async def usage_frames() -> list[dict[str, Any]]:
    rows = Event.objects.filter(type="usage").order_by("seq").values("data", "task_id")
    return await sync_to_async(lambda: [dict(row) for row in rows])()


async def change(what: Any, **values: Any) -> None:
    await sync_to_async(type(what).objects.filter(pk=what.pk).update)(**values)


def error_of(answer: Any) -> tuple[int, str, str]:
    error = answer.json()["error"]
    return answer.status, error["type"], error["message"].partition(":")[0]


# -- what goes out, what comes back


async def test_the_key_is_added_and_a_programs_own_credentials_go_nowhere(
    session: Session, stack: Stack, vendor: ModelServer
) -> None:
    answer = await stack.call(
        asks(),
        target="/llm/anthropic/v1/messages?beta=true",
        headers={
            "authorization": "Bearer from-inside", "x-api-key": "from-inside", "cookie": "a=from-inside",
            "proxy-authorization": "Basic from-inside", "x-forwarded-for": "10.0.0.1", "x-e2a-time": "1",
            "connection": "x-own", "x-own": "from-inside", "anthropic-beta": "tools-2026",
            "anthropic-version": "2023-06-01", "user-agent": "claude-cli",
        },
    )  # fmt: skip
    assert (answer.status, answer.is_whole) == (200, True)
    assert answer.json()["content"][0]["text"] == "Hello from the model."
    (request,) = vendor.requests
    assert request.key == KEY
    assert "from-inside" not in str(request.headers)
    assert set(request.headers) == {
        "host", "content-length", "content-type", "anthropic-version", "anthropic-beta", "user-agent", "x-api-key",
        "authorization", "accept-encoding",
    }  # fmt: skip
    assert request.headers["anthropic-beta"] == "tools-2026"
    assert request.headers["host"] == vendor.authority


async def test_a_stream_comes_piece_by_piece_as_the_model_speaks(
    session: Session, stack: Stack, vendor: ModelServer
) -> None:
    gate = Gate()
    vendor.play([say("One two three four", gate=gate)])
    program = stack.program()
    answer = await program.begin(
        "/llm/anthropic/v1/messages", json.dumps(asks(stream=True)).encode(), VERSION
    )
    assert answer.headers["content-type"].startswith("text/event-stream")
    seen = b""
    while b"text_delta" not in seen:
        seen += bytes((await program.next()).data)
    assert not gate.opened.is_set()
    gate.open()
    answer = await program.rest(answer)
    assert answer.is_whole
    assert answer.body.rstrip().endswith(b'{"type": "message_stop"}')


VERSION = {"anthropic-version": "2023-06-01", "x-api-key": "e2a-sandbox"}


async def test_the_vendors_own_sdk_speaks_through_it(
    session: Session, stack: Stack, vendor: ModelServer
) -> None:
    def speak() -> str:
        with (
            socket_path(stack.socket) as name,
            httpx2.Client(transport=httpx2.HTTPTransport(uds=name)) as http,
            anthropic.Anthropic(
                api_key="e2a-sandbox",
                base_url="http://127.0.0.1:3128/llm/anthropic",
                http_client=http,
                max_retries=0,
            ) as sdk,
            sdk.messages.stream(
                model="claude-opus-5-5", max_tokens=10, messages=[{"role": "user", "content": "hi"}]
            ) as stream,
        ):
            return "".join(stream.text_stream)

    assert await asyncio.to_thread(speak) == "Hello from the model."


async def test_as_a_proxy_it_is_reached_by_name_as_well(
    session: Session, stack: Stack, vendor: ModelServer
) -> None:
    program = stack.program()
    target = "http://gateway.e2a/llm/anthropic/v1/messages"
    head = await program.begin(target, json.dumps(asks()).encode(), {"host": "gateway.e2a", **VERSION})
    assert (await program.rest(head)).status == 200


# -- cost


@pytest.mark.parametrize("is_stream", [True, False])
async def test_the_cost_is_stored_before_the_answer_ends(
    session: Session, stack: Stack, vendor: ModelServer, is_stream: bool
) -> None:
    usage = {"input_tokens": 100, "output_tokens": 50, "cache_read_input_tokens": 10}
    vendor.play([say("ok").with_(usage=usage)])
    await change(session, status=SessionStatus.RUNNING)
    task = await sync_to_async(Task.objects.create)(
        session=session, prompt="x", state=TaskState.RUNNING, attempt=1, created_at=timezone.now()
    )
    answer = await stack.call(asks(stream=is_stream))
    assert answer.is_whole
    cost = Decimal("0.001402")  # 100 at $4, 50 at $20 and 10 at $0.20 a million.
    (row,) = await ledger()
    wanted = {
        "sandbox_id": SANDBOX, "session_id": session.pk, "task_id": task.pk, "vendor": "anthropic", "status": 200,
        "model": "claude-opus-5-5", "is_whole": True, "input_tokens": 100, "output_tokens": 50,
        "cache_read_tokens": 10, "cost_usd": cost,
    }  # fmt: skip
    assert {name: row[name] for name in wanted} == wanted
    frame = {
        "input_tokens": 100, "output_tokens": 50, "cache_read_tokens": 10, "cost_usd": "0.001402",
        "model": "claude-opus-5-5",
    }  # fmt: skip
    assert await usage_frames() == [{"data": frame, "task_id": task.pk}]
    await session.arefresh_from_db()
    await task.arefresh_from_db()
    assert (session.input_tokens, session.output_tokens, session.cost_usd) == (100, 50, cost)
    assert task.usage == {
        "input_tokens": 100, "output_tokens": 50, "cache_read_tokens": 10, "cost_usd": "0.001402"
    }  # fmt: skip


async def test_counting_tokens_is_passed_on_and_costs_nothing(
    session: Session, stack: Stack, vendor: ModelServer
) -> None:
    answer = await stack.call(asks(), target="/llm/anthropic/v1/messages/count_tokens")
    assert answer.json()["input_tokens"] > 0
    assert await ledger() == []


async def test_an_answer_that_breaks_off_is_cut_and_what_it_cost_is_kept(
    session: Session, stack: Stack, vendor: ModelServer
) -> None:
    vendor.play([cut(say("one two three").with_(usage={"input_tokens": 70}))])
    answer = await stack.call(asks(stream=True))
    assert (answer.status, answer.is_whole) == (200, False)
    (row,) = await ledger()
    assert (row["input_tokens"], row["is_whole"]) == (70, False)


async def test_a_program_that_leaves_ends_the_call_at_the_vendor(
    session: Session, stack: Stack, vendor: ModelServer
) -> None:
    vendor.play([say("one two three", gate=Gate()).with_(usage={"input_tokens": 71})])
    program = stack.program()
    await program.begin("/llm/anthropic/v1/messages", json.dumps(asks(stream=True)).encode(), VERSION)
    program.leave()
    assert await asyncio.to_thread(vendor.requests[0].hung_up.wait, 10)
    async with asyncio.timeout(10):
        while not (rows := await ledger()):
            await asyncio.sleep(0.02)  # Between two looks.
    assert (rows[0]["input_tokens"], rows[0]["is_whole"]) == (71, False)
    await until(lambda: not stack.broker._calls, "the call is over")


async def test_a_broker_that_is_told_to_stop_stores_what_its_calls_had_cost(
    session: Session, start: Start, vendor: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sessions_app.broker import server

    monkeypatch.setattr(server, "STOP_SECONDS", 1)
    stack = await start()
    vendor.play([say("one two three", gate=Gate()).with_(usage={"input_tokens": 72})])
    program = stack.program()
    answer = await program.begin(
        "/llm/anthropic/v1/messages", json.dumps(asks(stream=True)).encode(), VERSION
    )
    await stack.end()
    assert not (await program.rest(answer)).is_whole
    assert [(row["input_tokens"], row["is_whole"]) for row in await ledger()] == [(72, False)]


async def test_a_spent_budget_allows_no_further_call_until_it_is_raised(
    session: Session, stack: Stack, vendor: ModelServer
) -> None:
    await change(session, budget={"max_tokens": 10}, input_tokens=10)
    refused = await stack.call(asks(stream=True))
    assert error_of(refused) == (403, "permission_error", "budget_spent")
    assert vendor.requests == []
    await change(session, budget={"max_tokens": 1000})
    assert (await stack.call(asks())).status == 200
    await change(session, budget={"max_usd": 0.000001})
    assert error_of(await stack.call(asks())) == (403, "permission_error", "budget_spent")


# -- the key stays outside


class Upstream:
    """A vendor that answers what a test says, byte by byte."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, heard: Heard) -> None:
        self.heard = heard
        url = f"http://127.0.0.1:{heard.port}"
        urls = settings.E2A.vendor_urls | {"anthropic": url, "openai": url}
        monkeypatch.setattr(settings, "E2A", dataclasses.replace(settings.E2A, vendor_urls=urls))


async def _request(reader: asyncio.StreamReader, heard: Heard) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    heard.requests.append(head)
    length = next(
        int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")
    )
    heard.bodies.append(await reader.readexactly(length))


def _document(body: bytes, *, status: str = "200 OK", more: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


@contextlib.asynccontextmanager
async def upstream(monkeypatch: pytest.MonkeyPatch, *pieces: bytes) -> AsyncIterator[Heard]:
    """One that sends these pieces in answer to each request, each by itself, and closes."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: Heard) -> None:
        await _request(reader, heard)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.002)  # So that they arrive apart; whether they do changes no result.

    async with serving(answer) as heard:
        Upstream(monkeypatch, heard)
        yield heard


async def test_a_vendor_that_echoes_the_key_does_not_bring_it_in(
    session: Session, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whole, cut anywhere, encoded, in headers and in errors."""
    stack = await start()
    encoded = base64.b64encode(KEY.encode()).decode()
    body = json.dumps({"type": "message", "you_sent": KEY, "again": encoded, "end": KEY[:12]}).encode()
    for size in (1, 7, len(body)):
        head, rest = _document(b"", more=f"request-id: {KEY}\r\nanthropic-x: ok\r\n").split(b"\r\n\r\n")
        head = head.replace(b"Content-Length: 0", b"Content-Length: %d" % len(body)) + b"\r\n\r\n"
        pieces = [body[at : at + size] for at in range(0, len(body), size)]
        async with upstream(monkeypatch, head + rest, *pieces):
            answer = await stack.call(asks())
        assert answer.is_whole
        assert answer.json() == {
            "type": "message", "you_sent": "[redacted:LLM_API_KEY]", "again": answer.json()["again"], "end": KEY[:12],
        }  # fmt: skip
        assert "[redacted:LLM_API_KEY]" in answer.json()["again"]
        assert KEY not in str(answer.headers)
        assert "request-id" not in answer.headers
        assert answer.headers["anthropic-x"] == "ok"
    async with upstream(
        monkeypatch, _document(json.dumps({"error": KEY}).encode(), status="401 Unauthorized")
    ):
        refused = await stack.call(asks())
    assert (refused.status, refused.json()) == (401, {"error": "[redacted:LLM_API_KEY]"})


async def test_a_stream_that_echoes_the_key_is_redacted_at_every_cut(
    session: Session, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = await start()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    data = b'data: {"say": "%s"}\n\n' % KEY.encode()
    at = data.index(KEY.encode())
    for place in range(at, at + len(KEY)):
        async with upstream(monkeypatch, head, data[:place], data[place:]):
            answer = await stack.call(asks(stream=True))
        assert answer.body == b'data: {"say": "[redacted:LLM_API_KEY]"}\n\n'


async def test_a_redirect_is_not_followed_and_the_key_goes_nowhere_else(
    session: Session, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = await start()

    async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: Heard) -> None:
        heard.requests.append(await reader.read(10))

    async with serving(other) as trap:
        location = f"Location: http://127.0.0.1:{trap.port}/v1/messages\r\n"
        for status in ("301 Moved", "307 Temporary", "308 Permanent"):
            async with upstream(monkeypatch, _document(b"", status=status, more=location)):
                answer = await stack.call(asks())
            assert error_of(answer)[:2] == (502, "api_error")
            assert "location" not in answer.headers
    assert trap.connections == 0


@pytest.mark.parametrize("vendor_answer", ["closed", "garbage", "gzip", "header"])
async def test_a_vendor_that_is_none_is_told_without_more(
    session: Session, start: Start, monkeypatch: pytest.MonkeyPatch, vendor_answer: str
) -> None:
    stack = await start()
    pieces = {
        "closed": (),
        "garbage": (b"220 mail.example.com ESMTP\r\n",),
        "gzip": (_document(b"\x1f\x8b", more="Content-Encoding: gzip\r\n"),),
        "header": (_document(b"{}", more="anthropic-x: " + "a" * 40_000 + "\r\n"),),
    }[vendor_answer]
    async with upstream(monkeypatch, *pieces):
        assert error_of(await stack.call(asks()))[:2] == (502, "api_error")


async def test_a_vendor_that_is_not_there_or_is_private_looks_the_same(
    session: Session, stack: Stack, vendor: ModelServer
) -> None:
    answers = []
    for url in ("https://93.184.215.14", "https://models.example.com"):
        await change(session, llm_base_url=url)
        stack.broker._pools.clear()
        stack.broker._resolver = lambda host, port: ["10.0.0.1"]

        async def refuse(address: Any, port: int) -> Any:
            raise ConnectionRefusedError

        stack.broker._dial = refuse
        answers.append(error_of(await stack.call(asks())))
    assert answers[0] == answers[1]
    assert answers[0][0] == 502
    await change(session, llm_base_url="https://10.0.0.1")
    assert error_of(await stack.call(asks())) == (403, "permission_error", "forbidden_url")


# -- who may call


async def test_only_gateways_are_served_each_request_once(
    session: Session, stack: Stack, vendor: ModelServer
) -> None:
    from sandboxes.gateway.signing import signed_headers
    from tests.broker.conftest import NODE_KEY

    target = f"/{SANDBOX}/llm/anthropic/v1/messages"
    body = json.dumps(asks()).encode()
    length = str(len(body))

    async def straight(headers: list[tuple[str, str]], to: str = target) -> int:
        program = Program(stack.folder / "run" / "broker.sock")
        return (await program.begin(to, body, {**VERSION, **dict(headers)})).status

    good = signed_headers(node_key=NODE_KEY, method="POST", target=target, length=length)
    assert await straight([]) == 401
    assert await straight(good, f"/sbx_{'d5' * 13}/llm/anthropic/v1/messages") == 401
    assert (
        await straight(signed_headers(node_key=b"x" * 32, method="POST", target=target, length=length)) == 401
    )
    assert await straight(good) == 200
    assert await straight(good) == 401, "a second time"
    assert (stack.folder / "run" / "broker.sock").stat().st_mode & 0o777 == 0o600


async def test_a_program_cannot_speak_for_another_sandbox(
    session: Session, stack: Stack, vendor: ModelServer
) -> None:
    for target in (
        f"/sbx_{'d5' * 13}/llm/anthropic/v1/messages", f"/llm/../sbx_{'d5' * 13}/llm/anthropic/v1/messages",
        f"/llm/anthropic/../../../sbx_{'d5' * 13}/llm/anthropic/v1/messages", "/llm/%2e%2e/v1/messages",
    ):  # fmt: skip
        assert (await stack.call(asks(), target=target)).status in (400, 404)
    assert vendor.requests == []


async def test_whose_sandbox_has_no_right_to_a_model_is_refused(
    session: Session, sandbox: Sandbox, stack: Stack, vendor: ModelServer, alice: Any
) -> None:
    for state in (SandboxState.STOPPING, SandboxState.DESTROYED):
        await change(sandbox, state=state)
        assert error_of(await stack.call(asks()))[:2] == (403, "permission_error")
    await change(sandbox, state=SandboxState.RUNNING)
    await change(session, status=SessionStatus.ENDED)
    assert (await stack.call(asks())).status == 403
    await change(session, status=SessionStatus.IDLE)
    await sync_to_async(Tenant.objects.filter(pk=alice.tenant_id).update)(suspended_at=timezone.now())
    assert (await stack.call(asks())).status == 403
    await sync_to_async(Tenant.objects.filter(pk=alice.tenant_id).update)(suspended_at=None)
    await sync_to_async(bundles_release)(holder=session.public_id)
    assert error_of(await stack.call(asks())) == (401, "authentication_error", "missing_llm_key")
    assert vendor.requests == []


async def test_a_sandbox_without_a_session_may_call_with_its_own_bundles(
    sandbox: Sandbox, stack: Stack, vendor: ModelServer
) -> None:
    assert (await stack.call(asks())).status == 200
    assert vendor.requests[0].key == KEY
    (row,) = await ledger()
    assert (row["session_id"], row["sandbox_id"], row["tenant_id"]) == (None, SANDBOX, sandbox.tenant_id)
    # Anthropic's key is not sent to another vendor because a program asks for that.
    refused = await stack.call({"model": "gpt-5.5"}, target="/llm/openai/v1/responses")
    assert error_of(refused) == (403, "permission_error", "vendor_mismatch")
    assert len(vendor.requests) == 1


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (asks(model="gpt-5.5"), "invalid_model"),
        (asks(model="claude-\n"), "invalid_model"),
        (
            b'{"model": "claude-opus-5-5", "model": "claude-haiku-5-5"}',
            "The body is not a JSON object with each name once",
        ),
        (b"not json", "The body is not a JSON object with each name once"),
        (b"[]", "The body is not a JSON object with a model."),
        (b"[" * 100_000, "The body is not a JSON object with each name once"),
    ],
)
async def test_what_names_no_model_of_its_agent_is_refused(
    session: Session, stack: Stack, vendor: ModelServer, body: Any, code: str
) -> None:
    answer = await stack.call(body)
    assert error_of(answer) == (400, "invalid_request_error", code)
    assert vendor.requests == []


@pytest.mark.parametrize(
    ("target", "method"),
    [
        ("/llm/anthropic/v1/models", "POST"), ("/llm/anthropic/v1/messages", "GET"), ("/llm/anthropic/", "POST"),
        ("/llm/anthropic/v1/messages/", "POST"), ("/llm/google/v1/messages", "POST"),
        ("/llm/anthropic/v1/files", "POST"), ("/llm/anthropic/v1/messages/batches", "POST"),
        ("/llm/openai/v1/embeddings", "POST"),
    ],
)  # fmt: skip
async def test_only_the_paths_of_model_calls_are_passed_on(
    session: Session, stack: Stack, vendor: ModelServer, target: str, method: str
) -> None:
    answer = await stack.call(b"" if method == "GET" else asks(), target=target, method=method)
    assert (answer.status, answer.headers["x-e2a-answered-by"]) == (404, "broker")
    assert vendor.requests == []


async def test_a_request_is_bounded(
    session: Session, stack: Stack, vendor: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sessions_app.broker import model_call, server

    monkeypatch.setattr(model_call, "LARGEST_BODY", 1000)
    assert error_of(await stack.call(asks("x" * 1000)))[:2] == (413, "request_too_large")
    assert (await stack.call(asks())).status == 200
    monkeypatch.setattr(model_call, "LARGEST_BODIES", 100)
    assert error_of(await stack.call(asks("x" * 200)))[:2] == (503, "overloaded_error")
    assert stack.broker.body_bytes == 0
    monkeypatch.setattr(server, "CALLS_A_SANDBOX", 0)
    assert error_of(await stack.call(asks()))[:2] == (429, "rate_limit_error")


# -- keys change


async def test_a_replaced_key_counts_from_the_next_call_and_spares_the_one_that_runs(
    session: Session, stack: Stack, vendor: ModelServer, alice: Any
) -> None:
    gate = Gate()
    vendor.play([say("with the old one", gate=gate), say("with the new one"), say("healed")])
    program = stack.program()
    answer = await program.begin(
        "/llm/anthropic/v1/messages", json.dumps(asks(stream=True)).encode(), VERSION
    )
    new = "sk-ant-the-second-key-of-alice"

    async def put(key: str) -> None:
        await sync_to_async(bundle_replace)(tenant=alice.tenant, name="main", values={"LLM_API_KEY": key})

    await put(new)
    assert (await stack.call(asks())).json()["content"][0]["text"] == "with the new one"
    gate.open()
    assert (await program.rest(answer)).is_whole
    assert [request.key for request in vendor.requests] == [KEY, new]
    # A bad key is the vendor's own typed error; the next one heals it.
    vendor.keys = {new}
    await put("sk-ant-a-bad-key-of-alice")
    assert error_of(await stack.call(asks()))[:2] == (401, "authentication_error")
    await put(new)
    assert (await stack.call(asks())).status == 200


async def test_keys_are_not_kept_longer_than_half_a_minute(
    session: Session, stack: Stack, vendor: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sessions_app.broker import admission

    keys = stack.broker.keys
    await stack.call(asks())
    keys.forget_old()
    assert len(keys._kept) == 1
    monkeypatch.setattr(admission, "KEPT_SECONDS", 0.0)
    keys._kept.clear()
    await stack.call(asks())
    keys.forget_old()
    assert keys._kept == {}


async def test_while_the_broker_is_away_there_is_no_model_and_then_there_is(
    session: Session, start: Start, vendor: ModelServer
) -> None:
    stack = await start()
    await stack.end()
    answer = await stack.call(asks())
    assert (answer.status, answer.json()["code"]) == (503, "broker_down")
    assert (await (await start()).call(asks())).status == 200


async def test_a_silent_vendor_is_given_up(session: Session, start: Start, vendor: ModelServer) -> None:
    from e2a.core.outbound_transport import Timeouts

    stack = await start()
    stack.broker._timeouts = Timeouts(first_byte=0.2)
    vendor.play([hang()])
    assert error_of(await stack.call(asks()))[:2] == (504, "timeout_error")


async def test_the_vendors_errors_pass_as_they_are(
    session: Session, stack: Stack, vendor: ModelServer
) -> None:
    vendor.play([fail(529), fail(429, retry_after=7)])
    assert error_of(await stack.call(asks()))[:2] == (529, "overloaded_error")
    limited = await stack.call(asks())
    assert (limited.status, limited.headers["retry-after"]) == (429, "7")
    assert await ledger() == []


# -- OpenAI


@pytest.fixture
async def openai_session(session: Session, alice: Any) -> Session:
    await change(session, agent_kind="codex", llm_vendor="openai")
    return session


CHAT = {"prompt_tokens": 30, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 10}}
RESPONSES = {"input_tokens": 30, "output_tokens": 4, "input_tokens_details": {"cached_tokens": 10}}


def _events(*documents: Any) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    return head + b"".join(b"data: %s\n\n" % json.dumps(one).encode() for one in documents)


@pytest.mark.parametrize(
    ("path", "answer", "is_stream"),
    [
        ("chat/completions", _document(json.dumps({"model": "gpt-5.5", "usage": CHAT}).encode()), False),
        (
            "chat/completions",
            _events({"model": "gpt-5.5", "usage": None}, {"model": "gpt-5.5", "usage": CHAT}),
            True,
        ),
        ("responses", _document(json.dumps({"model": "gpt-5.5", "usage": RESPONSES}).encode()), False),
        (
            "responses",
            _events(
                {"type": "response.created", "response": {"model": "gpt-5.5", "usage": None}},
                {"type": "response.completed", "response": {"model": "gpt-5.5", "usage": RESPONSES}},
            ),
            True,
        ),
    ],
)
async def test_openais_two_protocols_are_metered(
    openai_session: Session,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    answer: bytes,
    is_stream: bool,
) -> None:
    stack = await start()
    async with upstream(monkeypatch, answer) as heard:
        got = await stack.call(
            {"model": "gpt-5.5", "stream": is_stream, "messages": []}, target=f"/llm/openai/v1/{path}"
        )
    assert (got.status, got.is_whole) == (200, True)
    assert b"authorization: bearer " + KEY.encode() in heard.requests[0].lower()
    sent = json.loads(heard.bodies[0])
    wanted = {"include_usage": True} if is_stream and path == "chat/completions" else None
    assert sent.get("stream_options") == wanted
    (row,) = await ledger()
    assert (row["input_tokens"], row["output_tokens"], row["cache_read_tokens"]) == (20, 4, 10)
    assert row["cost_usd"] == Decimal("0.000225")  # 20 at $5, 10 at $0.50, 4 at $30 a million.


async def test_twenty_calls_at_once_are_twenty_bills(
    session: Session, stack: Stack, vendor: ModelServer
) -> None:
    barrier = threading.Barrier(20, timeout=20)

    def together(body: Any, headers: Any) -> Any:
        barrier.wait()
        return say("ok").with_(usage={"input_tokens": 10, "output_tokens": 1})

    vendor.play(together)
    answers = await asyncio.gather(*(stack.call(asks(stream=True)) for _ in range(20)))
    assert [answer.is_whole for answer in answers] == [True] * 20
    assert len(await ledger()) == 20
    await session.arefresh_from_db()
    assert (session.input_tokens, session.output_tokens) == (200, 20)
    assert len(await usage_frames()) == 20

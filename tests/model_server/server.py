"""The HTTP side of the scripted model server: threads, server-sent events, and a record of what was asked."""

from __future__ import annotations

import json
import select
import ssl
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self, cast

from tests.model_server import responses
from tests.model_server.script import (
    WAIT_LIMIT,
    Answer,
    Gate,
    Json,
    Misbehaviour,
    Reply,
    Script,
    Step,
    error_answer,
)
from tests.model_server.validation import InvalidRequestError, validate

MAX_BODY = 32 * 1024 * 1024


@dataclass
class RecordedRequest:
    """What arrived. Header names are in lower case."""

    path: str
    headers: Mapping[str, str]
    body: Json
    key: str
    """The key, from `x-api-key` or from `Authorization: Bearer`; empty without one."""
    refusal: str | None = None
    """Why the server answered 400 by itself, or None."""
    hung_up: threading.Event = field(default_factory=threading.Event)
    """Set when the client closed before the answer was whole."""

    @property
    def said(self) -> list[Json]:
        """The conversation without what the program says as `system`, in the shape of Anthropic's messages."""
        messages = self.body["messages"] if "messages" in self.body else responses.as_messages(self.body)
        return [message for message in messages if message["role"] in ("user", "assistant")]

    @property
    def prompt(self) -> str:
        """The text of the last user message."""
        content = self.said[-1]["content"]
        if isinstance(content, str):
            return content
        return "\n".join(block["text"] for block in content if block.get("type") == "text")

    @property
    def tool_results(self) -> list[Json]:
        """The `tool_result` blocks of the last user message."""
        content = self.said[-1]["content"]
        return (
            [] if isinstance(content, str) else [block for block in content if block["type"] == "tool_result"]
        )


class ModelServer:
    """Listens on a free loopback port while entered. `keys`: the only keys it takes (None: any)."""

    def __init__(
        self,
        script: Script,
        *,
        keys: Collection[str] | None = None,
        port: int = 0,
        host: str = "127.0.0.1",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.keys = keys
        self.requests: list[RecordedRequest] = []
        self.thinking: dict[str, str] = {}
        self.is_closing = threading.Event()
        self._script = script
        self._steps_taken = 0
        self._changed = threading.Condition()
        self._http = _HttpServer((host, port), _Handler)
        self._http.model_server = self
        self._scheme = "https" if tls else "http"
        if tls:
            self._http.socket = tls.wrap_socket(
                self._http.socket, server_side=True, do_handshake_on_connect=False
            )
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.is_closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(WAIT_LIMIT)

    @property
    def port(self) -> int:
        return int(self._http.server_address[1])

    @property
    def authority(self) -> str:
        """`host:port`, as `E2A_LLM_ALLOW_PRIVATE` takes it."""
        return f"{self._http.server_address[0]!s}:{self.port}"

    @property
    def url(self) -> str:
        """The base URL, for `llm.base_url`, `LLM_BASE_URL` and `E2A_ANTHROPIC_URL`."""
        return f"{self._scheme}://{self.authority}"

    @property
    def messages(self) -> list[Json]:
        """The conversation as the last request gave it."""
        return cast(list[Json], self.requests[-1].body["messages"])

    def play(self, script: Script) -> None:
        """From the next request on, follow this script."""
        with self._changed:
            self._script = script
            self._steps_taken = 0

    def wait_for_requests(self, count: int, seconds: float = 10.0) -> list[RecordedRequest]:
        """All requests, as soon as there are `count`."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.requests) >= count, seconds):
                raise AssertionError(f"{len(self.requests)} model requests after {seconds:g} s, not {count}")
            return list(self.requests)

    def assert_finished(self) -> None:
        """Every step of the list was played, and no request was refused."""
        refusals = [request.refusal for request in self.requests if request.refusal]
        assert not refusals, refusals
        if not callable(self._script):
            assert self._steps_taken == len(self._script), (
                f"{self._steps_taken} of {len(self._script)} steps played"
            )

    def record(self, request: RecordedRequest) -> None:
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()

    def next_step(self, request: RecordedRequest) -> Step:
        script = self._script
        if callable(script):
            return script(request.body, request.headers)
        with self._changed:
            number = self._steps_taken
            if number >= len(script):
                request.refusal = f"the script has {len(script)} steps; this is request {number + 1}"
                return error_answer(400, "invalid_request_error", request.refusal)
            self._steps_taken += 1
            return script[number]


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    model_server: ModelServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken connections are part of the game; a wrong script is not."""
        import sys

        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _HungUpError(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "model-server"
    sys_version = ""
    timeout = 60
    disable_nagle_algorithm = True
    server: _HttpServer
    _request: RecordedRequest

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: a test prints its own."""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] == "/v1/models":
            model = {"type": "model", "id": "claude-scripted-1", "display_name": "Scripted"}
            self._send(Answer(200, json.dumps({"data": [model], "has_more": False}).encode()))
        else:
            self._send(error_answer(404, "not_found_error", "Not Found"))

    def do_POST(self) -> None:
        models = self.server.model_server
        length = int(self.headers.get("content-length") or 0)
        raw = self.rfile.read(min(length, MAX_BODY))
        headers = {name.lower(): value for name, value in self.headers.items()}
        key = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
        try:
            body = json.loads(raw)
        except ValueError:
            body = None
        path = self.path.partition("?")[0]
        self._request = RecordedRequest(path, headers, body if isinstance(body, dict) else {}, key)
        step: Step
        if path not in ("/v1/messages", "/v1/messages/count_tokens", responses.PATH):
            step = error_answer(404, "not_found_error", "Not Found")
        elif length > MAX_BODY:
            step = error_answer(413, "request_too_large", "Request exceeds the maximum size")
        elif not key or (models.keys is not None and key not in models.keys):
            step = error_answer(
                401, "authentication_error", "invalid x-api-key" if key else "x-api-key is required"
            )
        else:
            try:
                if path == responses.PATH:
                    responses.validate(body)
                else:
                    validate(body, headers, models.thinking)
            except InvalidRequestError as error:
                self._request.refusal = str(error)
                step = error_answer(400, "invalid_request_error", str(error))
            else:
                if path.endswith("count_tokens"):
                    step = Answer(200, json.dumps({"input_tokens": _tokens(raw)}).encode())
                else:
                    step = models.next_step(self._request)
        models.record(self._request)
        try:
            self._play(step)
        except (_HungUpError, OSError):
            self._request.hung_up.set()
            self.close_connection = True

    def _play(self, step: Step) -> None:
        if isinstance(step, Answer):
            self._send(step)
        elif isinstance(step, Reply):
            self._reply(step)
        elif step.kind == "hang":
            if step.gate is not None:
                step.gate.arrive()
            self._wait(step.gate)
            self.close_connection = True
        else:
            assert step.reply is not None
            self._reply(step.reply, step)

    @property
    def _is_responses(self) -> bool:
        return self._request.path == responses.PATH

    def _send(self, answer: Answer) -> None:
        if self.command == "POST" and self._is_responses and answer.status >= 400:
            answer = responses.error_answer(answer)
        self.send_response(answer.status)
        self.send_header("request-id", f"req_{id(self):x}")
        self.send_header("content-length", str(len(answer.body)))
        for name, value in {"content-type": "application/json", **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

    def _reply(self, reply: Reply, twist: Misbehaviour | None = None) -> None:
        for block in reply.blocks:
            if block["type"] == "thinking":
                self.server.model_server.thinking[block["signature"]] = block["thinking"]
        message = self._response(reply) if self._is_responses else self._message(reply)
        if not self._request.body.get("stream"):
            if reply.gate is not None:
                reply.gate.arrive()
                self._wait(reply.gate)
            self._send(Answer(200, json.dumps(message).encode()))
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("cache-control", "no-cache")
        self.send_header("request-id", f"req_{id(self):x}")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        is_first_delta = True
        stream = responses.events(message, reply, _pieces) if self._is_responses else _events(message, reply)
        for event in stream:
            self._event(event)
            is_delta = event["type"] == "content_block_delta" or responses.is_delta(event)
            if is_delta and is_first_delta:
                is_first_delta = False
                if reply.gate is not None:
                    reply.gate.arrive()
                    self._wait(reply.gate)
                if twist is not None:
                    if twist.kind == "midstream":
                        error = {"type": twist.error_type, "message": "Overloaded"}
                        failed = responses.failed_event(twist.error_type)
                        self._event(failed if self._is_responses else {"type": "error", "error": error})
                        self.wfile.write(b"0\r\n\r\n")
                    self.close_connection = True
                    return
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, event: Json) -> None:
        data = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _wait(self, gate: Gate | None) -> None:
        """Until the gate is open. Raises when the client hangs up first, or the server closes."""
        end = time.monotonic() + WAIT_LIMIT
        watch = select.poll()
        watch.register(self.connection, select.POLLIN | select.POLLRDHUP)
        while time.monotonic() < end and not self.server.model_server.is_closing.is_set():
            if gate is not None and gate.opened.is_set():
                return
            if watch.poll(20):
                raise _HungUpError
        raise _HungUpError

    def _response(self, reply: Reply) -> Json:
        return responses.message(
            self._request.body,
            reply,
            input_tokens=_tokens(json.dumps(self._request.body["input"]).encode()),
            output_tokens=_tokens(json.dumps(reply.blocks).encode()),
        )

    def _message(self, reply: Reply) -> Json:
        calls_a_tool = any(block["type"] == "tool_use" for block in reply.blocks)
        usage = {
            "input_tokens": _tokens(json.dumps(self._request.body["messages"]).encode()),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": _tokens(json.dumps(reply.blocks).encode()),
            "service_tier": "standard",
            **reply.usage,
        }
        return {
            "id": f"msg_{id(reply):024x}",
            "type": "message",
            "role": "assistant",
            "model": self._request.body["model"],
            "content": list(reply.blocks),
            "stop_reason": reply.stop_reason or ("tool_use" if calls_a_tool else "end_turn"),
            "stop_sequence": None,
            "usage": usage,
        }


def _tokens(data: bytes) -> int:
    return max(1, len(data) // 4)


def _pieces(text: str, count: int) -> list[str]:
    size = max(1, -(-len(text) // count))
    return [text[start : start + size] for start in range(0, len(text), size)] or [""]


def _events(message: Json, reply: Reply) -> Iterator[Json]:
    usage = message["usage"]
    start = {**message, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 1}}
    yield {"type": "message_start", "message": start}
    for index, block in enumerate(message["content"]):
        empty, deltas = _opened(block, reply)
        yield {"type": "content_block_start", "index": index, "content_block": empty}
        if index == 0:
            yield {"type": "ping"}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    delta = {"stop_reason": message["stop_reason"], "stop_sequence": None}
    yield {"type": "message_delta", "delta": delta, "usage": {"output_tokens": usage["output_tokens"]}}
    yield {"type": "message_stop"}


def _opened(block: Json, reply: Reply) -> tuple[Json, list[Json]]:
    """The block as `content_block_start` shows it, and the deltas that fill it."""
    kind = block["type"]
    if kind == "text":
        deltas = [{"type": "text_delta", "text": piece} for piece in _pieces(block["text"], reply.pieces)]
        return {**block, "text": ""}, deltas
    if kind == "tool_use":
        raw = json.dumps(block["input"])
        if reply.cut_input_of == block["id"]:
            raw = raw[: len(raw) // 2]
        parts = ["", *_pieces(raw, reply.pieces)]
        return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": part} for part in parts]
    if kind == "thinking":
        thoughts = _pieces(block["thinking"], reply.pieces)
        deltas = [{"type": "thinking_delta", "thinking": piece} for piece in thoughts]
        deltas.append({"type": "signature_delta", "signature": block["signature"]})
        return {**block, "thinking": "", "signature": ""}, deltas
    return block, []  # redacted_thinking and the like come whole.

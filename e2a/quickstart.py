"""The public quickstart, played against a running server over real HTTP and WebSocket, every step shown.

It knows nothing of the server's inside: no model, no service, only addresses. What it makes it takes away.
"""

from __future__ import annotations

import http.client
import json
import re
import secrets
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import ClientConnection, connect

AgentKind = Literal["shell", "deictic"]

HTTP_SECONDS: Final = 40.0
"""Creating a session may take as long as the slowest refusal; everything else answers at once."""
OPEN_SECONDS: Final = 10.0
TASK_SECONDS: Final[dict[AgentKind, float]] = {"shell": 120.0, "deictic": 600.0}
"""From `task` to `exit`. A cold sandbox is part of it."""
PROMPTS: Final[dict[AgentKind, str]] = {"shell": "ls -la /workspace", "deictic": "List files in /workspace"}
DEFAULT_MODEL: Final = "claude-sonnet-5-5"

WIDTH: Final = 110
_CONTROL: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\n\t\x20-\x7e\xa0-\U0010ffff]")
"""Colours, and every character that could steer a terminal."""
_SECRET_FIELDS: Final = frozenset({"token", "refresh_token", "jwt", "key", "values"})
_SHOWN_CHARS: Final = 12
"""Of a key or token; for an API key that is its public prefix."""


class QuickstartFailed(Exception):
    """A step did not do what it should. The text says what was asked or awaited, and what came instead."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to play. `read_code` is asked for the mailed code once the mail is on its way."""

    url: str
    email: str
    agent: AgentKind
    prompt: str
    read_code: Callable[[], str]
    llm_key: str = ""
    model: str = DEFAULT_MODEL


@dataclass(slots=True)
class Screen:
    """What the reader sees. `write` puts text on the screen as it is, without a line end of its own."""

    write: Callable[[str], None]
    _is_line_open: bool = False

    def heading(self, text: str) -> None:
        self.line("")
        self.line(text)

    def line(self, text: str) -> None:
        self.close_output()
        self.write(f"{text}\n")

    def document(self, mark: str, document: Any) -> None:
        """A JSON document, masked: one line when it is short, else a line a field, each cut to the screen."""
        masked = masked_secrets(document)
        text = json.dumps(masked, ensure_ascii=False)
        if len(text) <= WIDTH or not isinstance(masked, dict):
            self.line(f"  {mark} {_cut(text)}")
            return
        self.line(f"  {mark} {{")
        for name, value in masked.items():
            self.line(_cut(f"      {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)},"))
        self.line("    }")

    def frame(self, mark: str, frame: dict[str, Any]) -> None:
        """A frame on one line, without what only a program reads."""
        shown = {
            name: value
            for name, value in masked_secrets(frame).items()
            if name not in ("ts", "task_id", "session")
        }
        self.line(f"  {mark} {_cut(json.dumps(shown, ensure_ascii=False))}")

    def output(self, text: str) -> None:
        """A piece of the agent's output, which may begin and end in mid-line. It cannot steer a terminal."""
        for line in _CONTROL.sub("", text).splitlines(keepends=True):
            self.write(line if self._is_line_open else f"  │ {line}")
            self._is_line_open = not line.endswith("\n")

    def close_output(self) -> None:
        if self._is_line_open:
            self._is_line_open = False
            self.write("\n")


def masked_secrets(document: Any) -> Any:
    """A copy of a JSON document with the beginning only of what opens something."""
    if isinstance(document, dict):
        return {
            name: _masked(value) if _opens_something(name, document) else masked_secrets(value)
            for name, value in document.items()
        }
    if isinstance(document, list):
        return [masked_secrets(item) for item in document]
    return document


def _opens_something(name: str, document: dict[str, Any]) -> bool:
    """A credential. A `code` is one beside an address; elsewhere it says what went wrong."""
    return name in _SECRET_FIELDS or (name == "code" and "email" in document)


def _cut(text: str) -> str:
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _masked(inner) for name, inner in value.items()}
    if not isinstance(value, str):
        return value
    return f"{value[:_SHOWN_CHARS]}…" if len(value) > 2 * _SHOWN_CHARS else "…"


def quickstart_play(plan: Plan, screen: Screen) -> int:
    """Play the six steps; returns the task's exit code. Raises `QuickstartFailed`. Only the account stays."""
    began = time.monotonic()
    server = _Server(plan.url, screen)
    screen.line(f"The e2a quickstart, against {plan.url}")
    try:
        exit_code = _steps(plan, server, screen)
    except BaseException:
        server.tidy_up(quietly=True)
        raise
    server.tidy_up()
    screen.heading(f"Done in {time.monotonic() - began:.1f} s. The task's exit code is {exit_code}.")
    return exit_code


def _steps(plan: Plan, server: _Server, screen: Screen) -> int:
    name = f"quickstart-{secrets.token_hex(4)}"

    screen.heading("1. Sign in with a code from a mail")
    login = server.call("POST", "/v1/auth/login", {"email": plan.email}, wants=200)
    code = plan.read_code()
    verify = {"email": plan.email, "code": code, "login_id": login["login_id"]}
    account = server.call("POST", "/v1/auth/verify-otp", verify, wants=200)["token"]
    server.later("POST", "/v1/auth/logout", account)

    screen.heading("2. Make an API key")
    made = server.call("POST", "/v1/api-keys", {"name": name}, token=account, wants=201)
    key = made["key"]
    server.later("DELETE", f"/v1/api-keys/{made['key_id']}", account)

    screen.heading("3. Store a secret")
    values = (
        {"LLM_API_KEY": plan.llm_key}
        if plan.agent == "deictic"
        else {"QUICKSTART_SECRET": secrets.token_hex(16)}
    )
    server.call("POST", "/v1/tenants/me/secrets", {"name": name, "values": values}, token=key, wants=201)
    server.later("DELETE", f"/v1/tenants/me/secrets/{name}?force=true", account)

    screen.heading("4. Start a session")
    body: dict[str, Any] = {"agent": {"kind": plan.agent}, "user_id": "quickstart", "secrets": [name]}
    if plan.agent == "deictic":
        body["llm"] = {"vendor": "anthropic", "model": plan.model}
    session = server.call("POST", "/v1/sessions", body, token=key, wants=201)
    session_path = f"/v1/sessions/{session['chat_session_id']}"
    ends_session = server.later("DELETE", session_path, account)

    screen.heading("5. Give it a task over the WebSocket, and watch")
    exit_code = _task(plan, session, screen)

    screen.heading("6. List and end")
    server.call("GET", "/v1/sessions?limit=1", token=key, wants=200)
    server.call("DELETE", session_path, token=key, wants=200)
    server.done(ends_session)
    return exit_code


def _task(plan: Plan, session: dict[str, Any], screen: Screen) -> int:
    """Send the task and show every frame until its exit."""
    url, jwt = session["connect_url"], session["jwt"]
    screen.line(f"  → WebSocket {url}?token={_masked(jwt)}")
    try:
        # `proxy=None`: what is tried is this server, not the way to it.
        with connect(
            f"{url}?token={jwt}", open_timeout=OPEN_SECONDS, close_timeout=5, max_size=None, proxy=None
        ) as socket:
            return _conversation(plan, socket, screen)
    except TimeoutError as error:
        raise QuickstartFailed(f"{url} did not open within {OPEN_SECONDS:g} s.") from error
    except ConnectionClosed as error:
        closed = error.rcvd
        why = f"{closed.code} {closed.reason}".strip() if closed is not None else "without a close frame"
        raise QuickstartFailed(f"The server closed the WebSocket before the task's exit: {why}.") from error
    except (WebSocketException, OSError) as error:
        raise QuickstartFailed(f"The WebSocket {url} could not be opened: {error}") from error


def _conversation(plan: Plan, socket: ClientConnection, screen: Screen) -> int:
    task = {"type": "task", "prompt": plan.prompt, "id": "quickstart-1"}
    socket.send(json.dumps(task))
    screen.frame("→", task)
    task_id = None
    for frame in _frames(socket, TASK_SECONDS[plan.agent]):
        kind = frame["type"]
        if kind == "task_queued" and frame.get("id") == task["id"]:
            task_id = frame["task_id"]
        if kind in ("stdout", "stderr"):
            screen.output(frame["data"])
        else:
            screen.frame("←", frame)
        if kind == "error" and frame["retry"] == "terminal" and "seq" not in frame:
            raise QuickstartFailed(f"The task was refused: {frame['code']}: {frame['detail']}")
        if kind == "exit" and frame.get("task_id") == task_id:
            return int(frame["exit_code"])
    raise AssertionError("_frames ends by an error only")


def _frames(socket: ClientConnection, seconds: float) -> Iterator[dict[str, Any]]:
    """The server's frames. Raises `QuickstartFailed` when no `exit` made the caller stop within `seconds`."""
    deadline = time.monotonic() + seconds
    last = "nothing"
    while True:
        try:
            frame = json.loads(socket.recv(timeout=max(0.0, deadline - time.monotonic())))
        except TimeoutError:
            raise QuickstartFailed(
                f"Waited {seconds:g} s for the task's exit; the last frame was {last}."
            ) from None
        last = f"{frame['type']} (seq {frame.get('seq')})"
        yield frame


@dataclass(slots=True)
class _Server:
    """One server's REST API, with each call shown, and what is to be taken away again at the end."""

    url: str
    screen: Screen
    _later: list[tuple[str, str, str]] = field(default_factory=list)

    def call(self, method: str, path: str, body: Any = None, *, wants: int, token: str | None = None) -> Any:
        """Make a call, show it, return its JSON. Raises `QuickstartFailed` for any status but `wants`."""
        self.screen.line(f"  → {method} {path}")
        if body is not None:
            self.screen.document(" ", body)
        began = time.monotonic()
        status, answer = self._exchange(method, path, body, token)
        self.screen.line(f"  ← {status}, after {(time.monotonic() - began) * 1000:.0f} ms")
        if answer is not None:
            self.screen.document(" ", answer)
        if status != wants:
            raise QuickstartFailed(f"{method} {path} answered {status}, not {wants}: {_why(answer)}")
        return answer

    def later(self, method: str, path: str, token: str) -> int:
        """Note a call that takes something away; returns its number, for `done`."""
        self._later.append((method, path, token))
        return len(self._later) - 1

    def done(self, number: int) -> None:
        """It is taken away already."""
        self._later[number] = ("", "", "")

    def tidy_up(self, *, quietly: bool = False) -> None:
        """Take away what was made, newest first. A failure is shown; it never hides the error before it."""
        waiting = [call for call in reversed(self._later) if call[0]]
        self._later.clear()
        if waiting and not quietly:
            self.screen.line("  And away with what this made: bundle, key, sign-in.")
        for method, path, token in waiting:
            try:
                status, answer = self._exchange(method, path, None, token)
            except QuickstartFailed as error:
                self.screen.line(f"  Not taken away, {method} {path}: {error}")
                continue
            if not 200 <= status < 300:
                self.screen.line(f"  Not taken away, {method} {path} answered {status}: {_why(answer)}")

    def _exchange(self, method: str, path: str, body: Any, token: str | None) -> tuple[int, Any]:
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        data = None if body is None else json.dumps(body).encode()
        with self._connection() as connection:
            try:
                connection.request(method, self._prefix + path, data, headers)
                answer = connection.getresponse()
                content = answer.read()
            except TimeoutError:
                raise QuickstartFailed(f"{method} {path}: no answer within {HTTP_SECONDS:g} s.") from None
            except (OSError, http.client.HTTPException) as error:
                raise QuickstartFailed(
                    f"{method} {path}: no server answers at {self.url} ({error})."
                ) from error
        if "json" not in (answer.headers.get_content_type() or "") and content:
            where = answer.headers.get("Location", "nowhere")
            raise QuickstartFailed(
                f"{method} {path} answered {answer.status} without JSON. "
                f"{self.url} is no e2a server, or sends this on to {where}."
            )
        return answer.status, json.loads(content) if content else None

    @property
    def _prefix(self) -> str:
        return urlsplit(self.url).path.rstrip("/")

    @contextmanager
    def _connection(self) -> Iterator[http.client.HTTPConnection]:
        parts = urlsplit(self.url)
        host = parts.hostname or ""
        connection = (
            http.client.HTTPSConnection(
                host, parts.port, timeout=HTTP_SECONDS, context=ssl.create_default_context()
            )
            if parts.scheme == "https"
            else http.client.HTTPConnection(host, parts.port, timeout=HTTP_SECONDS)
        )
        try:
            yield connection
        finally:
            connection.close()


def _why(answer: Any) -> str:
    """A problem's code and sentence; the start of anything else."""
    if isinstance(answer, dict) and "code" in answer:
        return f"{answer['code']}: {answer.get('detail', '')}"
    return json.dumps(masked_secrets(answer))[:200]

"""Sessions with the agents that are programs, on a live stack."""

from __future__ import annotations

from typing import Any

from tests.live import LiveStack, wait_for
from tests.model_server import Step, then
from tests.sessions import sockets

Made = dict[str, Any]

AGENTS = {
    "claude-code": {"vendor": "anthropic", "model": "claude-sonnet-4-5"},
    "codex": {"vendor": "openai", "model": "gpt-5.1-codex"},
}


def program_session(live: LiveStack, key: str, kind: str, bundle: str, **body: Any) -> Made:
    """A new session with that agent and that bundle's key, whose sandbox runs."""
    agent = {"kind": kind, **body.pop("agent", {})}
    asked = {"agent": agent, "user_id": "u1", "secrets": [bundle], "llm": AGENTS[kind], **body}
    answer = live.request("POST", "/v1/sessions", asked, token=key)
    assert answer.status == 201, answer.body
    made = dict(answer.json())
    where = f"/v1/sessions/{made['chat_session_id']}"
    wait_for(lambda: live.request("GET", where, token=key).json()["status"] != "starting", what="its sandbox")
    return made


def session_now(live: LiveStack, key: str, session: Made) -> Made:
    return dict(live.request("GET", f"/v1/sessions/{session['chat_session_id']}", token=key).json())


def play(live: LiveStack, *steps: Step) -> Any:
    """From now on the model follows these steps; the model server is answered."""
    live.model.requests.clear()
    live.model.play(then(*steps))
    return live.model


def of_type(frames: sockets.Frames, kind: str) -> sockets.Frames:
    return [frame for frame in frames if frame["type"] == kind]


def processes(live: LiveStack, key: str, session: Made, name: str) -> str:
    """The processes of that name in the sandbox, as ps shows them."""
    return str(sockets.run_in(live, key, session, f"ps -C {name} -o args=")["stdout"])

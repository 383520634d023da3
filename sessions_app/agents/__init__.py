"""The kinds of agent."""

from __future__ import annotations

from collections.abc import Callable

from sessions_app.agents.claude_code import ClaudeCode
from sessions_app.agents.cli import CliAgent
from sessions_app.agents.codex import Codex
from sessions_app.agents.deictic import DeicticAgent
from sessions_app.agents.shell import ShellAgent
from sessions_app.turns import Agent

_AGENTS: dict[str, Callable[[], Agent]] = {
    "deictic": DeicticAgent,
    "claude-code": lambda: CliAgent(ClaudeCode()),
    "codex": lambda: CliAgent(Codex()),
    "shell": ShellAgent,
}


def agent_for(kind: str) -> Agent:
    """The agent of that kind. Raises `KeyError` for one that `rules.agent_check` would not let in."""
    return _AGENTS[kind]()

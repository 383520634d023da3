"""The kinds of agent."""

from __future__ import annotations

from sessions_app.agents.deictic import DeicticAgent
from sessions_app.agents.shell import ShellAgent
from sessions_app.turns import Agent


def agent_for(kind: str) -> Agent:
    """The agent of that kind. Raises `KeyError` for one that `rules.agent_check` would not let in."""
    return {"deictic": DeicticAgent, "shell": ShellAgent}[kind]()

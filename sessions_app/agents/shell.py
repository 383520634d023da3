"""`shell`: the prompt is a command line, the exit code is the command's own. No model, no key."""

from __future__ import annotations

from e2a.core.clock import now
from sandboxes.guest_client import ProcessSpec
from sandboxes.services import sandbox_client, sandbox_ensure_configured
from sessions_app.agents.cli import working_folder
from sessions_app.commands import command_run
from sessions_app.turns import Turn, TurnResult


class ShellAgent:
    """Runs the task's prompt with bash in the session's folder. Its input stays open for `stdin` frames."""

    def run(self, turn: Turn) -> TurnResult:
        sandbox = turn.session.sandbox
        assert sandbox is not None, "a turn starts when the sandbox runs"
        sandbox_ensure_configured(sandbox)
        client = sandbox_client(sandbox)
        left = (turn.session.expires_at - now()).total_seconds()
        spec = ProcessSpec(
            id=turn.task.public_id,
            command=turn.task.prompt,
            cwd=working_folder(turn, client),
            keep_stdin_open=True,
            on_full="block",
            timeout_seconds=max(1.0, left),
        )
        ended = command_run(turn, client, spec)
        process = ended.process
        if process.exit_code is None:
            return TurnResult(1, ended.text, reason="unknown_exit")
        reason = "oom" if process.oom else "timeout" if process.timed_out else ""
        return TurnResult(process.exit_code, ended.text, reason=reason, signal=process.signal)

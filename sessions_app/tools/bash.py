"""`bash_20250124`: one process a call, with the folder, variables and functions of the call before it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Final

from sandboxes.guest_client import GuestClient, ProcessSpec
from sessions_app.commands import command_run
from sessions_app.tools.base import ToolAnswer
from sessions_app.turns import Turn

TIMEOUT_SECONDS: Final = 600.0
"""A command of the model's may take this long; longer ones belong in the background."""
COMMAND_LIMIT: Final = 100_000
"""Bytes: the kernel takes one argument of at most 128 KiB."""

WRAPPER: Final = r"""
__e2a=$HOME/.e2a-shell
if [ -f "$__e2a/cwd" ]; then cd -- "$(cat "$__e2a/cwd")" 2>/dev/null; fi
if [ -f "$__e2a/state" ]; then . "$__e2a/state" >/dev/null 2>&1; fi
__e2a_keep() {
  __e2a_code=$?
  mkdir -p "$__e2a" 2>/dev/null && {
    pwd > "$__e2a/cwd"
    { for __e2a_name in $(compgen -v); do
        case $__e2a_name in __e2a*|_|BASH*|COMP_*|DIRSTACK|EPOCH*|EUID|FUNCNAME|GROUPS|HISTCMD|LINENO|OPT*|PIPESTATUS|\
          PPID|RANDOM|SECONDS|SHELLOPTS|SRANDOM|UID) continue;; esac
        case "|$__e2a_skip|" in *"|$__e2a_name|"*) ;; *) declare -p "$__e2a_name";; esac
      done; declare -f; } > "$__e2a/state.new" && mv -f "$__e2a/state.new" "$__e2a/state"
  } 2>/dev/null
  return $__e2a_code
}
trap __e2a_keep EXIT
__e2a_skip=$2
eval "$1"
"""
"""Anthropic's tool is a shell that lives on. A process a call gives each command its own exit code, output log and
group to kill, and lets another worker take it up by its id; so the shell's state is what is carried over, in files of
the sandbox's own. Variables that came from a bundle (`$2`) are left out: they must follow the bundle, not the file."""

RESTART: Final = 'rm -rf -- "$HOME/.e2a-shell"'


def process_id(turn: Turn, tool_use_id: str) -> str:
    """The guest's id for this call: the same in every attempt, so that the command is started once."""
    digest = hashlib.sha256(f"{turn.task.public_id}/{tool_use_id}".encode()).hexdigest()[:24]
    return f"{turn.task.public_id}-{digest}"


def run_bash(
    turn: Turn,
    client: GuestClient,
    tool_use_id: str,
    arguments: dict[str, Any],
    *,
    bundle_names: Iterable[str],
) -> ToolAnswer:
    """Run one command. Raises what `command_run` raises; a bad input is an answer to the model, not an error."""
    restart = arguments.get("restart") is True
    command = arguments.get("command")
    if restart:
        spec = ProcessSpec(
            id=process_id(turn, tool_use_id), command=RESTART, timeout_seconds=30, on_full="block"
        )
        command_run(turn, client, spec, tool_use_id=tool_use_id)
        return ToolAnswer("tool has been restarted.")
    if not isinstance(command, str) or not command.strip() or "\0" in command:
        return ToolAnswer("`command` must be a non-empty text.", is_error=True)
    if len(command.encode()) > COMMAND_LIMIT:
        return ToolAnswer("The command is over 100 kB; write it to a file and run that.", is_error=True)
    skipped = "|".join(sorted(bundle_names))
    spec = ProcessSpec(
        id=process_id(turn, tool_use_id),
        argv=("/bin/bash", "-c", WRAPPER, "bash", command, skipped),
        timeout_seconds=TIMEOUT_SECONDS,
        on_full="block",
    )
    ended = command_run(turn, client, spec, tool_use_id=tool_use_id)
    process = ended.process
    notes = []
    if process.timed_out:
        notes.append(f"[the command took over {TIMEOUT_SECONDS:g} s and was ended]")
    elif process.oom:
        notes.append("[the command ran out of memory and was ended]")
    elif process.exit_code is None:
        notes.append("[how the command ended is not known]")
    elif process.exit_code != 0:
        notes.append(f"[exit code {process.exit_code}]")
    return ToolAnswer(
        "\n".join(filter(None, [ended.text.rstrip("\n"), *notes])),
        is_error=process.exit_code != 0,
        exit_code=process.exit_code,
        truncated=ended.truncated,
    )

"""Run a model server by hand: `python -m tests.model_server --port 9999 --script demo`."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Mapping

from tests.model_server.script import Json, Step, call, last_prompt, say, together
from tests.model_server.server import ModelServer

DEMO_COMMAND = "echo 'hello from the sandbox' | tee hello.txt && uname -sr && ls -l hello.txt"


def demo(body: Json, headers: Mapping[str, str]) -> Step:
    """Does what a prompt like `run: ls -l` says; any other prompt gets a small tour."""
    prompt, answers = last_prompt(body)
    names = {tool.get("name") for tool in body.get("tools", [])}
    command = prompt.split("run:", 1)[1].strip() if "run:" in prompt else DEMO_COMMAND
    for name, argument in (("bash", "command"), ("Bash", "command"), ("exec_command", "cmd")):
        if answers == 0 and name in names:
            return together(say("I will try that in the sandbox.\n"), call(name, {argument: command}))
    if answers == 0:
        return say(f"You said: {prompt}")
    return say("Done. The command ran in your sandbox; its output is above.")


SCRIPTS = {"demo": demo, "echo": lambda body, headers: say(f"You said: {last_prompt(body)[0]}")}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.model_server", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9999)
    parser.add_argument("--script", choices=sorted(SCRIPTS), default="demo")
    options = parser.parse_args()
    with ModelServer(SCRIPTS[options.script], host=options.host, port=options.port) as models:
        print(f"model server ({options.script}) on {models.url}; stop it with Ctrl-C", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()

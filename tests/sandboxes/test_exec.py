"""Running commands through the API."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sandboxes.models import SandboxLogEntry
from tests.fixtures import Api
from tests.sandboxes.running import RunningNode, streamed, streamed_until, wait_until
from tests.sandboxes.test_warm_and_cold import exec_in, made


@pytest.fixture
def sandbox(make_node: Callable[..., RunningNode], as_alice: Api) -> str:
    make_node(pool=1).wait_parked(1)
    return str(made(as_alice)["vm_id"])


def events_of(raw: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    for block in raw.decode().split("\n\n"):
        if block and not block.startswith(":"):
            name, data = block.split("\n")
            yield name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def stream(api: Api, sandbox: str, body: dict[str, Any]) -> Any:
    return api.post(f"/v1/sandboxes/{sandbox}/exec", body, headers={"Accept": "text/event-stream"})


def test_argv_stdin_cwd_and_env(as_alice: Api, sandbox: str) -> None:
    body = {"argv": ["/bin/sh", "-c", "cat; pwd; echo $A"], "stdin": "in\n", "env": {"A": "b"}, "cwd": "/"}
    answer = as_alice.post(f"/v1/sandboxes/{sandbox}/exec", body)
    assert answer.json()["stdout"] == "in\n/\nb\n"


def test_a_command_over_its_time_ends_with_124(as_alice: Api, sandbox: str) -> None:
    started = time.monotonic()
    done = exec_in(as_alice, sandbox, "echo begun; sleep 60 & sleep 60", timeout_seconds=1)
    assert (done["exit_code"], done["stdout"]) == (124, "begun\n")
    assert time.monotonic() - started < 10


def test_more_than_one_mib_is_counted_and_cut(as_alice: Api, sandbox: str) -> None:
    done = exec_in(as_alice, sandbox, "head -c 3000000 /dev/zero | tr '\\0' x")
    assert (len(done["stdout"]), done["truncated"], done["exit_code"]) == (1024 * 1024, True, 0)


def test_bytes_that_are_no_text_are_replaced(as_alice: Api, sandbox: str) -> None:
    assert exec_in(as_alice, sandbox, r"printf 'a\377b'")["stdout"] == "a�b"


def test_streamed_the_events_come_in_order_and_end_with_one_exit(as_alice: Api, sandbox: str) -> None:
    answer = stream(as_alice, sandbox, {"command": "echo one; sleep 0.1; echo two >&2; printf 'ä'; exit 5"})
    assert (answer.status_code, answer["Content-Type"]) == (200, "text/event-stream")
    events = list(events_of(streamed(answer)))
    assert [name for name, _ in events][-1] == "exit"
    text = {
        name: "".join(data["data"] for found, data in events if found == name)
        for name in ("stdout", "stderr")
    }
    assert text == {"stdout": "one\nä", "stderr": "two\n"}
    assert [data["exit_code"] for name, data in events if name == "exit"] == [5]


def test_a_stream_that_its_reader_leaves_kills_the_command(as_alice: Api, sandbox: str) -> None:
    answer = stream(as_alice, sandbox, {"command": "echo here; sleep 300"})
    streamed_until(answer, b"here")

    def processes() -> str:
        return str(exec_in(as_alice, sandbox, "ps -ef | grep 'sleep 30[0]' || true")["stdout"])

    wait_until(lambda: not processes(), what="the command is gone")


def test_a_refusal_of_a_stream_is_a_problem(as_alice: Api, sandbox: str) -> None:
    answer = stream(as_alice, sandbox, {"command": "true", "cwd": "/nowhere"})
    assert answer.status_code == 400
    assert answer["Content-Type"] == "application/problem+json"
    assert answer.json()["code"] == "bad_cwd"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "command_or_argv"),
        ({"command": "true", "argv": ["true"]}, "command_or_argv"),
        ({"argv": []}, "min_length"),
        ({"command": 5}, "invalid"),
        ({"command": "true", "timeout_seconds": 3601}, "max_value"),
        ({"command": "true", "timeout_seconds": "5"}, "invalid"),
        ({"command": "true", "shell": "zsh"}, "unknown_field"),
        ({"command": "true", "env": {"A B": "c"}}, "bad_name"),
        ({"command": "true", "env": {"A": 1}}, "not_text"),
    ],
)
def test_what_makes_no_command_is_refused(
    as_alice: Api, node_row: Any, body: dict[str, Any], code: str
) -> None:
    answer = as_alice.post("/v1/sandboxes/sbx_aaaaaaaaaaaaaaaaaaaaaaaaaa/exec", body)
    assert answer.status_code == 400, answer.content
    assert code in [error["code"] for error in answer.json()["errors"]]


def test_logs_tell_what_ran_and_what_it_printed(as_alice: Api, sandbox: str) -> None:
    exec_in(as_alice, sandbox, "echo first")
    exec_in(as_alice, sandbox, "echo second; exit 2")
    page = as_alice.get(f"/v1/sandboxes/{sandbox}/logs").json()
    shown = [(row["command"], row["exit_code"], row["output"]) for row in page["entries"]]
    assert shown == [("echo first", 0, "first\n"), ("echo second; exit 2", 2, "second\n")]
    rest = as_alice.get(f"/v1/sandboxes/{sandbox}/logs?after={page['next_after']}").json()
    assert rest == {"entries": [], "next_after": page["next_after"]}
    assert as_alice.get(f"/v1/sandboxes/{sandbox}/logs?after=x").status_code == 400


def test_secrets_reach_commands_and_are_redacted_everywhere(
    make_node: Callable[..., RunningNode], as_alice: Api
) -> None:
    make_node(pool=1).wait_parked(1)
    values = {"LLM_API_KEY": "sk-model-key-planted", "GITHUB_TOKEN": "ghp_planted_value_1"}
    assert as_alice.post("/v1/tenants/me/secrets", {"name": "work", "values": values}).status_code == 201
    sandbox = made(as_alice, secrets=["work"])["vm_id"]
    done = exec_in(as_alice, sandbox, "env; echo ${#GITHUB_TOKEN} ghp_planted_value_1")
    assert "GITHUB_TOKEN=[redacted:GITHUB_TOKEN]" in done["stdout"]
    assert "19 [redacted:GITHUB_TOKEN]" in done["stdout"]
    assert "sk-model-key-planted" not in done["stdout"]
    entry = SandboxLogEntry.objects.get()
    assert "ghp_planted" not in entry.command + entry.output
    # Replaced, it is used and redacted from the next command on.
    changed = as_alice.put(
        "/v1/tenants/me/secrets/work", {"values": {"GITHUB_TOKEN": "ghp_another_value_longer"}}
    )
    assert changed.status_code == 200
    assert (
        exec_in(as_alice, sandbox, "echo ${#GITHUB_TOKEN} $GITHUB_TOKEN")["stdout"]
        == "24 [redacted:GITHUB_TOKEN]\n"
    )
    as_alice.delete(f"/v1/sandboxes/{sandbox}")
    shown = as_alice.get("/v1/tenants/me/secrets/work").json()
    assert shown["sessions"] == 0

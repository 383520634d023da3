"""Background processes: they outlive their caller, are read again by byte offset, and end truthfully."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any

import pytest

from e2a.core.clock import now
from sandboxes.jobs import jobs_settle
from sandboxes.models import Job, SandboxLogEntry
from tests.fixtures import Api
from tests.sandboxes.running import RunningNode, streamed, streamed_until, wait_until
from tests.sandboxes.test_exec import events_of
from tests.sandboxes.test_warm_and_cold import exec_in, made


@pytest.fixture
def sandbox(make_node: Callable[..., RunningNode], as_alice: Api) -> str:
    make_node(pool=1).wait_parked(1)
    return f"/v1/sandboxes/{made(as_alice)['vm_id']}"


def started(api: Api, sandbox: str, command: str, **body: Any) -> str:
    answer = api.post(f"{sandbox}/jobs", {"command": command, **body})
    assert answer.status_code == 201, answer.content
    assert answer.json()["state"] == "running"
    assert answer.json()["exit_code"] is None
    return f"{sandbox}/jobs/{answer.json()['job_id']}"


def ended(api: Api, job: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        shown: dict[str, Any] = api.get(job).json()
        return None if shown["state"] == "running" else shown

    found: dict[str, Any] = wait_until(look, what="the job has ended")
    return found


def text_of(page: dict[str, Any], stream: str) -> str:
    return "".join(piece["data"] for piece in page["output"] if piece["stream"] == stream)


def test_a_job_runs_by_itself_and_is_read_page_by_page(as_alice: Api, sandbox: str) -> None:
    job = started(
        as_alice, sandbox, "echo one; echo two >&2; read line; echo $line; exit 3", keep_stdin_open=True
    )

    def read() -> dict[str, Any] | None:
        page: dict[str, Any] = as_alice.get(f"{job}/output").json()
        return page if page["next_after"] == 8 else None

    first = wait_until(read, what="both lines")
    assert (text_of(first, "stdout"), text_of(first, "stderr")) == ("one\n", "two\n")
    assert (first["has_ended"], first["dropped_bytes"]) == (False, 0)
    assert as_alice.post(f"{job}/stdin", {"data": "three\n"}).json()["accepted_bytes"] == 6
    assert ended(as_alice, job) | {"job_id": "", "created_at": "", "ended_at": "", "command": ""} == {
        "job_id": "", "state": "exited", "command": "", "created_at": "", "ended_at": "", "exit_code": 3,
        "signal": None, "timed_out": False, "oom": False,
        "reason": None, "output_bytes": 14,
    }  # fmt: skip
    rest = as_alice.get(f"{job}/output?after=8").json()
    assert rest == {
        "output": [{"stream": "stdout", "offset": 8, "data": "three\n"}],
        "next_after": 14, "dropped_bytes": 0, "has_ended": True,
    }  # fmt: skip
    assert as_alice.get(f"{job}/output?after=15").json()["code"] == "bad_offset"


def test_its_end_is_listed_and_logged_once(as_alice: Api, sandbox: str) -> None:
    job = started(as_alice, sandbox, "echo said; exit 4")
    ended(as_alice, job)
    as_alice.get(job)
    assert [(row.exit_code, row.output) for row in SandboxLogEntry.objects.all()] == [(4, "said\n")]
    listed = as_alice.get(f"{sandbox}/jobs").json()
    assert [(row["state"], row["exit_code"]) for row in listed["jobs"]] == [("exited", 4)]


def test_a_character_is_not_cut_between_pages(as_alice: Api, sandbox: str) -> None:
    job = started(as_alice, sandbox, r"printf 'a\303'; read x; printf '\244'", keep_stdin_open=True)
    page = wait_until(lambda: (page := as_alice.get(f"{job}/output").json())["output"] and page, what="an a")
    assert (text_of(page, "stdout"), page["next_after"]) == ("a", 1)
    as_alice.post(f"{job}/stdin", {"data": "Cg==", "encoding": "base64", "close": True})
    ended(as_alice, job)
    assert text_of(as_alice.get(f"{job}/output?after=1").json(), "stdout") == "ä"


def test_a_stream_that_its_reader_leaves_goes_on_and_is_taken_up(as_alice: Api, sandbox: str) -> None:
    job = started(as_alice, sandbox, "echo one; read x; echo two; exit 7", keep_stdin_open=True)
    events = {"Accept": "text/event-stream"}
    streamed_until(as_alice.get(f"{job}/output", headers=events), b"one")
    assert as_alice.get(job).json()["state"] == "running"
    as_alice.post(f"{job}/stdin", {"data": "\n"})
    raw = streamed(as_alice.get(f"{job}/output?after=0", headers=events | {"Last-Event-ID": "4"}))
    assert b"id: 8\nevent: stdout" in raw
    plain = b"\n".join(line for line in raw.split(b"\n") if not line.startswith(b"id:"))
    found = [(name, data.get("data"), data.get("exit_code")) for name, data in events_of(plain)]
    assert found == [("stdout", "two\n", None), ("exit", None, 7)]


def test_a_signal_reaches_what_called_setsid(as_alice: Api, sandbox: str) -> None:
    job = started(as_alice, sandbox, "setsid sleep 4321 & sleep 4321")
    ps = "ps -ef | grep -c 'sleep 432[1]' || true"
    wait_until(lambda: exec_in(as_alice, sandbox[14:], ps)["stdout"] != "0\n", what="it sleeps")
    assert as_alice.post(f"{job}/signal", {"signal": "KILL"}).status_code == 200
    shown = ended(as_alice, job)
    assert (shown["state"], shown["exit_code"], shown["signal"]) == ("exited", 137, "KILL")
    wait_until(lambda: exec_in(as_alice, sandbox[14:], ps)["stdout"] == "0\n", what="all are gone")
    again = as_alice.post(f"{job}/signal", {"signal": "TERM"})
    assert (again.status_code, again.json()["code"]) == (409, "not_running")


def test_a_job_over_its_time_is_124(as_alice: Api, sandbox: str) -> None:
    shown = ended(as_alice, started(as_alice, sandbox, "sleep 60", timeout_seconds=1))
    assert (shown["exit_code"], shown["timed_out"]) == (124, True)


def test_what_the_guest_forgot_is_told_from_what_nobody_saw(as_alice: Api, sandbox: str) -> None:
    seen, unseen = started(as_alice, sandbox, "exit 5"), started(as_alice, sandbox, "exit 0")
    assert ended(as_alice, seen)["exit_code"] == 5
    for _ in range(33):
        exec_in(as_alice, sandbox[14:], "true")
    assert as_alice.get(seen).json()["exit_code"] == 5
    Job.objects.update(created_at=now() - dt.timedelta(minutes=2))
    shown = as_alice.get(unseen).json()
    assert (shown["state"], shown["exit_code"]) == ("unknown", None)
    gone = as_alice.get(f"{seen}/output")
    assert (gone.status_code, gone.json()["code"]) == (410, "output_gone")


def test_the_sweep_learns_of_an_end_that_nobody_asked_for(as_alice: Api, sandbox: str) -> None:
    started(as_alice, sandbox, "exit 6")

    def look() -> bool:
        jobs_settle()
        return Job.objects.get().state == "exited"

    wait_until(look, what="the row knows")
    assert Job.objects.get().exit_code == 6


def test_jobs_end_with_their_sandbox(as_alice: Api, sandbox: str) -> None:
    job = started(as_alice, sandbox, "sleep 600")
    as_alice.delete(sandbox)
    shown = as_alice.get(job).json()
    assert (shown["state"], shown["exit_code"]) == ("unknown", None)
    refused = as_alice.get(f"{job}/output")
    assert (refused.status_code, refused.json()["code"]) == (409, "not_running")


def test_a_deleted_job_is_killed_and_forgotten(as_alice: Api, sandbox: str) -> None:
    job = started(as_alice, sandbox, "sleep 5432")
    assert as_alice.delete(job).json()["deleted"] is True
    assert as_alice.get(job).status_code == 404
    ps = "ps -ef | grep -c 'sleep 543[2]' || true"
    wait_until(lambda: exec_in(as_alice, sandbox[14:], ps)["stdout"] == "0\n", what="it is gone")


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("/jobs", {}, "command_or_argv"),
        ("/jobs", {"command": "true", "timeout_seconds": 7201}, "max_value"),
        ("/jobs", {"command": "true", "pty": {}}, "unknown_field"),
        ("/jobs/job_a/signal", {"signal": "9"}, "invalid_choice"),
        ("/jobs/job_a/stdin", {"data": "%", "encoding": "base64"}, "invalid"),
    ],
)
def test_what_makes_no_sense_is_refused(
    as_alice: Api, node_row: Any, path: str, body: dict[str, Any], code: str
) -> None:
    answer = as_alice.post(f"/v1/sandboxes/{made(as_alice)['vm_id']}{path}", body)
    assert answer.status_code == 400, answer.content
    assert code in [error["code"] for error in answer.json()["errors"]]


def test_secrets_are_neither_stored_nor_shown(make_node: Callable[..., RunningNode], as_alice: Api) -> None:
    make_node(pool=1).wait_parked(1)
    values = {"GITHUB_TOKEN": "ghp_planted_value_1"}
    assert as_alice.post("/v1/tenants/me/secrets", {"name": "work", "values": values}).status_code == 201
    sandbox = f"/v1/sandboxes/{made(as_alice, secrets=['work'])['vm_id']}"
    job = started(as_alice, sandbox, "echo $GITHUB_TOKEN ghp_planted_value_1")
    ended(as_alice, job)
    assert b"ghp_planted" not in as_alice.get(f"{job}/output").content
    assert "ghp_planted" not in as_alice.get(job).content.decode()
    assert "ghp_planted" not in Job.objects.get().command + SandboxLogEntry.objects.get().output

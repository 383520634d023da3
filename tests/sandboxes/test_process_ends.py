"""How processes end, on Docker: with everything that they started, and told as it was."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import async_to_sync

from tests.fixtures import Api
from tests.sandboxes.running import RunningNode, streamed_until, wait_until
from tests.sandboxes.test_exec import stream
from tests.sandboxes.test_jobs import ended, started
from tests.sandboxes.test_warm_and_cold import exec_in, made

pytestmark = pytest.mark.docker

HOSTILE = """
setsid sleep 98765 &
(setsid sh -c 'sleep 98765 & exec sleep 98765' &)
(trap '' TERM HUP INT; while :; do sleep 98765; done) &
sleep 98765 & kill -STOP $!
trap '' TERM HUP INT
while :; do sleep 98765; done & echo ready; while :; do sleep 98765; done
"""
COUNT = "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -o 'sleep 9876[5]' | wc -l"


@pytest.fixture
def sandbox(make_node: Callable[..., RunningNode], as_alice: Api) -> str:
    make_node(pool=1, engine="docker").wait_parked(1)
    return str(made(as_alice)["vm_id"])


def running(api: Api, sandbox: str) -> int:
    return int(exec_in(api, sandbox, COUNT)["stdout"])


def all_run(api: Api, sandbox: str) -> None:
    # Three that fled, one that ignores signals, one that is stopped, and the command's own two.
    wait_until(lambda: running(api, sandbox) >= 7, what="all of them run")


def none_runs(api: Api, sandbox: str) -> None:
    wait_until(lambda: running(api, sandbox) == 0, what="none of them runs")


def test_nothing_that_a_command_started_outlives_it(as_alice: Api, sandbox: str) -> None:
    url = f"/v1/sandboxes/{sandbox}"
    done = exec_in(as_alice, sandbox, HOSTILE, timeout_seconds=2)
    assert (done["exit_code"], done["stdout"]) == (124, "ready\n")
    assert running(as_alice, sandbox) == 0, "a timeout is told when all are gone"

    streamed_until(stream(as_alice, sandbox, {"command": HOSTILE, "timeout_seconds": 600}), b"ready")
    none_runs(as_alice, sandbox)

    timed = started(as_alice, url, HOSTILE, timeout_seconds=4)
    assert ended(as_alice, timed)["exit_code"] == 124
    none_runs(as_alice, sandbox)

    signalled = started(as_alice, url, HOSTILE)
    all_run(as_alice, sandbox)
    assert as_alice.post(f"{signalled}/signal", {"signal": "TERM"}).status_code == 200
    assert running(as_alice, sandbox) > 0, "TERM may be ignored, KILL may not"
    assert as_alice.post(f"{signalled}/signal", {"signal": "KILL"}).status_code == 200
    shown = ended(as_alice, signalled)
    assert (shown["state"], shown["exit_code"], shown["signal"]) == ("exited", 137, "KILL")
    none_runs(as_alice, sandbox)

    deleted = started(as_alice, url, HOSTILE)
    all_run(as_alice, sandbox)
    assert as_alice.delete(deleted).status_code == 200
    none_runs(as_alice, sandbox)


def test_what_kills_its_own_runner_is_told_truthfully_or_as_unknown(as_alice: Api, sandbox: str) -> None:
    url = f"/v1/sandboxes/{sandbox}"
    for _ in range(5):
        job = as_alice.post(f"{url}/jobs", {"command": "kill -KILL $PPID; sleep 0.2; exit 7"})
        shown = ended(as_alice, f"{url}/jobs/{job.json()['job_id']}")
        assert (shown["state"], shown["exit_code"]) in (("exited", 7), ("unknown", None))
        done = exec_in(as_alice, sandbox, "kill -KILL $PPID; exit 7")
        assert done["exit_code"] in (7, None)
    rows = as_alice.get(f"{url}/logs").json()["entries"]
    assert 0 not in [row["exit_code"] for row in rows]
    assert len([row for row in rows if row["process_id"].startswith("job_")]) == 5, "logs show jobs, too"


def test_10_mib_of_input_go_in_with_back_pressure(as_alice: Api, sandbox: str) -> None:
    url = f"/v1/sandboxes/{sandbox}"
    command = "until [ -e go ]; do sleep 0.05; done; sha256sum"
    job = started(as_alice, url, command, keep_stdin_open=True)
    rng = random.Random(1)
    text = "".join(rng.choices("abcdefghij\n", k=10 * 1024 * 1024))
    refusals = 0
    for at in range(0, len(text), 512 * 1024):
        body = {"data": text[at : at + 512 * 1024]}
        while (answer := as_alice.post(f"{job}/stdin", body)).status_code == 409:
            assert answer.json()["code"] == "stdin_full"
            refusals += 1
            exec_in(as_alice, sandbox, "touch go")
        assert answer.json()["accepted_bytes"] == len(body["data"])
    assert refusals, "more than 1 MiB waits for nobody"
    assert as_alice.post(f"{job}/stdin", {"data": "", "close": True}).status_code == 200
    assert ended(as_alice, job)["exit_code"] == 0
    shown = as_alice.get(f"{job}/output").json()["output"]
    assert shown[0]["data"] == hashlib.sha256(text.encode()).hexdigest() + "  -\n"


def test_taken_up_after_random_cuts_the_output_is_the_same_byte_for_byte(as_alice: Api, sandbox: str) -> None:
    command = (
        'python3 -c "import random, sys, time; r = random.Random(5)\n'
        "for i in range(700):\n"
        "    sys.stdout.write(''.join(r.choices('aä€😀\\n', k=r.randint(1, 900)))); sys.stdout.flush()\n"
        '    time.sleep(0.002)"; exit 3'
    )
    rng = random.Random(5)
    expected = "".join("".join(rng.choices("aä€😀\n", k=rng.randint(1, 900))) for _ in range(700))
    assert len(expected.encode()) < 1024 * 1024
    job = started(as_alice, f"/v1/sandboxes/{sandbox}", command)
    cuts = random.Random()
    after, text, end, connections = 0, "", None, 0
    while end is None:
        answer = as_alice.get(
            f"{job}/output", headers={"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        )
        assert answer.status_code == 200
        connections += 1
        for event in read_some(answer, cuts.randint(1, 200_000) if connections < 40 else 1 << 30):
            assert event["type"] in ("stdout", "exit"), event
            after = event["next_after"]
            if event["type"] == "exit":
                end = event
            else:
                text += event["data"]
    assert connections > 5
    assert (text == expected, end["exit_code"]) == (True, 3)
    assert after == len(expected.encode())


def read_some(answer: Any, size: int) -> list[dict[str, Any]]:
    """The whole events of about the first `size` bytes; then the connection is dropped, in the middle of one."""

    async def read() -> bytes:
        raw = b""
        try:
            async for piece in answer.streaming_content:
                raw += piece
                if len(raw) >= size:
                    break
        finally:
            await answer.streaming_content.aclose()
        return raw[:size] if size < 1 << 30 else raw

    raw = async_to_sync(read)()
    answer.close()
    blocks = raw.split(b"\n\n")[:-1]
    return [json.loads(block.split(b"\ndata: ")[1]) for block in blocks if not block.startswith(b":")]

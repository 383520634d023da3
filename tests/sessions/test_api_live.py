"""Of the session's routes, what only a real server shows: caps before bodies, races, streams."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.live import Answer, LiveStack
from tests.sessions import sockets

pytestmark = [pytest.mark.docker, pytest.mark.timeout(300)]

MIB = 1024 * 1024


def at_once(count: int, call: Callable[[int], Answer]) -> list[Answer]:
    """`call(0)` … `call(count - 1)`, let go together."""
    start = threading.Barrier(count)
    answers: list[Answer] = []

    def run(number: int) -> None:
        start.wait(30)
        answers.append(call(number))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(answers) == count
    return answers


def head_only(live: LiveStack, *lines: str) -> tuple[int, dict[str, Any]]:
    """The answer to a request whose body never comes."""
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as connection:
        head = ["POST /v1/sessions HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", *lines]
        connection.sendall("\r\n".join([*head, "", ""]).encode())
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert answer.headers["X-Request-Id"].startswith("req_")
        return answer.status, json.loads(answer.read())


def test_size_and_sender_are_checked_before_the_body_is_read(live: LiveStack, live_key: str) -> None:
    bearer = f"Authorization: Bearer {live_key}"
    status, problem = head_only(live, f"Content-Length: {MIB + 1}", bearer)
    assert (status, problem["code"]) == (413, "too_large")
    status, problem = head_only(live, "Content-Length: 100")
    assert (status, problem["code"]) == (401, "invalid_token")
    status, problem = head_only(live, "Content-Length: 100", "Authorization: Bearer e2a_live_no")
    assert (status, problem["code"]) == (401, "invalid_token")
    status, problem = head_only(live, "Content-Length: 100", bearer, bearer)
    assert (status, problem["code"]) == (401, "invalid_token")


def test_a_body_of_one_mib_is_read_and_a_longer_one_in_chunks_is_not(live: LiveStack, live_key: str) -> None:
    body = json.dumps({"agent": {"kind": "shell"}, "user_id": ""}).encode()
    padded = body[:-2] + b'x"' + b" " * (MIB - len(body) - 1) + b"}"
    assert len(padded) == MIB
    answer = live.request("POST", "/v1/sessions", padded, token=live_key)
    assert answer.status == 201, answer.body
    live.request("DELETE", f"/v1/sessions/{answer.json()['chat_session_id']}", token=live_key)

    def pieces() -> Iterator[bytes]:
        for _ in range(17):
            yield b" " * 65536

    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=20)
    headers = {"Authorization": f"Bearer {live_key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/sessions", pieces(), headers, encode_chunked=True)
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())["code"]) == (413, "too_large")


def test_fifty_creates_with_one_idempotency_key_make_one_session(live: LiveStack, live_key: str) -> None:
    """SECURITY 8.1."""
    body = {"agent": {"kind": "shell"}, "user_id": "fifty"}
    answers = at_once(
        50,
        lambda _: live.request(
            "POST", "/v1/sessions", body, token=live_key, headers={"Idempotency-Key": "fifty"}
        ),
    )
    made = {a.json()["chat_session_id"] for a in answers if a.status == 201}
    first = [
        a for a in answers if a.status == 201 and "idempotent-replayed" not in {n.lower() for n in a.headers}
    ]
    assert len(made) == len(first) == 1
    others = [a for a in answers if a.status != 201]
    assert {(a.status, a.json()["code"]) for a in others} <= {(409, "idempotency_in_progress")}
    listed = live.request("GET", "/v1/sessions?user_id=fifty", token=live_key).json()["sessions"]
    assert [s["chat_session_id"] for s in listed] == list(made)
    again = live.request("POST", "/v1/sessions", body, token=live_key, headers={"Idempotency-Key": "fifty"})
    assert again.json() == first[0].json()
    other = live.request(
        "POST", "/v1/sessions", body | {"user_id": "x"}, token=live_key, headers={"Idempotency-Key": "fifty"}
    )
    assert (other.status, other.json()["code"]) == (409, "idempotency_mismatch")
    live.request("DELETE", f"/v1/sessions/{made.pop()}", token=live_key)


def test_thirty_submits_of_one_task_run_it_once(live: LiveStack, live_key: str) -> None:
    session = sockets.shell_session(live, live_key)
    path = f"/v1/sessions/{session['chat_session_id']}/tasks"
    body = {"prompt": "echo ran >> /workspace/runs; cat /workspace/runs", "id": "once"}
    answers = at_once(30, lambda _: live.request("POST", path, body, token=live_key))
    assert {a.status for a in answers} == {202}
    assert len({a.json()["task_id"] for a in answers}) == 1
    frames = events_until(live, live_key, session, "exit")
    assert [f["type"] for f in frames].count("task_queued") == 1
    assert sockets.output_of(frames) == "ran\n"
    assert len(live.request("GET", path, token=live_key).json()["tasks"]) == 1


def event_stream(
    live: LiveStack,
    key: str,
    session: dict[str, Any],
    *,
    after: int | None = None,
    last_id: int | None = None,
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Server-sent events as (event, id, data)."""
    headers = {"Authorization": f"Bearer {key}", "Accept": "text/event-stream"}
    if last_id is not None:
        headers["Last-Event-ID"] = str(last_id)
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=40)
    query = "" if after is None else f"?after={after}"
    connection.request("GET", f"/v1/sessions/{session['chat_session_id']}/events{query}", headers=headers)
    answer = connection.getresponse()
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert answer.headers["Cache-Control"] == "no-store"
    fields: dict[str, str] = {}
    try:
        for raw in answer:
            line = raw.decode().rstrip("\n")
            if line and not line.startswith(":"):
                name, _, value = line.partition(": ")
                fields[name] = value
            elif fields:
                yield fields["event"], fields.get("id", ""), json.loads(fields["data"])
                fields = {}
    finally:
        connection.close()


def events_until(live: LiveStack, key: str, session: dict[str, Any], kind: str) -> sockets.Frames:
    """Frames of the event stream up to the first of that type."""
    frames: sockets.Frames = []
    for event, _, data in event_stream(live, key, session):
        frames.append(data)
        if event == kind:
            break
    return frames


def test_the_log_as_server_sent_events_is_live_and_goes_on_from_the_last_id(
    live: LiveStack, live_key: str
) -> None:
    session = sockets.shell_session(live, live_key)
    path = f"/v1/sessions/{session['chat_session_id']}"
    assert (
        live.request("POST", f"{path}/tasks", {"prompt": "read line; echo got $line"}, token=live_key).status
        == 202
    )
    stream = event_stream(live, live_key, session)
    seen = []
    for event, identifier, data in stream:
        seen.append((event, int(identifier), data["seq"], data["type"]))
        if event == "task_started":
            break
    assert [row[1] for row in seen] == list(range(1, len(seen) + 1))
    assert all(event == kind and identifier == seq for event, identifier, seq, kind in seen)
    task_id = data["task_id"]
    assert live.request("POST", f"{path}/tasks/{task_id}/cancel", token=live_key).status == 200
    later = event_stream(live, live_key, session, after=0, last_id=seen[-1][1])
    rest = [next(later)]
    while rest[-1][0] != "exit":
        rest.append(next(later))
    assert [int(row[1]) for row in rest] == list(range(len(seen) + 1, len(seen) + len(rest) + 1))
    assert rest[-1][2]["exit_code"] == 130
    live.request("DELETE", path, token=live_key)
    assert [event for event, _, _ in later] == ["status", "status", "end"]
    assert [event for event, _, _ in stream][-1] == "end"
    assert [f["seq"] for f in sockets.stored(live, live_key, session)] == list(
        range(1, len(seen) + len(rest) + 3)
    )

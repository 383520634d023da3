"""The session's other routes: who reads it, what each refuses, and lists, tasks, events and ends (CONTRACT 5)."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any

import pytest
import time_machine
from django.db import transaction

from accounts.models import Tenant
from e2a.core.clock import now
from sandboxes.models import Node, Sandbox
from sessions_app import frames
from sessions_app.log import append
from sessions_app.models import Session, SessionStatus, Task, TaskState
from tests.fixtures import Api

MISSING = "ses_aaaaaaaaaaaaaaaaaaaaaaaaaa"
NO_TASK = "tsk_aaaaaaaaaaaaaaaaaaaaaaaaaa"
MakeSession = Callable[..., Session]

pytestmark = pytest.mark.django_db


def refused(answer: Any, status: int, code: str, field: str | None = None) -> None:
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (status, code), answer.content
    assert answer["Content-Type"] == "application/problem+json"
    if field is not None:
        assert field in [error["field"] for error in problem["errors"]], problem


def path_of(session: Session, rest: str = "") -> str:
    return f"/v1/sessions/{session.public_id}{rest}"


def written(session: Session, count: int) -> None:
    """`count` frames in the session's log."""
    with transaction.atomic():
        append(session, [frames.status("idle")] * count)


def ended(make_session: MakeSession, **values: Any) -> Session:
    return make_session(status=SessionStatus.ENDED, end_reason="user", ended_at=now(), **values)


# -- whose it is

ROUTES = [
    ("GET", "", None),
    ("PATCH", "", {"metadata": {"a": "b"}}),
    ("PATCH", "", b"{"),
    ("DELETE", "", None),
    ("POST", "/token", None),
    ("GET", "/tasks", None),
    ("POST", "/tasks", {"prompt": "true"}),
    ("GET", "/tasks/{task}", None),
    ("POST", "/tasks/{task}/cancel", None),
    ("GET", "/events", None),
    ("GET", "/events?after=1", None),
]


@pytest.mark.parametrize(("method", "rest", "body"), ROUTES)
def test_a_strangers_session_is_like_one_that_never_was(
    session: Session, running_task: Task, as_alice: Api, as_mallory: Api, method: str, rest: str, body: Any
) -> None:
    rest = rest.format(task=running_task.public_id)
    before = (Session.objects.values().get(pk=session.pk), Task.objects.values().get())
    foreign = as_mallory.request(method, path_of(session, rest), body)
    missing = as_mallory.request(method, f"/v1/sessions/{MISSING}{rest}", body)
    if body == b"{":
        assert {foreign.status_code, missing.status_code} <= {400, 404}
    else:
        refused(foreign, 404, "not_found")
    assert foreign.json() | {"request_id": ""} == missing.json() | {"request_id": ""}
    assert (Session.objects.values().get(pk=session.pk), Task.objects.values().get()) == before


@pytest.mark.parametrize(
    "session_id", ["x", "ses_", "ses_" + "a" * 200, "..", "ses_%00", "ses_AAAAAAAAAAAAAAAAAAAAAAAAAA"]
)
def test_an_id_that_is_none_is_missing(as_alice: Api, session_id: str) -> None:
    refused(as_alice.get(f"/v1/sessions/{session_id}/tasks"), 404, "not_found")


def test_another_sessions_task_is_missing(
    make_session: MakeSession, running_task: Task, as_alice: Api
) -> None:
    other = make_session()
    for task_id in (running_task.public_id, NO_TASK, "x", "%00"):
        refused(as_alice.get(path_of(other, f"/tasks/{task_id}")), 404, "not_found")
        refused(as_alice.post(path_of(other, f"/tasks/{task_id}/cancel")), 404, "not_found")
    running_task.refresh_from_db()
    assert running_task.cancel_requested_at is None


def test_bob_shares_alices_sessions(bob: Any, session: Session, api_key: Callable[..., str]) -> None:
    assert Api(api_key(bob)).get(path_of(session)).json()["chat_session_id"] == session.public_id


@pytest.mark.parametrize(("method", "rest", "body"), ROUTES)
def test_every_route_needs_a_bearer_and_its_scope(
    session: Session,
    running_task: Task,
    alice: Any,
    api_key: Callable[..., str],
    method: str,
    rest: str,
    body: Any,
) -> None:
    path = path_of(session, rest.format(task=running_task.public_id))
    refused(Api().request(method, path, body), 401, "invalid_token")
    refused(Api("e2a_live_" + "x" * 36).request(method, path, body), 401, "invalid_token")
    wrong = "sessions:write" if method == "GET" else "sessions:read"
    refused(Api(api_key(alice, scopes=[wrong])).request(method, path, body), 403, "missing_scope")


def test_a_stream_token_reads_nothing_over_rest(session: Session, as_alice: Api) -> None:
    """SECURITY 2.1, 2.6: a session token is for the socket alone, in the header and in the query."""
    token = as_alice.post(path_of(session, "/token")).json()["jwt"]
    refused(Api(token).get(path_of(session)), 401, "invalid_token")
    refused(Api(token).get(path_of(session, "/events")), 401, "invalid_token")
    refused(Api().get(path_of(session, f"/events?token={token}")), 401, "invalid_token")


def test_a_wrong_method_is_405(session: Session, as_alice: Api) -> None:
    for method, path in (
        ("PUT", "/v1/sessions"),
        ("POST", path_of(session)),
        ("GET", path_of(session, "/token")),
    ):
        refused(as_alice.request(method, path, {}), 405, "method_not_allowed")


# -- lists


def test_the_list_is_the_tenants_own_newest_first_page_by_page(
    make_session: MakeSession, mallory: Any, as_alice: Api
) -> None:
    mine = [make_session().public_id for _ in range(5)]
    make_session(tenant=mallory.tenant)
    found: list[str] = []
    cursor = ""
    for expected in (2, 2, 1):
        page = as_alice.get(f"/v1/sessions?limit=2{cursor}").json()
        assert len(page["sessions"]) == expected
        found += [row["chat_session_id"] for row in page["sessions"]]
        cursor = f"&cursor={page['next_cursor']}"
    assert found == mine[::-1]
    assert page["next_cursor"] is None


def test_the_list_is_filtered_by_status_and_user(make_session: MakeSession, as_alice: Api) -> None:
    one, two = make_session(user_id="jo"), ended(make_session, user_id="jo")
    make_session(user_id="al")
    assert [s["chat_session_id"] for s in as_alice.get("/v1/sessions?status=ended").json()["sessions"]] == [
        two.public_id
    ]
    assert {s["chat_session_id"] for s in as_alice.get("/v1/sessions?user_id=jo").json()["sessions"]} == {
        one.public_id, two.public_id,
    }  # fmt: skip
    both = as_alice.get("/v1/sessions?user_id=jo&status=idle").json()["sessions"]
    assert [s["chat_session_id"] for s in both] == [one.public_id]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("status=dead", "status"), ("status=", "status"), ("limit=0", "limit"), ("limit=101", "limit"),
        ("limit=-1", "limit"), ("limit=ten", "limit"), ("limit=٣", "limit"), ("limit=", "limit"),
        ("cursor=x", "cursor"), ("cursor=Y2FiYw", "cursor"), ("cursor=%00", "cursor"), ("cursor=é", "cursor"),
    ],
)  # fmt: skip
def test_a_wrong_query_is_named(session: Session, as_alice: Api, query: str, field: str) -> None:
    answer = as_alice.get(f"/v1/sessions?{query}")
    assert answer.status_code == 400
    assert field in [error["field"] for error in answer.json()["errors"]]
    if field != "status":
        assert as_alice.get(path_of(session, f"/tasks?{query}")).status_code == 400


# -- PATCH


def test_patch_changes_what_it_may_and_nothing_else(session: Session, as_alice: Api) -> None:
    answer = as_alice.patch(
        path_of(session), {"budget": {"max_usd": 2.5}, "ttl_seconds": 7200, "metadata": {"a": "b"}}
    )
    assert answer.status_code == 200, answer.content
    body = answer.json()
    assert (body["budget"], body["ttl_seconds"], body["metadata"]) == ({"max_usd": 2.5}, 7200, {"a": "b"})
    assert Session.objects.get().expires_at == session.created_at + dt.timedelta(seconds=7200)
    assert as_alice.patch(path_of(session), {"budget": None}).json()["budget"] is None
    assert as_alice.patch(path_of(session), {}).status_code == 200
    assert as_alice.get(path_of(session)).json()["metadata"] == {"a": "b"}


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        (b"{", "malformed_json", None),
        (b"[]", "malformed_json", None),
        ({"user_id": "u2"}, "unknown_field", "user_id"),
        ({"tenant_id": "x"}, "unknown_field", "tenant_id"),
        ({"expires_at": "2100-01-01T00:00:00Z"}, "unknown_field", "expires_at"),
        ({"budget": {"max_tokens": "1"}}, "validation_failed", "budget.max_tokens"),
        ({"budget": 5}, "validation_failed", "budget"),
        ({"ttl_seconds": 59}, "validation_failed", "ttl_seconds"),
        ({"ttl_seconds": 7201}, "validation_failed", "ttl_seconds"),
        ({"ttl_seconds": None}, "validation_failed", "ttl_seconds"),
        ({"metadata": {f"k{n}": "v" for n in range(17)}}, "validation_failed", "metadata"),
        ({"metadata": None}, "validation_failed", "metadata"),
        ({"metadata": {"a": 5}}, "validation_failed", "metadata.a"),
    ],
)
def test_a_patch_that_is_wrong_changes_nothing(
    session: Session, as_alice: Api, body: Any, code: str, field: str | None
) -> None:
    before = Session.objects.values().get()
    refused(as_alice.patch(path_of(session), body), 400, code, field)
    assert Session.objects.values().get() == before


def test_an_ended_session_is_not_changed(make_session: MakeSession, as_alice: Api) -> None:
    session = ended(make_session)
    refused(as_alice.patch(path_of(session), {"ttl_seconds": 7200}), 409, "session_ended")
    refused(as_alice.post(path_of(session, "/token")), 409, "session_ended")
    refused(as_alice.post(path_of(session, "/tasks"), {"prompt": "true"}), 409, "session_ended")


# -- DELETE


def test_delete_ends_it_once_and_twice_is_fine(node_row: Node, as_alice: Api) -> None:
    made = as_alice.post("/v1/sessions", {"agent": {"kind": "shell"}, "user_id": "u1"}).json()
    path = f"/v1/sessions/{made['chat_session_id']}"
    task = as_alice.post(f"{path}/tasks", {"prompt": "true"}).json()
    for _ in range(2):
        answer = as_alice.delete(path)
        assert (answer.status_code, answer.json()) == (
            200,
            {"chat_session_id": made["chat_session_id"], "status": "ended"},
        )
    shown = as_alice.get(path).json()
    assert (shown["status"], shown["end_reason"]) == ("ended", "user")
    assert shown["ended_at"].endswith("Z")
    assert Sandbox.objects.get().state == "destroyed"
    events = as_alice.get(f"{path}/events").json()["events"]
    assert [e["type"] for e in events] == ["task_queued", "exit", "status"]
    assert events[1] | {"ts": ""} == {
        "type": "exit", "seq": 2, "ts": "", "task_id": task["task_id"], "exit_code": 130, "reason": "user",
    }  # fmt: skip
    over = as_alice.get(f"{path}/tasks/{task['task_id']}").json()
    assert (over["status"], over["exit_code"]) == ("done", 130)


# -- token


def test_a_token_ends_with_its_session_or_after_an_hour(make_session: MakeSession, as_alice: Api) -> None:
    from accounts.tokens import session_token_check

    short, long = make_session(), make_session()
    Session.objects.filter(pk=short.pk).update(expires_at=now() + dt.timedelta(seconds=90))
    Session.objects.filter(pk=long.pk).update(expires_at=now() + dt.timedelta(hours=2))
    for session, seconds in ((short, 90), (long, 3600)):
        answer = as_alice.post(path_of(session, "/token"))
        assert answer.status_code == 201
        assert answer["Cache-Control"] == "no-store"
        claims = session_token_check(answer.json()["jwt"])
        assert claims.sid == session.public_id
        assert abs((claims.expires_at - now()).total_seconds() - seconds) < 30
        assert answer.json()["connect_url"].endswith(f"{session.public_id}/ws")


# -- tasks


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        (b"{", "malformed_json", None),
        (b'"echo"', "malformed_json", None),
        ({}, "validation_failed", "prompt"),
        ({"prompt": None}, "validation_failed", "prompt"),
        ({"prompt": 5}, "validation_failed", "prompt"),
        ({"prompt": ["true"]}, "validation_failed", "prompt"),
        ({"prompt": ""}, "blank", "prompt"),
        ({"prompt": " \n\t"}, "blank", "prompt"),
        ({"prompt": "x" * (256 * 1024 + 1)}, "too_large", "prompt"),
        ({"prompt": "é" * (128 * 1024 + 1)}, "too_large", "prompt"),
        ({"prompt": "a\0b"}, "malformed_json", None),
        ({"prompt": "true", "id": ""}, "validation_failed", "id"),
        ({"prompt": "true", "id": 5}, "validation_failed", "id"),
        ({"prompt": "true", "id": "x" * 129}, "validation_failed", "id"),
        ({"prompt": "true", "task_id": "tsk_x"}, "unknown_field", "task_id"),
    ],
)
def test_a_task_that_is_wrong_is_not_queued(
    session: Session, as_alice: Api, body: Any, code: str, field: str | None
) -> None:
    refused(as_alice.post(path_of(session, "/tasks"), body), 400, code, field)
    assert not Task.objects.exists()
    session.refresh_from_db()
    assert session.last_seq == 0


def test_tasks_queue_up_to_the_limit(alice: Any, session: Session, as_alice: Api) -> None:
    Tenant.objects.filter(pk=alice.tenant_id).update(max_tasks_queued=2)
    largest = "x" * (256 * 1024)
    first = as_alice.post(path_of(session, "/tasks"), {"prompt": largest})
    assert (first.status_code, first.json()["status"]) == (202, "queued")
    assert as_alice.post(path_of(session, "/tasks"), {"prompt": "two"}).status_code == 202
    refused(as_alice.post(path_of(session, "/tasks"), {"prompt": "three"}), 409, "queue_full")
    listed = as_alice.get(path_of(session, "/tasks")).json()["tasks"]
    assert [task["prompt"] for task in listed] == ["two", largest]
    assert listed[1] == as_alice.get(path_of(session, f"/tasks/{first.json()['task_id']}")).json()
    assert listed[0]["exit_code"] is None
    assert listed[0]["result"] is None


def test_a_task_is_the_same_under_its_own_id_and_under_an_idempotency_key(
    session: Session, as_alice: Api
) -> None:
    path = path_of(session, "/tasks")
    one = as_alice.post(path, {"prompt": "true", "id": "a"})
    again = as_alice.post(path, {"prompt": "true", "id": "a"})
    assert one.json() == again.json()
    headers = {"Idempotency-Key": "k"}
    two = as_alice.post(path, {"prompt": "true"}, headers=headers)
    replayed = as_alice.post(path, {"prompt": "true"}, headers=headers)
    assert two.json() == replayed.json()
    assert replayed["Idempotent-Replayed"] == "true"
    refused(as_alice.post(path, {"prompt": "false"}, headers=headers), 409, "idempotency_mismatch")
    assert Task.objects.count() == 2
    session.refresh_from_db()
    assert session.last_seq == 2


def test_a_waiting_task_is_cancelled_at_once_and_only_once(session: Session, as_alice: Api) -> None:
    task_id = as_alice.post(path_of(session, "/tasks"), {"prompt": "true"}).json()["task_id"]
    answer = as_alice.post(path_of(session, f"/tasks/{task_id}/cancel"))
    assert answer.status_code == 200
    assert (answer.json()["status"], answer.json()["exit_code"], answer.json()["exit_reason"]) == (
        "done",
        130,
        "cancelled",
    )
    refused(as_alice.post(path_of(session, f"/tasks/{task_id}/cancel")), 409, "already_done")
    events = as_alice.get(path_of(session, "/events")).json()["events"]
    assert [e["type"] for e in events] == ["task_queued", "exit"]
    assert events[-1]["exit_code"] == 130


def test_a_running_task_is_asked_to_stop(session: Session, running_task: Task, as_alice: Api) -> None:
    answer = as_alice.post(path_of(session, f"/tasks/{running_task.public_id}/cancel"))
    assert (answer.status_code, answer.json()["status"]) == (200, "running")
    running_task.refresh_from_db()
    assert running_task.cancel_requested_at is not None
    assert running_task.state == TaskState.RUNNING


# -- events


def test_events_come_page_by_page(session: Session, as_alice: Api) -> None:
    written(session, 501)
    first = as_alice.get(path_of(session, "/events")).json()
    assert [e["seq"] for e in first["events"]] == list(range(1, 501))
    assert first["next_after"] == 500
    rest = as_alice.get(path_of(session, "/events?after=500")).json()
    assert [e["seq"] for e in rest["events"]] == [501]
    assert as_alice.get(path_of(session, "/events?after=501")).json() == {"events": [], "next_after": 501}
    assert as_alice.get(path_of(session, "/events?after=999999")).json() == {
        "events": [],
        "next_after": 999999,
    }
    few = as_alice.get(path_of(session, "/events?limit=3&after=7")).json()
    assert [e["seq"] for e in few["events"]] == [8, 9, 10]
    assert few["next_after"] == 10
    assert few["events"][0] | {"ts": ""} == {"type": "status", "seq": 8, "ts": "", "status": "idle"}
    assert few["events"][0]["ts"].endswith("Z")


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("after=-1", "after"), ("after=x", "after"), ("after=", "after"), ("after=1.5", "after"), ("after=٣", "after"),
        ("after=9999999999999999999", "after"), ("after=0x1", "after"), ("limit=0", "limit"), ("limit=501", "limit"),
    ],
)  # fmt: skip
def test_a_cursor_of_events_that_is_none(session: Session, as_alice: Api, query: str, field: str) -> None:
    answer = as_alice.get(path_of(session, f"/events?{query}"))
    assert answer.status_code == 400
    assert answer.json()["errors"][0]["field"] == field
    for last_id in ("x", "-1", "1e3"):
        stream = as_alice.get(
            path_of(session, "/events"), headers={"Accept": "text/event-stream", "Last-Event-ID": last_id}
        )
        refused(stream, 400, "invalid_after", "after")


def test_events_are_kept_for_30_days_after_the_end(
    make_session: MakeSession, alice: Any, api_key: Any
) -> None:
    from sessions_app.tasks import events_purge

    session, living = ended(make_session), make_session()
    written(session, 2)
    written(living, 2)
    reader = Api(api_key(alice))
    with time_machine.travel(now() + dt.timedelta(days=29, hours=23), tick=True):
        events_purge()
        assert len(reader.get(path_of(session, "/events")).json()["events"]) == 2
    with time_machine.travel(now() + dt.timedelta(days=30, seconds=5), tick=True):
        refused(reader.get(path_of(session, "/events")), 410, "events_expired")
        answer = reader.get(path_of(session, "/events"), headers={"Accept": "text/event-stream"})
        refused(answer, 410, "events_expired")
        events_purge()
        refused(reader.get(path_of(session, "/events")), 410, "events_expired")
        assert session.events.count() == 0
        assert len(reader.get(path_of(living, "/events")).json()["events"]) == 2
        assert reader.get(path_of(session)).status_code == 200


def test_what_a_worker_keeps_for_itself_is_not_shown(
    session: Session, running_task: Task, as_alice: Api
) -> None:
    with transaction.atomic():
        append(
            session,
            [
                frames.usage(
                    running_task.pk, {"input_tokens": 1, "output_tokens": 2, "cost_usd": None, "model": "m"},
                    message=[{"type": "text", "text": "of the worker alone"}], stop_reason="end_turn",
                ),
                frames.tool_result(running_task.pk, tool_use_id="t", content="of the worker alone", is_error=False),
            ],
        )  # fmt: skip
    answer = as_alice.get(path_of(session, "/events"))
    assert len(answer.json()["events"]) == 2
    assert "of the worker alone" not in answer.content.decode()


def test_null_characters_are_stored_as_something_every_database_takes(
    session: Session, running_task: Task
) -> None:
    """PostgreSQL refuses NUL in JSON and in text; a command may print it."""
    from sessions_app.task_queue import task_finish

    with transaction.atomic():
        append(session, [frames.text("stdout", "a\0b", source="tool", task=running_task.pk, offset=3)])
    task_finish(session=session, task=running_task, exit_code=0, result="a\0b")
    assert session.events.get(seq=1).data["data"] == "a\ufffdb"
    running_task.refresh_from_db()
    assert running_task.result == "a\ufffdb"


def test_null_characters_of_a_caller_are_refused(session: Session, as_alice: Api) -> None:
    refused(as_alice.get("/v1/sessions?user_id=%00"), 400, "invalid", "user_id")
    refused(
        as_alice.patch(path_of(session), {"metadata": {"a\0": "b"}}), 400, "validation_failed", "metadata"
    )

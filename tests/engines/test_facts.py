"""What Docker's answers mean, for the answers that a test cannot provoke at will."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from sandboxes.engines.container_facts import container_state, daemon_soft_limits


def inspect_answer(**state: Any) -> dict[str, Any]:
    return {
        "Id": "c0ffee",
        "Config": {"Labels": {"e2a.sandbox": "sbx_a", "e2a.instance": "i", "e2a.generation": "3"}},
        "State": {
            "Status": "exited",
            "ExitCode": 0,
            "OOMKilled": False,
            "StartedAt": "2026-11-24T10:00:00.123456789Z",
            "FinishedAt": "2026-11-24T10:00:01Z",
        }
        | state,
    }


@pytest.mark.parametrize(
    ("status", "exit_code", "flag", "oom"),
    [
        ("exited", 137, True, True),
        ("exited", 137, False, False),
        ("exited", 0, True, False),
        ("running", 0, True, False),
    ],
)
def test_oom_is_said_only_of_a_container_that_ended_by_it(
    status: str, exit_code: int, flag: bool, oom: bool
) -> None:
    found = container_state(inspect_answer(Status=status, ExitCode=exit_code, OOMKilled=flag))
    assert found.oom is oom
    assert found.exit_code == (exit_code if status == "exited" else None)


def test_dockers_times_are_read_to_the_microsecond_and_its_year_one_is_never() -> None:
    found = container_state(inspect_answer())
    assert found.started_at == datetime(2026, 11, 24, 10, 0, 0, 123456, tzinfo=UTC)
    assert found.finished_at == datetime(2026, 11, 24, 10, 0, 1, tzinfo=UTC)
    fresh = container_state(inspect_answer(Status="created", StartedAt="0001-01-01T00:00:00Z"))
    assert (fresh.started_at, fresh.finished_at, fresh.exit_code) == (None, None, None)


def test_each_thing_a_kernel_cannot_hold_to_is_a_sentence() -> None:
    good = {"MemoryLimit": True, "SwapLimit": True, "PidsLimit": True, "CpuCfsQuota": True}
    sound = good | {"SecurityOptions": ["name=seccomp,profile=default"]}
    assert daemon_soft_limits(sound) == []
    assert len(daemon_soft_limits(sound | {"PidsLimit": False, "SwapLimit": False})) == 2
    assert len(daemon_soft_limits(good | {"SecurityOptions": None})) == 1

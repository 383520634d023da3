"""What a guest's refusal, or its silence, means to the caller of the API."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from e2a.core.errors import (
    CallerError,
    Conflict,
    DeadlineExceeded,
    E2AError,
    Forbidden,
    GuestError,
    GuestUnreachable,
    NotFound,
    TooLarge,
    Unavailable,
)
from sandboxes.models import Sandbox, SandboxState
from sandboxes.waiting import database_release

log = structlog.get_logger(__name__)


END_SECONDS = 5.0
"""How long an end that is on its way is waited for: the engine tells the node of it within a fraction of that."""
_LOOK_SECONDS = 0.05
_GONE = frozenset({"guest_unreachable", "no_such_sandbox"})
"""The gateway answers, and says that the guest does not."""


class RangeNotSatisfiable(CallerError):
    status = 416
    code = "bad_range"
    title = "Range not satisfiable"


class DiskFull(CallerError):
    """The sandbox's own disk: the caller's to mend, waiting does not help."""

    status = 507
    code = "no_space"
    title = "The disk of the sandbox is full"


@contextmanager
def guest_answers(sandbox: Sandbox) -> Iterator[None]:
    """Calls of the guest inside raise errors that the caller may see: 400, 403, 404, 409, 413, 507, or 503 when it
    is silent."""
    try:
        yield
    except GuestError as error:
        raise answer_of(error) from error
    except (GuestUnreachable, DeadlineExceeded) as error:
        raise _silence(sandbox, error) from error


def answer_of(error: GuestError) -> E2AError:
    """The caller's error for what the guest refused; the guest's own faults stay ours."""
    match error.guest_status:
        case 404:
            return NotFound(error.detail, code=error.code)
        case 403:
            return Forbidden(error.detail, code=error.code)
        case 409:
            return Conflict(error.detail, code=error.code)
        case 416:
            return RangeNotSatisfiable(error.detail, code=error.code)
        case 413:
            return TooLarge(error.detail, code=error.code)
        case 507:
            return DiskFull("The disk of the sandbox is full.")
        case 429 | 503:
            return Unavailable(error.detail, code=error.code)
        case status if 400 <= status < 500:
            return CallerError(error.detail, code=error.code)
    return error


def not_running(sandbox: Sandbox) -> Conflict:
    """409 `not_running`, saying what became of it."""
    why = f" ({sandbox.death_reason})" if sandbox.death_reason else ""
    found = Conflict(f"The sandbox does not run, it is {sandbox.state}{why}.", code="not_running")
    found.members = {"reason": sandbox.death_reason} if sandbox.death_reason else {}
    return found


def sandbox_ended(sandbox: Sandbox) -> Conflict:
    """409 `sandbox_ended`: it ended while it was being asked. `reason` is what it died of."""
    found = Conflict(
        f"The sandbox ended ({sandbox.death_reason}). {sandbox.death_detail}".rstrip(), code="sandbox_ended"
    )
    found.members = {"reason": sandbox.death_reason}
    return found


def end_awaited(sandbox: Sandbox, *, wait_seconds: float = END_SECONDS) -> bool:
    """Whether the sandbox has ended, or does so within that time. The instance then says why."""
    give_up_at = time.monotonic() + wait_seconds
    while True:
        sandbox.refresh_from_db(fields=["state", "death_reason", "death_detail"])
        if sandbox.state in (SandboxState.STOPPING, SandboxState.DESTROYED):
            return True
        if time.monotonic() > give_up_at:
            return False
        database_release()
        time.sleep(_LOOK_SECONDS)


def _silence(sandbox: Sandbox, error: E2AError) -> E2AError:
    # A guest dies some moments before its row says so; its caller is told of the end, not of the broken line.
    is_gone = isinstance(error, GuestUnreachable) and error.code in _GONE
    if end_awaited(sandbox, wait_seconds=END_SECONDS if is_gone else 0.0):
        return sandbox_ended(sandbox)
    log.warning("sandbox.silent", sandbox=sandbox.public_id, code=error.code, detail=error.detail)
    return Unavailable("The sandbox does not answer.", code="sandbox_unreachable")

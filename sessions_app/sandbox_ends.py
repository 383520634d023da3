"""A turn whose sandbox died under it: the session ends with the sandbox's reason, never with a broken line."""

from __future__ import annotations

from typing import Final

from e2a.core.errors import E2AError, GuestUnreachable
from sandboxes.guest_answers import end_awaited
from sessions_app.models import Session
from sessions_app.services import session_follow_sandbox

END_SECONDS: Final = 35.0
"""The node looks at each of its sandboxes every 30 s at the latest."""
_NOT_THE_GUEST: Final = frozenset({"gateway_unreachable"})


def ended_with_sandbox(session: Session, error: E2AError) -> bool:
    """Whether `error` came of the sandbox's end. Then the session has ended, with the exits of its tasks.

    Waits for the node's word, up to 35 s, when the guest is out of reach.
    """
    if session.sandbox is None:
        return False
    is_gone = isinstance(error, GuestUnreachable) and error.code not in _NOT_THE_GUEST
    if not end_awaited(session.sandbox, wait_seconds=END_SECONDS if is_gone else 0.0):
        return False
    session_follow_sandbox(session=session, sandbox=session.sandbox)
    return True

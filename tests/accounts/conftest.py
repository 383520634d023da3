"""What sign-in tests share: ways to ask for a code and to sign in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.accounts.mailbox import mailed_code
from tests.fixtures import Api


@pytest.fixture
def anyone() -> Api:
    """A caller without a credential."""
    return Api()


@pytest.fixture
def ask(anyone: Api, db: None) -> Callable[[str], str]:
    """Ask for a code; the login id."""

    def _ask(email: str) -> str:
        answer = anyone.post("/v1/auth/login", {"email": email})
        assert answer.status_code == 200, answer.content
        return str(answer.json()["login_id"])

    return _ask


@pytest.fixture
def attempt(anyone: Api) -> Callable[..., Any]:
    """Try a code; the answer."""

    def _attempt(email: str, code: str, login_id: str | None = None, **kwargs: Any) -> Any:
        body = {"email": email, "code": code} | ({"login_id": login_id} if login_id else {})
        return anyone.post("/v1/auth/verify-otp", body, **kwargs)

    return _attempt


@pytest.fixture
def signed_in(ask: Callable[[str], str], attempt: Callable[..., Any]) -> Callable[[str], dict[str, Any]]:
    """Sign in by code; the answer's body."""

    def _sign_in(email: str) -> dict[str, Any]:
        login_id = ask(email)
        answer = attempt(email, mailed_code(login_id), login_id)
        assert answer.status_code == 200, answer.content
        return dict(answer.json())

    return _sign_in

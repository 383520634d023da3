"""The cast and the ways in: alice owns, bob is her member, mallory is another tenant."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.conf import settings
from django.test import Client


class Api:
    """A JSON client of `/v1` with one credential. Answers are Django's own, with `.json()`."""

    def __init__(self, token: str | None = None) -> None:
        self.client = Client(raise_request_exception=False)
        self.token = token

    def request(
        self, method: str, path: str, body: Any = None, *, headers: dict[str, str] | None = None
    ) -> Any:
        sent = dict(headers or {})
        if self.token is not None:
            sent.setdefault("Authorization", f"Bearer {self.token}")
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.client.generic(method, path, data, content_type="application/json", headers=sent)

    def get(self, path: str, **kwargs: Any) -> Any:
        return self.request("GET", path, **kwargs)

    def post(self, path: str, body: Any = None, **kwargs: Any) -> Any:
        return self.request("POST", path, body, **kwargs)

    def put(self, path: str, body: Any = None, **kwargs: Any) -> Any:
        return self.request("PUT", path, body, **kwargs)

    def patch(self, path: str, body: Any = None, **kwargs: Any) -> Any:
        return self.request("PATCH", path, body, **kwargs)

    def delete(self, path: str, **kwargs: Any) -> Any:
        return self.request("DELETE", path, **kwargs)


@pytest.fixture(autouse=True)
def _empty_redis() -> Iterator[None]:
    """Each test starts with an empty Redis: no rate limit or message of another."""
    from e2a.core.redis_client import redis_client

    redis_client().flushall()
    yield


@pytest.fixture
def api() -> Callable[[str | None], Api]:
    return Api


@pytest.fixture
def alice(db: None) -> Any:
    from accounts.services import user_get_or_create

    return user_get_or_create(address="alice@example.com")


@pytest.fixture
def bob(alice: Any) -> Any:
    from accounts.models import User
    from accounts.services import user_get_or_create

    user = user_get_or_create(address="bob@example.com")
    User.objects.filter(pk=user.pk).update(tenant=alice.tenant)
    user.refresh_from_db()
    return user


@pytest.fixture
def mallory(db: None) -> Any:
    from accounts.services import user_get_or_create

    return user_get_or_create(address="mallory@example.com")


@pytest.fixture
def account_token(db: None) -> Callable[[Any], str]:
    from accounts.tokens import account_token_issue

    return lambda user: account_token_issue(user)[0]


@pytest.fixture
def api_key(db: None) -> Callable[..., str]:
    """A raw API key of that user, all scopes unless given."""
    from keys.services import key_issue

    def issue(user: Any, **kwargs: Any) -> str:
        return key_issue(user=user, **kwargs).key

    return issue


@pytest.fixture
def alice_key(alice: Any, api_key: Callable[..., str]) -> str:
    return api_key(alice)


@pytest.fixture
def mallory_key(mallory: Any, api_key: Callable[..., str]) -> str:
    return api_key(mallory)


@pytest.fixture
def as_alice(alice_key: str) -> Api:
    return Api(alice_key)


@pytest.fixture
def as_mallory(mallory_key: str) -> Api:
    return Api(mallory_key)


@pytest.fixture
def in_production(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if `E2A_ENV=production`: the per-source limits are on."""
    import dataclasses

    monkeypatch.setattr(settings, "E2A", dataclasses.replace(settings.E2A, production=True))


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The whole product on real Docker, once for the run, with a scripted model as the vendor (`live.model`)."""
    from tests.live import LiveStack

    with LiveStack.with_model(tmp_path_factory.mktemp("live")) as stack:
        yield stack

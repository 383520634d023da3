"""What the vault's tests share: a planted value, and what was asked of the background."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from typing import Any

import pytest

SECRETS = "/v1/tenants/me/secrets"
PLANTED = "planted-9f3aQ7-value"
"""Nothing that leaves the vault may hold this."""


@pytest.fixture(autouse=True)
def asked_for(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What the vault enqueued, by name and ids. The tasks themselves are tested where they live."""
    calls: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr("secrets_vault.services.enqueue", lambda name, **ids: calls.append((name, ids)))
    return calls


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """Everything that is logged, as it is written."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.getLogger().handlers[0].formatter)
    logging.getLogger().addHandler(handler)
    yield stream
    logging.getLogger().removeHandler(handler)


@pytest.fixture
def hold(alice: Any) -> Any:
    """Make a session or sandbox of alice a holder, as the other apps do."""
    from secrets_vault.services import bundles_attach

    def attach(holder: str, *names: str) -> None:
        bundles_attach(tenant=alice.tenant, names=names, holder=holder)

    return attach

"""Guests for the tests of this folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.guest.guest import Guest


@pytest.fixture(autouse=True)
def _empty_redis() -> None:
    """No test here speaks with Redis."""


Start = Callable[..., Guest]


@pytest.fixture
def start_guest() -> Iterator[Start]:
    """Start guests; each is ended, and must not have complained."""
    started: list[Guest] = []
    # Not pytest's own: another run of pytest shuts that for every other uid when it starts.
    with tempfile.TemporaryDirectory(prefix="e2a-guest-") as folder:

        def start(*, isolated: bool = False, flags: tuple[str, ...] = ()) -> Guest:
            place = Path(folder, str(len(started)))
            place.mkdir()
            started.append(Guest(place, isolated=isolated, flags=flags))
            return started[-1]

        yield start
        for guest in started:
            guest.close()
    assert [guest.errors for guest in started] == [b""] * len(started)


@pytest.fixture
def guest(start_guest: Start) -> Guest:
    """A guest without isolation: the same code but for the change of uid."""
    return start_guest()


@pytest.fixture
def isolated(start_guest: Start) -> Guest:
    """A guest whose commands have a uid of their own, as in a sandbox."""
    return start_guest(isolated=True)

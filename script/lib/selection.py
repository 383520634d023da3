"""A pytest plugin of script/test: which tests need Docker, and which ones touch the database.

`--without-docker WHY` leaves the Docker tests out and says at the end how many they were and why.
`--only-database` keeps those alone that a second database can make fail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest

DOCKER_FIXTURES: Final = frozenset(
    {"docker_engine", "docker_node", "standard_image", "template_node", "live"}
)
DATABASE_FIXTURES: Final = frozenset({"db", "transactional_db", "live_server"})

_left_out = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("e2a")
    group.addoption("--without-docker", metavar="WHY", help="leave out the tests that need a Docker engine")
    group.addoption("--only-database", action="store_true", help="run only the tests that touch the database")


@pytest.hookimpl(tryfirst=True)  # Before pytest reads the marks for -m.
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if not item.get_closest_marker("docker") and DOCKER_FIXTURES & _fixtures(item):
            item.add_marker("docker")
    if config.getoption("--without-docker"):
        config.stash[_left_out] = _keep(config, items, lambda item: item.get_closest_marker("docker") is None)
    if config.getoption("--only-database"):
        _keep(config, items, _touches_database)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if why := config.getoption("--without-docker"):
        terminalreporter.section("Docker")
        terminalreporter.line(f"{config.stash.get(_left_out, 0)} tests that need Docker were NOT run: {why}.")


def _fixtures(item: pytest.Item) -> frozenset[str]:
    """The fixtures that a test uses, also by way of others."""
    return frozenset(getattr(item, "fixturenames", ()))


def _touches_database(item: pytest.Item) -> bool:
    if item.get_closest_marker("one_database") is not None:
        return False
    return item.get_closest_marker("django_db") is not None or bool(DATABASE_FIXTURES & _fixtures(item))


def _keep(config: pytest.Config, items: list[pytest.Item], is_wanted: Callable[[pytest.Item], bool]) -> int:
    """Drop the tests that are not wanted, and tell pytest. Returns how many they were."""
    dropped = [item for item in items if not is_wanted(item)]
    items[:] = [item for item in items if is_wanted(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
    return len(dropped)

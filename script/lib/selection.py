"""A pytest plugin of script/test: which tests run where, and the proof that none is lost between the parts.

`--without-docker WHY` leaves the Docker tests out and says at the end how many they were and why.
`--only-database` keeps those alone that a second database can make fail.
`--part together` keeps the tests that other tests may run beside, `--part alone` the others: those that start
containers, browsers or the whole product need the machine for themselves. Each test is in exactly one part.
`--tally=FILE` writes down what was wanted and what ran. `python script/lib/selection.py FILE…` adds the parts up.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

DOCKER_FIXTURES: Final = frozenset(
    {"docker_engine", "docker_node", "standard_image", "template_node", "live"}
)
DATABASE_FIXTURES: Final = frozenset({"db", "transactional_db", "live_server"})
ALONE_MARKERS: Final = ("docker", "browser", "alone")

Tally = dict[str, list[str]]
"""Node ids: `without_docker` are left out; `wanted` are of all parts; `ran` and `skipped` are of this part."""

_tally = pytest.StashKey[Tally]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("e2a")
    group.addoption("--without-docker", metavar="WHY", help="leave out the tests that need a Docker engine")
    group.addoption("--only-database", action="store_true", help="run only the tests that touch the database")
    group.addoption("--part", choices=["together", "alone"], help="run only the tests of this part")
    group.addoption("--tally", metavar="FILE", help="write down which tests were wanted and which ran")


def pytest_configure(config: pytest.Config) -> None:
    names = ("without_docker", "wanted", "ran", "skipped")
    config.stash[_tally] = dict[str, list[str]]((name, []) for name in names)
    config.pluginmanager.register(_Tallying(config))


@pytest.hookimpl(tryfirst=True)  # Before pytest reads the marks for -m.
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tally = config.stash[_tally]
    for item in items:
        if not item.get_closest_marker("docker") and DOCKER_FIXTURES & _fixtures(item):
            item.add_marker("docker")
    if config.getoption("--without-docker"):
        tally["without_docker"] = _keep(config, items, lambda item: item.get_closest_marker("docker") is None)
    if config.getoption("--only-database"):
        _keep(config, items, _touches_database)
    tally["wanted"] = _ids(items)
    if part := config.getoption("--part"):
        _keep(config, items, lambda item: _part(item) == part)
        items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if why := config.getoption("--without-docker"):
        terminalreporter.section("Docker")
        count = len(config.stash[_tally]["without_docker"])
        terminalreporter.line(f"{count} tests that need Docker were NOT run: {why}.")


class _Tallying:
    """Keeps the tally. With xdist the workers collect, and tell their controller, which hears every report."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.tally = config.stash[_tally]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or (report.when == "setup" and not report.passed):
            self.tally["skipped" if report.skipped else "ran"].append(report.nodeid)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """A worker has ended. All collect the same, or xdist fails; one that crashed says nothing."""
        self.tally.update(getattr(node, "workeroutput", {}).get("e2a_tally", {}))

    def pytest_sessionfinish(self) -> None:
        output: dict[str, object] | None = getattr(self.config, "workeroutput", None)
        if output is not None:
            output["e2a_tally"] = {name: self.tally[name] for name in ("without_docker", "wanted")}
        elif file := self.config.getoption("--tally"):
            Path(file).write_text(json.dumps(self.tally))


def _ids(items: list[pytest.Item]) -> list[str]:
    return [item.nodeid for item in items]


def _fixtures(item: pytest.Item) -> frozenset[str]:
    """The fixtures that a test uses, also by way of others."""
    return frozenset(getattr(item, "fixturenames", ()))


def _touches_database(item: pytest.Item) -> bool:
    if item.get_closest_marker("one_database") is not None:
        return False
    return item.get_closest_marker("django_db") is not None or bool(DATABASE_FIXTURES & _fixtures(item))


def _part(item: pytest.Item) -> str:
    return "alone" if any(map(item.get_closest_marker, ALONE_MARKERS)) else "together"


def _keep(
    config: pytest.Config, items: list[pytest.Item], is_wanted: Callable[[pytest.Item], bool]
) -> list[str]:
    """Drop the tests that are not wanted, and tell pytest. Returns which they were."""
    dropped = [item for item in items if not is_wanted(item)]
    items[:] = [item for item in items if is_wanted(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
    return _ids(dropped)


def summed(parts: list[Tally]) -> tuple[str, list[str]]:
    """The parts of one whole in a line, and what is wrong: each test must have run, in exactly one of them.

    A skipped test did not run: pytest also skips where a plugin is missing, and calls that a success.
    """
    wanted = set(parts[0]["wanted"])
    times = Counter(name for part in parts for name in part["ran"] + part["skipped"])
    wrong = [f"ran in no part: {name}" for name in sorted(wanted - times.keys())]
    wrong += [f"skipped: {name}" for part in parts for name in part["skipped"]]
    wrong += [f"ran {count} times: {name}" for name, count in sorted(times.items()) if count > 1]
    wrong += [f"ran and is of no part: {name}" for name in sorted(times.keys() - wanted)]
    if any(set(part["wanted"]) != wanted for part in parts):
        wrong.append("the parts did not find the same tests")
    counts = " + ".join(str(len(part["ran"])) for part in parts)
    skipped = sum(len(part["skipped"]) for part in parts)
    without_docker = len(parts[0]["without_docker"])
    line = f"{counts} of {len(wanted)} tests ran; {skipped} skipped, {without_docker} left out for want of Docker"
    return line, wrong


def main(files: list[str]) -> int:
    line, wrong = summed([json.loads(Path(file).read_text()) for file in files])
    print(f"    {line}")
    for each in wrong:
        print(f"    {each}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

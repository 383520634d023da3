"""Measure what the quick benchmark does not, on Docker, in one run: `.venv/bin/python -m bench.more`.

Create and exec at 1, 10 and 30 at once, what 100 idle sandboxes cost, 64 MiB in and out, a terminal's echo; beside each
the same by `docker exec`, `docker cp` and the SDK. Under ten minutes; prints the tables and writes bench/MORE.md.
`--quick`: few samples and 10 idle ones, writes nothing; to see that it works, not to know how fast it is.
"""

from __future__ import annotations

import argparse
import signal
import sqlite3
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench import load
from bench.conditions import conditions, load_average
from bench.load import Load
from bench.measures import standard_image
from bench.product import Caller, Watcher
from bench.report import table, times_table
from bench.samples import Samples
from tests.live import LiveStack, wait_for

RESULTS = Path(__file__).resolve().parent / "MORE.md"
MOST_AT_ONCE = 30
KEYS = 6

NOTES = (
    "A client on the same machine; it, the product and Docker share the CPUs. Of n samples, p99 of fewer than 100 is "
    "the greatest.",
    "A create by the API is over when the row says `running`: limits, a disk of its own, the guest's answer and its "
    "configuration are in it. The pool is off, so all are cold. The SDK's container has the limits and a read-only "
    "root, and neither disk nor guest.",
    "Each sandbox and each container may use half a CPU: 30 at once ask for seven times what two CPUs have.",
    "A file by the API passes web, gateway and guest, and is written to the sandbox's own disk; `docker cp` and the "
    "archives of the SDK write to the container's layer on the host's disk.",
    "CPU is in percent of one CPU, over the time that was watched; PSS divides shared pages by those who share them.",
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of each. `rounds` of creates and execs, `times` in each, `idle` sandboxes watched for `watched` s."""

    parallels: tuple[int, ...] = (1, 10, 30)
    rounds: int = 3
    execs: int = 10
    files: int = 5
    echoes: int = 200
    idle: int = 100
    watched: float = 30.0


QUICK = Plan(parallels=(1, 4), rounds=1, execs=3, files=1, echoes=20, idle=10, watched=3.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m bench.more"
    )
    parser.add_argument("--quick", action="store_true", help="little of each, no MORE.md")
    parser.add_argument("--idle", type=int, help="how many idle sandboxes are watched (100)")
    parser.add_argument("--output", type=Path, help="where the tables go instead of bench/MORE.md")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    plan = QUICK if options.quick else Plan(idle=options.idle or 100)
    text = run(plan)
    output: Path | None = options.output or (None if options.quick else RESULTS)
    print("\n" + text)
    if output is not None:
        output.write_text(text)
        print(f"written to {output}")


def run(plan: Plan) -> str:
    """Measure, and return the document. Raises WrongAnswer or AssertionError when the product does not work."""
    facts = conditions()
    samples = Samples()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="e2a-bench-") as folder:
        say("starting the product")
        environment = {"E2A_POOL": "standard=0", "E2A_MAX_SANDBOXES": "150"}
        with LiveStack(Path(folder), environment=environment) as stack:
            watcher = Watcher(stack.data_dir / "db.sqlite3", 0)
            bench = Load(stack, watcher, _callers(stack), standard_image(watcher), samples)
            for parallel in plan.parallels:
                for done in range(plan.rounds):
                    bench.creates(parallel, keep=done == plan.rounds - 1 and parallel == max(plan.parallels))
                    bench.docker_creates(parallel)
                say(f"creates, {parallel} at once: p50 {samples.median(load.create_name(parallel)):.0f} ms")
            for parallel in plan.parallels:
                for _ in range(plan.rounds):
                    bench.execs(parallel, plan.execs)
                say(f"execs, {parallel} at once: p50 {samples.median(load.exec_name(parallel)):.1f} ms")
            bench.files(plan.files)
            say("files")
            bench.echoes(plan.echoes)
            say("terminal")
            idle = bench.idle(plan.idle, plan.watched)
            say("idle")
        say("stopped")
    facts["Load average after"] = load_average()
    facts["Took"] = f"{(time.monotonic() - began) / 60:.1f} minutes with start and stop"
    return document(facts, samples, idle, (*NOTES, *bench.notes), plan)


def document(
    facts: dict[str, str],
    samples: Samples,
    idle: dict[str, tuple[float, float]],
    notes: tuple[str, ...],
    plan: Plan,
) -> str:
    """The whole of MORE.md."""
    ratios = [(name, f"{samples.median(above) / samples.median(below):.2f}") for name, above, below in pairs(plan)
              if above in samples.values and below in samples.values]  # fmt: skip
    parts = [
        "# Measured: many at once, many idle, great files, a terminal",
        "Written by `.venv/bin/python -m bench.more`.",
        "## Conditions",
        "\n".join(f"- {name}: {value}" for name, value in facts.items()),
        "## Times",
        times_table(samples.summaries()),
        "## Ratios of the medians",
        table(("", "times"), ratios),
        "## Idle",
        table(
            ("", "MB PSS", "% of a CPU"),
            [(name, f"{pss:.1f}", f"{cpu:.2f}") for name, (pss, cpu) in idle.items()],
        ),
        "## How to read it",
        "\n".join(f"- {note}" for note in notes),
    ]
    return "\n\n".join(parts) + "\n"


def pairs(plan: Plan) -> list[tuple[str, str, str]]:
    """(what, above, below): how many times as long the upper takes."""
    found: list[tuple[str, str, str]] = []
    for parallel in plan.parallels:
        at = f"{parallel} at once"
        create, sdk = load.create_name(parallel), load.docker_create_name(parallel)
        found.append((f"create by the API : create and start by the SDK, {at}", create, sdk))
        done, docker_exec = load.exec_name(parallel), load.docker_exec_name(parallel)
        found.append((f"docker exec : exec by the API, {at}", docker_exec, done))
    for way, directions in (
        ("docker cp", ("in", "out")), ("put_archive by the SDK", ("in",)), ("get_archive by the SDK", ("out",)),
    ):  # fmt: skip
        for direction in directions:
            ours = load.file_name("by the API", direction)
            found.append((f"{way} : by the API, 64 MiB {direction}", load.file_name(way, direction), ours))
    found.append(("docker exec -t : terminal, echo", load.ECHO_DOCKER, load.ECHO))
    return found


def _callers(stack: LiveStack) -> list[Caller]:
    """As many clients as are at once, each with a connection of its own; a key may call 600 times a minute."""
    account = stack.sign_in("bench@example.com")
    with sqlite3.connect(stack.data_dir / "db.sqlite3", timeout=30) as database:
        database.execute("UPDATE accounts_tenant SET max_live_sandboxes = 150")
    made = [stack.request("POST", "/v1/api-keys", {}, token=account).json() for _ in range(KEYS)]
    keys = [str(one["key"]) for one in made]
    wait_for(lambda: stack.request("GET", "/readyz").status == 200, what="the product is ready")
    return [Caller(stack, keys[number % KEYS]) for number in range(MOST_AT_ONCE)]


def say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


if __name__ == "__main__":
    main()

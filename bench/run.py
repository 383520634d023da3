"""Measure the whole product on this machine, on Docker, in one run: `.venv/bin/python -m bench`.

Starts a stack of its own in a temporary folder, takes all measures in turns for about four minutes, stops the
stack, removes its containers, prints the tables and writes bench/RESULTS.md. `--quick`: half a minute, writes
nothing; to see that it works, not to know how fast it is.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import measures
from bench.conditions import conditions, load_average
from bench.docker_side import RawDocker
from bench.measures import BUNDLE, SECRET, Bench
from bench.product import Caller, Watcher, stack_for_bench, watcher_of
from bench.report import Goal, document
from bench.samples import Samples
from tests.live import LiveStack

RESULTS = Path(__file__).resolve().parent / "RESULTS.md"
POOL_SIZE = 8
KEYS = 3

NOTES = (
    "A client on the same machine, one thing at a time; all processes of the product share the CPUs with it.",
    "Before each create the pool is full and no container is being made or removed; creates that came cold would "
    "not be in the times.",
    "p99 of fewer than 100 samples is the greatest of them.",
    "`docker exec` and `docker run` use the sandbox's image without network, limits or a disk of its own, in "
    "Docker's favour.",
    "The guest runs in a container with half a CPU; `posix_spawn` on the host has a whole one.",
    "PSS divides shared pages by those who share them: with fewer containers on the host each counts for more. "
    "dockerd and containerd are not counted.",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m bench"
    )
    parser.add_argument("--quick", action="store_true", help="two rounds, a pool of two, no RESULTS.md")
    parser.add_argument("--minutes", type=float, default=4.0, help="no new round after so long (4)")
    parser.add_argument("--output", type=Path, help="where the tables go instead of bench/RESULTS.md")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    output: Path | None = options.output or (None if options.quick else RESULTS)
    text = run(
        pool_size=2 if options.quick else POOL_SIZE,
        minutes=options.minutes,
        rounds=2 if options.quick else 1000,
    )
    print("\n" + text)
    if output is not None:
        output.write_text(text)
        print(f"written to {output}")


def run(*, pool_size: int, minutes: float, rounds: int) -> str:
    """Measure, and return the document. Raises WrongAnswer or AssertionError when the product does not work."""
    facts = conditions()
    samples = Samples()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="e2a-bench-") as folder:
        say("starting the product")
        with stack_for_bench(Path(folder), pool_size=pool_size) as stack:
            watcher = watcher_of(stack, pool_size=pool_size)
            watcher.wait_settled()
            with RawDocker(measures.standard_image(watcher)) as raw:
                bench = bench_on(stack, watcher, samples, raw)
                bench.prepare()
                done = play(bench, rounds=rounds, until=time.monotonic() + minutes * 60)
                memory = bench.memory()
        say("stopped")
    facts["Load average after"] = load_average()
    facts["Pool"] = f"{pool_size} parked; {bench.warm} creates came warm, {bench.cold} cold"
    facts["Rounds"] = f"{done}, in {(time.monotonic() - began) / 60:.1f} minutes with start and stop"
    summaries = samples.summaries()
    return document(
        conditions=facts,
        summaries={name: summaries[name] for name in measures.ORDER if name in summaries},
        ratios=ratios_of(samples),
        memory=memory,
        goals=goals_of(samples, parked_megabytes=memory["one parked sandbox with its shim"][0]),
        notes=NOTES,
    )


def bench_on(stack: LiveStack, watcher: Watcher, samples: Samples, raw: RawDocker) -> Bench:
    """An account with keys and a bundle, on a stack that runs."""
    account = stack.sign_in("bench@example.com")
    keys = [
        str(stack.request("POST", "/v1/api-keys", {}, token=account).json()["key"]) for _ in range(KEYS + 1)
    ]
    callers = tuple(Caller(stack, key) for key in keys[:KEYS])
    bundle = {"name": BUNDLE, "values": {"BENCH_SECRET": SECRET, "BENCH_OTHER": SECRET[::-1]}}
    callers[0].call("POST", "/v1/tenants/me/secrets", bundle, wants=201)
    return Bench(stack, watcher, samples, callers, Caller(stack, keys[KEYS], keep_alive=False), raw)


def play(bench: Bench, *, rounds: int, until: float) -> int:
    """All measures in turns, in another order each round, until `until` (monotonic); returns the rounds."""
    order: list[Callable[[], Any]] = [
        lambda: bench.creates(keep_alive=True),
        lambda: bench.creates(keep_alive=False),
        lambda: bench.execs(10),
        lambda: bench.guests(20),
        bench.docker_run,
    ]
    shuffled = random.Random(1)
    for done in range(rounds):
        if time.monotonic() > until:
            return done
        shuffled.shuffle(order)
        for measure in order:
            measure()
        say(progress(done + 1, bench.samples))
    return rounds


def progress(done: int, samples: Samples) -> str:
    shown = {
        "create": measures.CREATE_KEPT,
        "first output": measures.FIRST_OUTPUT,
        "exec": measures.EXEC_ARGV,
        "docker exec": measures.DOCKER_EXEC,
        "guest": measures.GUEST_DIRECT,
        "posix_spawn": measures.SPAWN,
    }
    medians = [f"{name} {samples.median(key):.1f}" for name, key in shown.items() if key in samples.values]
    return f"round {done}: p50 in ms: " + ", ".join(medians)


def ratios_of(samples: Samples) -> dict[str, float]:
    """Which of two takes how many times as long, by their medians."""
    pairs = {
        "docker exec : exec by the API": (measures.DOCKER_EXEC, measures.EXEC_ARGV),
        "docker exec : exec by the API, by bash": (measures.DOCKER_EXEC, measures.EXEC_COMMAND),
        "docker exec : exec by the API, bundle attached": (measures.DOCKER_EXEC, measures.EXEC_SECRETS),
        "docker run : create to first output": (measures.DOCKER_RUN, measures.FIRST_OUTPUT),
        "guest exec on its socket : posix_spawn": (measures.GUEST_DIRECT, measures.SPAWN),
        "guest exec through the gateway : posix_spawn": (measures.GUEST_GATEWAY, measures.SPAWN),
    }
    return {name: samples.median(above) / samples.median(below) for name, (above, below) in pairs.items()}


def goals_of(samples: Samples, *, parked_megabytes: float) -> list[Goal]:
    """The numbers that issue 2 promises."""
    faster = samples.median(measures.DOCKER_EXEC) / samples.median(measures.EXEC_ARGV)
    slower = samples.median(measures.GUEST_DIRECT) / samples.median(measures.SPAWN)
    return [
        Goal("warm create, kept connection, p50", samples.median(measures.CREATE_KEPT), 40, "ms"),
        Goal("warm create, fresh connection, p50", samples.median(measures.CREATE_FRESH), 40, "ms"),
        Goal("create to first output, p50", samples.median(measures.FIRST_OUTPUT), 90, "ms"),
        Goal("exec by the API against docker exec, p50", faster, 4, "times as fast", at_least=True),
        Goal("guest exec against posix_spawn, p50", slower, 2, "times as long"),
        Goal("one parked sandbox with its shim", parked_megabytes, 16, "MB PSS"),
    ]


def say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)

"""What one hostile sandbox costs its neighbour: `.venv/bin/python -m bench.neighbours`.

Starts a stack of its own on Docker. For each attack, in turns: the neighbour's `exec` is timed while the attacker
idles, then while it attacks, over and over in one run; what counts is the ratio of the two p95, since both saw the
same machine. Writes bench/NEIGHBOURS.md. `--quick`: one round, prints only.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.attacks import ALL, SECONDS
from bench.conditions import conditions, load_average
from bench.product import Caller, WrongAnswer, check, stack_for_bench, watcher_of
from tests.live import LiveStack

REPORT = Path(__file__).resolve().parent / "NEIGHBOURS.md"
GOAL = 2.0
ROUNDS = 4
BEGUN_SECONDS = 1.0
"""After so long the attack is in full swing."""
PAUSE_SECONDS = 0.03
KEYS = 4
"""Each may call 600 times a minute."""


@dataclass(slots=True)
class Felt:
    """The neighbour's times in ms, and what the attack did to the host."""

    idle: list[float] = field(default_factory=list)
    attacked: list[float] = field(default_factory=list)
    answers: set[str] = field(default_factory=set)
    disk_mib: float = 0.0

    def ratio(self, percent: int) -> float:
        return percentile(self.attacked, percent) / percentile(self.idle, percent)


def percentile(values: Sequence[float], percent: int) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


class Street:
    """Two sandboxes of one stack, the attacker's and the neighbour's."""

    def __init__(self, stack: LiveStack) -> None:
        account = stack.sign_in("neighbours@example.com")
        keys = [
            str(stack.request("POST", "/v1/api-keys", {}, token=account).json()["key"]) for _ in range(KEYS)
        ]
        self.stack = stack
        self._callers = [Caller(stack, key) for key in keys[1:]]
        self._attacker_key = keys[0]
        self._turn = 0
        made = [self.caller().call("POST", "/v1/sandboxes", {}, wants=201) for _ in range(2)]
        check(all(one["state"] == "running" for one in made), made)
        self.attacker, self.neighbour = (str(one["sandbox_id"]) for one in made)

    def caller(self) -> Caller:
        self._turn += 1
        return self._callers[self._turn % len(self._callers)]

    def neighbour_times(self, until: float) -> list[float]:
        """One `exec` after another until then, spaced; each must answer right."""
        took = []
        while time.monotonic() < until:
            caller = self.caller()
            began = time.perf_counter()
            answer = caller.call(
                "POST", f"/v1/sandboxes/{self.neighbour}/exec", {"argv": ["/bin/echo", "here"]}, wants=200
            )
            took.append((time.perf_counter() - began) * 1000)
            check((answer["exit_code"], answer["stdout"]) == (0, "here\n"), answer)
            time.sleep(PAUSE_SECONDS)
        return took

    def attack(self, argv: list[str], told: list[str]) -> None:
        """Run it to its end; `told` gets what the attacker is answered."""
        body = {"argv": argv, "timeout_seconds": SECONDS + 4}
        answer = self.stack.request(
            "POST", f"/v1/sandboxes/{self.attacker}/exec", body, token=self._attacker_key, timeout=60
        )
        document = answer.json()
        told.append(
            f"exit {document['exit_code']}{', out of memory' if document['oom'] else ''}"
            if answer.status == 200
            else str(document["code"])
        )

    def tidy(self) -> None:
        """Empty the attacker's disk, and see that it can still be used."""
        body = {"command": "rm -rf /workspace/* && echo alive", "timeout_seconds": 120}
        answer = self.stack.request(
            "POST", f"/v1/sandboxes/{self.attacker}/exec", body, token=self._attacker_key, timeout=150
        )
        if answer.status != 200 or answer.json()["stdout"] != "alive\n":
            raise WrongAnswer(f"the attacker is of no use any more: {answer.body!r}")


def measure(street: Street, felt: Felt, argv: list[str]) -> None:
    """One idle spell and one attack."""
    felt.idle += street.neighbour_times(time.monotonic() + SECONDS - BEGUN_SECONDS)
    before = _disk_used(street.stack.data_dir)
    told: list[str] = []
    thread = threading.Thread(target=street.attack, args=(argv, told))
    thread.start()
    time.sleep(BEGUN_SECONDS)
    felt.attacked += street.neighbour_times(time.monotonic() + SECONDS - BEGUN_SECONDS)
    felt.disk_mib = max(felt.disk_mib, (_disk_used(street.stack.data_dir) - before) / 2**20)
    thread.join(90)
    felt.answers |= set(told or ["no answer"])
    street.tidy()


def _disk_used(folder: Path) -> int:
    """Bytes of the host's disk below `folder`: of the sparse images what is really there."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("disk.img"))


def report(facts: dict[str, str], felt: dict[str, Felt]) -> str:
    rows = [
        "| attack | idle p50 | idle p95 | attacked p50 | attacked p95 | p95 ratio | < 2? | attacker is told | disk |",
        "|---|--:|--:|--:|--:|--:|---|---|--:|",
    ]
    for name, one in felt.items():
        numbers = [percentile(values, p) for values in (one.idle, one.attacked) for p in (50, 95)]
        ratio = one.ratio(95)
        rows.append(
            f"| {name} | "
            + " | ".join(f"{number:.1f}" for number in numbers)
            + f" | {ratio:.2f} | {'yes' if ratio < GOAL else '**no**'} | {'; '.join(sorted(one.answers))}"
            + f" | {one.disk_mib:.0f} MiB |"
        )
    lines = ["# What a hostile sandbox costs its neighbour", "", *(str(__doc__).split("\n\n")[1:]), ""]
    lines += ["Times in ms of `exec` of `/bin/echo` by the API in the neighbour.", "", *rows, ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.neighbours")
    parser.add_argument("--quick", action="store_true", help="one round, prints only")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", action="append", choices=sorted(ALL), help="these attacks only")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    chosen = {name: argv for name, argv in ALL.items() if not options.only or name in options.only}
    rounds = 1 if options.quick else options.rounds
    facts = conditions()
    felt = {name: Felt() for name in chosen}
    with (
        tempfile.TemporaryDirectory(prefix="e2a-bench-") as folder,
        stack_for_bench(Path(folder), pool_size=2) as stack,
    ):
        watcher_of(stack, pool_size=2).wait_settled()
        street = Street(stack)
        for number in range(rounds):
            for name, argv in chosen.items():
                measure(street, felt[name], argv)
                print(f"round {number + 1}: {name}: p95 × {felt[name].ratio(95):.2f}", flush=True)
    facts["Load average after"] = load_average()
    facts["Rounds"] = f"{rounds}; {min(len(one.attacked) for one in felt.values())} samples or more a cell"
    facts["CPUs"] = str(os.cpu_count())
    text = report(facts, felt)
    print("\n" + text)
    if not options.quick and not options.only:
        REPORT.write_text(text)


if __name__ == "__main__":
    main()

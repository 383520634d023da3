"""What the benchmark says of its samples is true. Nothing here is timed."""

from __future__ import annotations

import os

import pytest

from bench.memory import megabytes, parents, with_descendants
from bench.report import Goal, document, goals_table, table, times_table
from bench.samples import Samples, percentile, summary


def test_a_percentile_is_a_value_that_was_measured() -> None:
    ordered = [float(value) for value in range(1, 101)]
    assert [percentile(ordered, share) for share in (0.5, 0.95, 0.99, 1.0)] == [50.0, 95.0, 99.0, 100.0]
    assert percentile([7.0], 0.5) == percentile([7.0], 0.99) == 7.0
    assert percentile([1.0, 2.0, 3.0], 0.5) == 2.0


def test_of_few_samples_p99_is_the_greatest() -> None:
    found = summary([3.0, 1.0, 2.0])
    assert (found.count, found.p50, found.p95, found.p99) == (3, 2.0, 3.0, 3.0)


def test_nothing_is_said_of_no_samples() -> None:
    with pytest.raises(ValueError, match="no values"):
        summary([])


def test_what_failed_is_not_among_the_times() -> None:
    samples = Samples()
    with pytest.raises(RuntimeError, match="wrong"), samples.timed("failing"):
        raise RuntimeError("wrong")
    assert samples.time_call("answering", lambda: "answer") == "answer"
    assert list(samples.summaries()) == ["answering"]
    assert samples.values["answering"][0] >= 0


def test_a_goal_is_met_at_its_limit_in_its_own_direction() -> None:
    assert Goal("fast", 40.0, 40, "ms").is_met
    assert not Goal("fast", 40.1, 40, "ms").is_met
    assert Goal("ratio", 4.0, 4, "times", at_least=True).is_met
    assert not Goal("ratio", 3.9, 4, "times", at_least=True).is_met
    shown = goals_table([Goal("fast", 50.0, 40, "ms"), Goal("ratio", 5.0, 4, "times", at_least=True)])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines()[2:]]
    assert rows == [
        ["fast", "≤ 40 ms", "50.0 ms", "NOT MET"],
        ["ratio", "≥ 4 times", "5.00 times", "met"],
    ]


def test_a_table_is_markdown_with_numbers_to_the_right() -> None:
    assert table(("Name", "n"), [("a", "1"), ("long name", "20")]).splitlines() == [
        "| Name      |  n |",
        "| --------- | -: |",
        "| a         |  1 |",
        "| long name | 20 |",
    ]


def test_times_have_the_digits_that_mean_something() -> None:
    shown = times_table({"one": summary([1.234]), "two": summary([45.67]), "three": summary([678.9])})
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines()[2:]]
    assert cells == [
        ["one", "1", "1.23", "1.23", "1.23"],
        ["two", "1", "45.7", "45.7", "45.7"],
        ["three", "1", "679", "679", "679"],
    ]


def test_the_document_holds_conditions_goals_and_tables() -> None:
    text = document(
        conditions={"CPU": "one"},
        summaries={"create": summary([1.0, 2.0])},
        ratios={"a : b": 2.5},
        memory={"web": (10.0, 5.0)},
        goals=[Goal("create", 2.0, 40, "ms")],
        notes=["note"],
    )
    assert "- CPU: one" in text
    assert "| create " in text
    assert "2.50 |" in text
    assert "| web | 10.0 |     5.0 |" in text
    assert "- note" in text
    assert text.endswith("\n")


def test_memory_is_what_the_kernel_says_of_living_processes() -> None:
    me = os.getpid()
    assert me in with_descendants(os.getppid(), parents())
    pss, private = megabytes([me])
    assert pss >= private > 1
    assert megabytes([2**22 + 1]) == (0.0, 0.0)

"""Many calls at the same moment, each in a thread with database connections of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from django.db import connections

Answer = TypeVar("Answer")
LIMIT_SECONDS = 120


def at_once(count: int, call: Callable[[int], Answer]) -> list[Answer]:
    """`call(0)` … `call(count - 1)`, released by a barrier; the answers in order. An error is raised here."""
    barrier = threading.Barrier(count)
    answers: dict[int, Answer] = {}
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            barrier.wait(LIMIT_SECONDS)
            answers[number] = call(number)
        except BaseException as error:
            errors.append(error)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_SECONDS)
    if errors:
        raise errors[0]
    assert len(answers) == count, f"{count - len(answers)} calls not done after {LIMIT_SECONDS} s"
    return [answers[number] for number in range(count)]

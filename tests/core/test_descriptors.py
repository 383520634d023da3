"""How many descriptors a process that serves has."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "holds"),
    [(256, 1024, 512, 512), (256, 1024, 4096, 1024), (1000, 1024, 512, 1000)],
)
def test_the_limit_is_raised_as_far_as_it_may_be_and_never_lowered(
    soft: int, hard: int, wanted: int, holds: int
) -> None:
    """In a process of its own: a hard limit cannot be raised again."""
    source = (
        "import resource; from e2a.core.descriptors import descriptors_raise; "
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard})); "
        f"print(descriptors_raise({wanted}), *resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    said = subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, text=True).stdout
    assert said.split() == [str(holds), str(holds), str(hard)]

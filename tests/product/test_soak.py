"""The short form of `python -m bench.soak`: made and removed again and again, nothing stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.soak import soak

pytestmark = [pytest.mark.docker, pytest.mark.timeout(500)]


def test_after_forty_creates_and_deletes_nothing_is_left(tmp_path: Path) -> None:
    outcome = soak(tmp_path, count=40)
    assert outcome.made == 40
    assert outcome.reasons == {"user": 40}
    assert outcome.left_over == []
    assert outcome.new_volumes == []

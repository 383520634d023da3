"""List prices, against sums done by hand."""

from __future__ import annotations

from decimal import Decimal

import pytest

from sessions_app.llm.base import Usage
from sessions_app.llm.pricing import cost_usd

MILLION = 1_000_000


@pytest.mark.parametrize(
    ("model", "usage", "dollars"),
    [
        ("claude-sonnet-4-5", Usage(MILLION, MILLION), "18"),
        ("claude-sonnet-4-5-20250929", Usage(input_tokens=1000, output_tokens=100), "0.0045"),
        ("claude-sonnet-5-5", Usage(0, 0, MILLION, MILLION), "2.60"),
        ("claude-opus-5-5", Usage(MILLION, MILLION, MILLION, MILLION), "29.20"),
        ("claude-opus-4-1-20250805", Usage(MILLION, 0), "15"),
        ("claude-sonnet-4-0", Usage(MILLION, 0), "3"),
        ("claude-haiku-4-5", Usage(0, 0, 0, MILLION), "1.25"),
        ("claude-haiku-5-5", Usage(100_000, 1000), "0.0105"),
        ("claude-haiku-5-5", Usage(50_000, 1000, 50_001), "0.03000005"),
        ("claude-fable-5", Usage(1, 1), "0.00006"),
        ("claude-opus-5", Usage(), "0"),
    ],
)
def test_the_cost_of_a_call(model: str, usage: Usage, dollars: str) -> None:
    assert cost_usd(model, usage) == Decimal(dollars)


@pytest.mark.parametrize(
    "model", ["", "gpt-9", "claude-scripted-1", "claude-sonnet-9", "anthropic/claude-opus-5"]
)
def test_the_cost_of_an_unknown_model_is_unknown(model: str) -> None:
    assert cost_usd(model, Usage(1, 1)) is None


def test_usage_adds_up() -> None:
    assert Usage(1, 2, 3, 4) + Usage(10, 20, 30, 40) == Usage(11, 22, 33, 44)

"""What a call costs, in US dollars.

Source: https://platform.claude.com/docs/en/about-claude/pricing and the model pages below
https://platform.claude.com/docs/en/models, as of October 2026 (newest: Haiku 5.5 of 7 October 2026, and the
cut of Sonnet 5.5's cache reads of the same day). Standard tier; a cache write of the 5-minute kind, the only
one we make, costs 1.25 times the input. Discounts, batches and regional surcharges are not known here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from sessions_app.llm.base import Usage

_MILLION = Decimal(1_000_000)
_CACHE_WRITE = Decimal("1.25")
_DATE_OR_ALIAS = re.compile(r"-(?:20[0-9]{6}|20[0-9]{2}-[0-9]{2}-[0-9]{2}|latest|0)$")


@dataclass(frozen=True, slots=True)
class Price:
    """Dollars for a million tokens."""

    input: Decimal
    output: Decimal
    cache_read: Decimal

    @classmethod
    def of(cls, dollars_input: str, dollars_output: str, cache_read: str) -> Price:
        return cls(Decimal(dollars_input), Decimal(dollars_output), Decimal(cache_read))


_PRICES: dict[str, Price] = {
    "claude-fable-5-1": Price.of("10", "50", "0.25"),
    "claude-mythos-5-1": Price.of("10", "50", "0.25"),
    "claude-fable-5": Price.of("10", "50", "1"),
    "claude-mythos-5": Price.of("10", "50", "1"),
    "claude-opus-5-5": Price.of("4", "20", "0.20"),
    "claude-opus-5": Price.of("5", "25", "0.50"),
    "claude-opus-4-8": Price.of("5", "25", "0.50"),
    "claude-opus-4-7": Price.of("5", "25", "0.50"),
    "claude-opus-4-6": Price.of("5", "25", "0.50"),
    "claude-opus-4-5": Price.of("5", "25", "0.50"),
    "claude-opus-4-1": Price.of("15", "75", "1.50"),
    "claude-opus-4": Price.of("15", "75", "1.50"),
    "claude-sonnet-5-5": Price.of("2", "10", "0.10"),
    "claude-sonnet-5": Price.of("2", "10", "0.20"),
    "claude-sonnet-4-6": Price.of("3", "15", "0.30"),
    "claude-sonnet-4-5": Price.of("3", "15", "0.30"),
    "claude-sonnet-4": Price.of("3", "15", "0.30"),
    "claude-haiku-5-5": Price.of("0.10", "0.50", "0.01"),
    "claude-haiku-4-5": Price.of("1", "5", "0.10"),
    "gpt-5.5": Price.of("5", "30", "0.50"),
    "gpt-5.5-pro": Price.of("30", "180", "30"),
    "gpt-5.4": Price.of("2.50", "15", "0.25"),
    "gpt-5.4-pro": Price.of("30", "180", "30"),
    "gpt-5.4-mini": Price.of("0.75", "4.50", "0.075"),
    "gpt-5.4-nano": Price.of("0.20", "1.25", "0.02"),
    "gpt-5.3-codex": Price.of("1.75", "14", "0.175"),
    "gpt-5.2-codex": Price.of("1.75", "14", "0.175"),
    "gpt-5.2": Price.of("1.75", "14", "0.175"),
    "gpt-5.1-codex-max": Price.of("1.25", "10", "0.125"),
    "gpt-5.1-codex": Price.of("1.25", "10", "0.125"),
    "gpt-5.1": Price.of("1.25", "10", "0.125"),
    "gpt-5-codex": Price.of("1.25", "10", "0.125"),
    "gpt-5": Price.of("1.25", "10", "0.125"),
}
_LONG_PROMPTS: dict[str, tuple[int, Price]] = {
    "claude-haiku-5-5": (100_000, Price.of("0.50", "2.50", "0.05")),
}
"""From more than so many tokens in the prompt, cached ones included, every token of the call costs this."""


def cost_usd(model: str, usage: Usage) -> Decimal | None:
    """The list price of one call, or None for a model whose price is not known."""
    family = _DATE_OR_ALIAS.sub("", model)
    price = _PRICES.get(family)
    if price is None:
        return None
    prompt = usage.input_tokens + usage.cache_read_tokens + usage.cache_write_tokens
    if family in _LONG_PROMPTS and prompt > _LONG_PROMPTS[family][0]:
        price = _LONG_PROMPTS[family][1]
    total = (
        price.input * usage.input_tokens
        + price.input * _CACHE_WRITE * usage.cache_write_tokens
        + price.cache_read * usage.cache_read_tokens
        + price.output * usage.output_tokens
    )
    return total / _MILLION

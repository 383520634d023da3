"""What model calls cost: the ledger, the counters that follow from it, and whether a budget is spent."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from django.db.models import F

from e2a.core.clock import now
from sessions_app.llm.base import Usage
from sessions_app.llm.pricing import cost_usd
from sessions_app.models import ModelCall, Session, Task


@dataclass(frozen=True, slots=True)
class Spent:
    """One model call's bill. `cost` is `None` for a model whose price is not known."""

    model: str
    usage: Usage
    cost: Decimal | None

    @classmethod
    def of(cls, model: str, usage: Usage) -> Spent:
        return cls(model, usage, cost_usd(model, usage))

    @property
    def prompt_tokens(self) -> int:
        """Input as users see it: what was sent and not read from the vendor's cache."""
        return self.usage.input_tokens + self.usage.cache_write_tokens

    def as_frame(self) -> dict[str, Any]:
        """The fields of a `usage` frame."""
        return {
            "input_tokens": self.prompt_tokens,
            "output_tokens": self.usage.output_tokens,
            "cache_read_tokens": self.usage.cache_read_tokens,
            "cost_usd": None if self.cost is None else str(self.cost),
            "model": self.model,
        }


def call_enter(
    *,
    tenant_pk: int,
    sandbox_id: str,
    vendor: str,
    spent: Spent,
    session_pk: int | None = None,
    task_pk: int | None = None,
    status: int = 200,
    is_whole: bool = True,
    duration_ms: int = 0,
) -> None:
    """Write a call into the ledger, and add it to its session and task. To be run inside a transaction.

    `is_whole`: the answer came to its end; what a call that broke had cost is entered as far as it is known.
    """
    ModelCall.objects.create(
        tenant_id=tenant_pk,
        session_id=session_pk,
        task_id=task_pk,
        sandbox_id=sandbox_id,
        vendor=vendor,
        model=spent.model[:128],
        status=status,
        is_whole=is_whole,
        input_tokens=spent.prompt_tokens,
        output_tokens=spent.usage.output_tokens,
        cache_read_tokens=spent.usage.cache_read_tokens,
        cost_usd=spent.cost,
        duration_ms=duration_ms,
        ended_at=now(),
    )
    if session_pk is not None:
        Session.objects.filter(pk=session_pk).update(
            input_tokens=F("input_tokens") + spent.prompt_tokens,
            output_tokens=F("output_tokens") + spent.usage.output_tokens,
            cache_read_tokens=F("cache_read_tokens") + spent.usage.cache_read_tokens,
            cost_usd=F("cost_usd") + (spent.cost or Decimal(0)),
        )
    if task_pk is not None:
        so_far = Task.objects.values_list("usage", flat=True).get(pk=task_pk)
        Task.objects.filter(pk=task_pk).update(
            usage={
                "input_tokens": so_far.get("input_tokens", 0) + spent.prompt_tokens,
                "output_tokens": so_far.get("output_tokens", 0) + spent.usage.output_tokens,
                "cache_read_tokens": so_far.get("cache_read_tokens", 0) + spent.usage.cache_read_tokens,
                "cost_usd": str(Decimal(so_far.get("cost_usd", "0")) + (spent.cost or Decimal(0))),
            }
        )


def budget_spent(session: Session) -> str:
    """Why the budget allows no further call; empty when it does. Reads the row: PATCH may have raised it."""
    row = Session.objects.only("budget", "input_tokens", "output_tokens", "cost_usd").get(pk=session.pk)
    return over_budget(row.budget or {}, row.input_tokens + row.output_tokens, row.cost_usd)


def over_budget(budget: dict[str, Any], tokens: int, cost: Decimal) -> str:
    """The same of values that were read already."""
    if budget.get("max_tokens") is not None and tokens >= budget["max_tokens"]:
        return f"{tokens} tokens of {budget['max_tokens']} are spent; PATCH the session's budget to go on."
    if budget.get("max_usd") is not None and cost >= Decimal(str(budget["max_usd"])):
        return f"${cost:.4f} of ${budget['max_usd']} are spent; PATCH the session's budget to go on."
    return ""

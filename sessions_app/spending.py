"""Whether a budget is spent."""

from __future__ import annotations

from decimal import Decimal

from sessions_app.models import Session


def budget_spent(session: Session) -> str:
    """Why the budget allows no further call; empty when it does. Reads the row: PATCH may have raised it."""
    row = Session.objects.only("budget", "input_tokens", "output_tokens", "cost_usd").get(pk=session.pk)
    budget = row.budget or {}
    tokens = row.input_tokens + row.output_tokens
    if budget.get("max_tokens") is not None and tokens >= budget["max_tokens"]:
        return f"{tokens} tokens of {budget['max_tokens']} are spent; PATCH the session's budget to go on."
    if budget.get("max_usd") is not None and row.cost_usd >= Decimal(str(budget["max_usd"])):
        return f"${row.cost_usd:.4f} of ${budget['max_usd']} are spent; PATCH the session's budget to go on."
    return ""

"""What happens at the same moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.db import transaction

from accounts.models import Tenant
from e2a.core.errors import QuotaExceeded
from sandboxes.claims import sandbox_claim
from sandboxes.lifecycle import sandbox_end
from sandboxes.models import DeathReason, Node, Sandbox, SandboxMove, SandboxState
from sandboxes.pool import pool_end
from sandboxes.services import sandbox_create, sandbox_destroy
from tests.sandboxes.running import at_once, standard

pytestmark = pytest.mark.django_db(transaction=True)


def claim(tenant: Tenant) -> Sandbox | None:
    with transaction.atomic():
        return sandbox_claim(standard(), tenant=tenant)


def test_twenty_claims_of_twenty_parked_ones_get_one_each(
    alice: Any, parked_row: Callable[[], Sandbox]
) -> None:
    parked = {parked_row().pk for _ in range(20)}
    claimed = at_once(20, lambda _: claim(alice.tenant))
    assert {row.pk for row in claimed if isinstance(row, Sandbox)} == parked


def test_twenty_claims_of_three_parked_ones_give_three(alice: Any, parked_row: Callable[[], Sandbox]) -> None:
    parked = {parked_row().pk for _ in range(3)}
    claimed = at_once(20, lambda _: claim(alice.tenant))
    assert sorted(row.pk for row in claimed if isinstance(row, Sandbox)) == sorted(parked)
    assert claimed.count(None) == 17
    assert SandboxMove.objects.filter(to_state="booting").count() == 3


def test_a_claim_and_the_pool_that_shrinks_never_both_win(
    alice: Any, parked_row: Callable[[], Sandbox]
) -> None:
    for _ in range(10):
        row = parked_row()
        stale = Sandbox.objects.get(pk=row.pk)

        def either(number: int, stale: Sandbox = stale) -> Sandbox | bool | None:
            return claim(alice.tenant) if number else pool_end(stale, why="test")

        won = at_once(2, either)
        row.refresh_from_db()
        assert (won[0], won[1] is None) in [(True, True), (False, False)]
        assert row.state == (SandboxState.STOPPING if won[0] else SandboxState.BOOTING)


def test_fifty_creates_within_a_quota_of_five_make_five(alice: Any, node_row: Node) -> None:
    Tenant.objects.filter(pk=alice.tenant.pk).update(max_live_sandboxes=5)
    answers = at_once(50, lambda _: sandbox_create(tenant=alice.tenant, template_name="standard"))
    made = [answer for answer in answers if isinstance(answer, Sandbox)]
    refused = [answer for answer in answers if isinstance(answer, QuotaExceeded)]
    assert (len(made), len(refused)) == (5, 45), answers
    assert Sandbox.objects.filter(tenant=alice.tenant).count() == 5


def test_a_quota_that_was_freed_can_be_used_again(alice: Any, node_row: Node) -> None:
    Tenant.objects.filter(pk=alice.tenant.pk).update(max_live_sandboxes=1)
    first = sandbox_create(tenant=alice.tenant, template_name="standard")
    with pytest.raises(QuotaExceeded):
        sandbox_create(tenant=alice.tenant, template_name="standard")
    sandbox_destroy(sandbox=first, reason=DeathReason.USER)
    assert sandbox_create(tenant=alice.tenant, template_name="standard").state == SandboxState.CREATING


def test_ten_destroys_at_once_are_one(alice: Any, parked_row: Callable[[], Sandbox]) -> None:
    parked_row()
    row = claim(alice.tenant)
    assert row is not None
    ended = at_once(
        10, lambda _: sandbox_end(Sandbox.objects.get(pk=row.pk), reason=DeathReason.USER, detail="asked for")
    )
    assert sorted(ended, key=str) == [False] * 9 + [True]
    assert SandboxMove.objects.filter(sandbox=row, to_state="stopping").count() == 1


def test_one_destroyed_before_any_node_took_it_is_gone_at_once(alice: Any, node_row: Node) -> None:
    row = sandbox_create(tenant=alice.tenant, template_name="standard")
    assert sandbox_destroy(sandbox=row, reason=DeathReason.USER)
    row.refresh_from_db()
    assert (row.state, row.death_reason) == ("destroyed", "user")
    assert not sandbox_destroy(sandbox=row, reason=DeathReason.ADMIN)
    row.refresh_from_db()
    assert row.death_reason == "user"

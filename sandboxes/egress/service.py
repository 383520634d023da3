"""A sandbox's egress rules, from its row to its gateway, and what the gateway saw.

The row is the wish. `guest_configure` sends it with everything else, so a lost call is made good at the next use; a
change goes to the gateway at once.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from e2a.core.errors import GuestError, GuestUnreachable
from sandboxes.egress.rules import EgressRules
from sandboxes.guest_client import GuestClient
from sandboxes.models import Sandbox


def egress_rules(sandbox: Sandbox) -> EgressRules:
    """What holds: its template's rules and its own."""
    return EgressRules.stored(sandbox.template.egress).joined(EgressRules.stored(sandbox.egress))


def egress_stamp(sandbox: Sandbox) -> str:
    """Changes with the rules; empty for none, which nobody has to be told."""
    rules = egress_rules(sandbox)
    if rules == EgressRules():
        return ""
    return hashlib.sha256(json.dumps(rules.as_json()).encode()).hexdigest()[:16]


def egress_tell(sandbox: Sandbox, client: GuestClient) -> None:
    """Give its gateway the rules that hold. Raises GuestUnreachable, GuestError."""
    client.egress_set(egress_rules(sandbox).as_json())


def egress_seen(sandbox: Sandbox, client: GuestClient | None) -> tuple[list[dict[str, Any]], bool]:
    """What it reached and was refused, newest first; and whether that is all: a silent gateway has the newest."""
    if client is None:
        return list(sandbox.egress_seen), True
    try:
        found: list[dict[str, Any]] = client.egress_shown()["seen"]
    except (GuestUnreachable, GuestError, KeyError):
        return list(sandbox.egress_seen), False
    return found, True

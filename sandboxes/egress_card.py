"""The network card of a sandbox's page, in words."""

from __future__ import annotations

from typing import Any, Final

from django.conf import settings

from e2a.core.addresses import is_allowed_private, target_refusal
from sandboxes.configuration import guest_client
from sandboxes.egress.service import egress_rules, egress_seen
from sandboxes.models import CONTAINED_STATES, Sandbox

SHOWN: Final = 20
_SECONDS: Final = 1.0
WORDS: Final = {
    "allowed": "as a rule allows",
    "not_allowed": "no rule allows it",
    "denied": "a rule denies it",
    "private_address": "its address is not public",
    "no_address": "it has no address",
    "unreachable": "it takes no connection",
    "not_tls": "it was not TLS",
    "sni_mismatch": "TLS named another host",
    "revoked": "the rules were changed",
}


def egress_card(sandbox: Sandbox) -> dict[str, Any]:
    """Rules and the newest entries, in words. Asks a living one's gateway, at most 1 s."""
    lives = sandbox.state in CONTAINED_STATES and sandbox.node is not None
    entries, _ = egress_seen(sandbox, guest_client(sandbox, timeout_seconds=_SECONDS) if lives else None)
    rules = egress_rules(sandbox)
    return {
        "rules": [str(rule) for rule in rules.allow],
        "entries": [
            entry
            | {
                "words": WORDS.get(entry["reason"], entry["reason"]),
                "may_allow": entry["reason"] == "not_allowed"
                and not rules.verdict(entry["host"], entry["port"]).is_allowed
                and _can_be_allowed(entry["host"], entry["port"]),
            }
            for entry in entries[:SHOWN]
        ],
    }


def _can_be_allowed(host: str, port: int) -> bool:
    """A rule for a private address would change nothing."""
    listed = is_allowed_private(host, port, settings.E2A.egress_allow_private)
    return listed or target_refusal("https", host, 443) is None

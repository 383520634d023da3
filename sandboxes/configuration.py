"""What a sandbox's guest is told: its environment, what to redact, when to end itself.

Runs where the vault's keys are (web, worker), never in a node. The model key (`LLM_*`) is not part of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from django.conf import settings

from accounts.models import Tenant
from e2a.core.clock import now, seconds
from e2a.core.errors import Conflict
from sandboxes.egress.service import egress_stamp, egress_tell
from sandboxes.guest_answers import not_running
from sandboxes.guest_client import GuestClient, RedactedValue
from sandboxes.models import Sandbox
from secrets_vault import services as vault

CONFIGURE_SECONDS = 3.0
DEADLINE_GRACE_SECONDS = 20.0
"""A guest ends itself so long after its row's end: a control plane that lives is first, and writes down
why."""

WORKSPACE_GRACE_SECONDS = 90.0
"""One with a workspace waits longer, to be saved."""

_PURPOSE = "sandbox-env"


def holder_of(sandbox: Sandbox) -> str:
    """Who holds the secret bundles that reach this sandbox: its session, or itself."""
    return sandbox.owner or sandbox.public_id


def env_seal(tenant: Tenant, env_vars: Mapping[str, str]) -> bytes:
    """The request's own variables, encrypted for its row; empty for none."""
    if not env_vars:
        return b""
    return vault.seal(tenant=tenant, purpose=_PURPOSE, data=json.dumps(dict(env_vars)).encode())


def env_unseal(sandbox: Sandbox) -> dict[str, str]:
    if not sandbox.env_sealed:
        return {}
    assert sandbox.tenant is not None, "a row without an owner has no variables"
    found = json.loads(vault.unseal(tenant=sandbox.tenant, purpose=_PURPOSE, data=bytes(sandbox.env_sealed)))
    return {str(name): str(value) for name, value in found.items()}


def guest_client(sandbox: Sandbox, *, timeout_seconds: float | None = None) -> GuestClient:
    """A client of its guest. Raises `Conflict` (`not_running`) when no node has it."""
    if sandbox.node is None:
        raise not_running(sandbox)
    key = settings.E2A.node_key
    if timeout_seconds is None:
        return GuestClient(sandbox.public_id, sandbox.node.address, key)
    return GuestClient(sandbox.public_id, sandbox.node.address, key, timeout_seconds=timeout_seconds)


def guest_configure(sandbox: Sandbox) -> None:
    """Send environment, redaction and deadline whole, and note with what. May be repeated at any time.

    Secrets win over the request's own variables of the same name. Raises GuestError, GuestUnreachable,
    DeadlineExceeded (after 3 s).
    """
    values, fingerprint = vault.holder_environment(holder_of(sandbox))
    env = env_unseal(sandbox)
    env.update({name: value.reveal() for name, value in values.items()})
    guest_client(sandbox, timeout_seconds=CONFIGURE_SECONDS).configure(
        env=env,
        redact=[RedactedValue(name, value.reveal()) for name, value in values.items()],
        deadline_seconds=_deadline_seconds(sandbox),
    )
    # Told to who was told something before, too: rules may have been taken away.
    if egress_stamp(sandbox) != sandbox.configured_with.partition("#")[2]:
        egress_tell(sandbox, guest_client(sandbox, timeout_seconds=CONFIGURE_SECONDS))
    sandbox.configured_with = _stamp(sandbox, fingerprint)


def is_configuration_current(sandbox: Sandbox) -> bool:
    """Whether the guest knows the newest secrets and the row's deadline. At most one query.

    A sandbox without an owner gets its bundles when it is made and never another one, so one without is not
    looked up.
    """
    stamped = sandbox.configured_with.partition("@")[0]
    fingerprint = vault.holder_fingerprint(holder_of(sandbox)) if sandbox.owner or stamped else ""
    return sandbox.configured_with == _stamp(sandbox, fingerprint)


def _stamp(sandbox: Sandbox, fingerprint: str) -> str:
    ends = "" if sandbox.expires_at is None else f"{sandbox.expires_at.timestamp():.0f}"
    egress = egress_stamp(sandbox)
    return f"{fingerprint}@{ends}" + (f"#{egress}" if egress else "")


def _deadline_seconds(sandbox: Sandbox) -> float | None:
    if sandbox.expires_at is None:
        return None
    grace = DEADLINE_GRACE_SECONDS if sandbox.workspace_id is None else WORKSPACE_GRACE_SECONDS
    left = sandbox.expires_at - now() + seconds(grace)
    if left.total_seconds() <= 0:
        raise Conflict("The sandbox has reached its end.", code="not_running")
    return left.total_seconds()

"""Who is calling: a person with an account token, or a program with an API key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rest_framework.request import Request

from accounts.models import Tenant, User


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller who has been authenticated. `key_id` (public) and `key_pk` are set for API keys only.

    `family` names the sign-in of an account token, for signing out.
    """

    kind: Literal["account", "key"]
    tenant: Tenant
    user: User
    key_id: str | None = None
    key_pk: int | None = None
    scopes: frozenset[str] = frozenset()
    family: str | None = None

    def has_scope(self, scope: str) -> bool:
        """Whether the caller may do what `scope` names. A person may do everything in the tenant."""
        return self.kind == "account" or scope in self.scopes

    @property
    def public_id(self) -> str:
        """The key's id or the user's: what the audit trail calls the actor."""
        return self.key_id or self.user.public_id


def principal_of(request: Request) -> Principal:
    """The principal of an authenticated `/v1` request (DRF's stubs know only its own tokens)."""
    principal: object = request.auth
    assert isinstance(principal, Principal)
    return principal

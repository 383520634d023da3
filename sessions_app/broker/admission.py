"""Who calls, and with which key: one look into the database a call, the vault only when something changed."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final

from e2a.core.errors import E2AError, ValidationFailed
from e2a.core.outbound import CheckedUrl
from sandboxes.guest.redaction import Patterns
from sandboxes.models import Sandbox, SandboxState
from secrets_vault.services import LLMSecret, holder_fingerprint, holder_llm
from sessions_app.broker.protocols import Protocol
from sessions_app.llm import model_endpoint
from sessions_app.models import SessionStatus
from sessions_app.rules import model_check
from sessions_app.secrecy import MODEL_KEY
from sessions_app.spending import over_budget

KEPT_SECONDS: Final = 30.0
"""How long an opened key may be kept in memory. Whether it is still the right one is asked for every call."""
MOST_KEPT: Final = 1000
_SPEAKS = (SandboxState.RUNNING, SandboxState.PAUSED, SandboxState.CONFIGURING)


class Denied(Exception):
    """The broker's own answer to a program, in its vendor's form."""

    def __init__(self, status: int, kind: str, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.kind = kind
        self.text = text


@dataclass(frozen=True, slots=True)
class Admission:
    """One call that may be made."""

    tenant_pk: int
    sandbox_id: str
    session_pk: int | None
    agent_kind: str
    url: CheckedUrl
    allow_private: frozenset[str]
    key: str = field(repr=False)
    patterns: Patterns = field(repr=False)


@dataclass(slots=True)
class _Kept:
    fingerprint: str
    secret: LLMSecret | None
    patterns: Patterns
    until: float


class Keys:
    """Opened model keys by holder, for half a minute. Used by many threads."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}
        self._lock = threading.Lock()

    def read(self, holder: str) -> tuple[LLMSecret | None, Patterns]:
        """The key as it is now: one query, or four when it was replaced or not used lately."""
        fingerprint = holder_fingerprint(holder)
        with self._lock:
            kept = self._kept.get(holder)
        if kept is None or kept.fingerprint != fingerprint or kept.until < time.monotonic():
            secret = holder_llm(holder)
            values = [] if secret is None else [(MODEL_KEY, secret.api_key.reveal().strip().encode())]
            kept = _Kept(
                # Of what was read; a replacement in between is newer than this says, and is read again next time.
                fingerprint,
                secret,
                Patterns(values),
                time.monotonic() + KEPT_SECONDS,
            )
            with self._lock:
                self._kept[holder] = kept
        return kept.secret, kept.patterns

    def forget_old(self) -> None:
        """Drop what is over its time; to be called every few seconds."""
        moment = time.monotonic()
        with self._lock:
            old = [holder for holder, kept in self._kept.items() if kept.until < moment]
            over = len(self._kept) - len(old) - MOST_KEPT
            old += list(self._kept)[: max(0, over)]
            for holder in old:
                self._kept.pop(holder, None)


def admit(sandbox_id: str, protocol: Protocol, keys: Keys) -> Admission:
    """Decide whether this sandbox may call this vendor now. Two queries, more when its key changed. Raises Denied."""
    row = (
        Sandbox.objects.filter(public_id=sandbox_id, state__in=_SPEAKS, tenant__suspended_at__isnull=True)
        .values(
            "tenant_id",
            "owner",
            "agent_session__pk",
            "agent_session__public_id",
            "agent_session__status",
            "agent_session__agent_kind",
            "agent_session__llm_vendor",
            "agent_session__llm_base_url",
            "agent_session__budget",
            "agent_session__input_tokens",
            "agent_session__output_tokens",
            "agent_session__cost_usd",
        )
        .first()
    )
    if row is None or row["tenant_id"] is None:
        raise Denied(403, "permission_error", "This sandbox has no model access.")
    session: dict[str, Any] = {name.removeprefix("agent_session__"): value for name, value in row.items()}
    if session["status"] == SessionStatus.ENDED:
        raise Denied(403, "permission_error", "The session of this sandbox has ended.")
    if session["pk"] is not None:
        _budget_check(session)
    secret, patterns = keys.read(row["owner"] or sandbox_id)
    if secret is None:
        raise Denied(
            401,
            "authentication_error",
            "missing_llm_key: no secret bundle of this sandbox holds an LLM_API_KEY.",
        )
    key = secret.api_key.reveal().strip()
    vendor = session["llm_vendor"] or ""
    if vendor and vendor != protocol.vendor:
        raise Denied(
            403, "permission_error", f"vendor_mismatch: the model key of this session is for {vendor}."
        )
    base_url = session["llm_base_url"] or secret.base_url or None
    try:
        endpoint = model_endpoint(protocol.vendor, base_url)
    except E2AError as error:
        raise Denied(403, "permission_error", f"forbidden_url: {error.detail}") from None
    if not vendor and base_url is None and protocol.vendor != "anthropic" and key.startswith("sk-ant-"):
        raise Denied(
            403, "permission_error", "vendor_mismatch: the model key of this sandbox is for anthropic."
        )
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise Denied(401, "authentication_error", "LLM_API_KEY is empty or holds characters that no key has.")
    return Admission(
        row["tenant_id"],
        sandbox_id,
        session["pk"],
        session["agent_kind"] or "",
        endpoint.url,
        endpoint.allow_private,
        key,
        patterns,
    )


def _budget_check(session: dict[str, Any]) -> None:
    tokens = session["input_tokens"] + session["output_tokens"]
    if spent := over_budget(session["budget"] or {}, tokens, session["cost_usd"] or Decimal(0)):
        raise Denied(403, "permission_error", f"budget_spent: {spent}")


def model_admit(admission: Admission, model: str) -> None:
    """Whether its agent may use the model of that name. Raises Denied."""
    try:
        model_check(admission.agent_kind, model)
    except ValidationFailed as error:
        raise Denied(400, "invalid_request_error", f"invalid_model: {error.detail}") from None

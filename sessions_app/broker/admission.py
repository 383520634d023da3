"""Who calls, and with which key: one look into the database a call, the vault only when something changed."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final, Generic, TypeVar

from e2a.core.errors import E2AError, ValidationFailed
from e2a.core.outbound import CheckedUrl
from e2a.core.prepared import Prepared
from sandboxes.egress.rules import Rule, rule_parse
from sandboxes.guest.redaction import Patterns
from sandboxes.models import Sandbox, SandboxState
from secrets_vault.services import LLMSecret, holder_fingerprint, holder_llm, values_read
from sessions_app.broker.exchange import Denied
from sessions_app.broker.protocols import Protocol
from sessions_app.llm import model_endpoint
from sessions_app.models import SessionStatus
from sessions_app.rules import model_check
from sessions_app.secrecy import MODEL_KEY
from sessions_app.spending import over_budget

T = TypeVar("T")

KEPT_SECONDS: Final = 30.0
"""How long an opened key may be kept in memory. Whether it is still the right one is asked for every call."""
MOST_KEPT: Final = 1000
_SPEAKS = (SandboxState.RUNNING, SandboxState.PAUSED, SandboxState.CONFIGURING)


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


@dataclass(frozen=True, slots=True)
class ModelKey:
    """A holder's model key and what to take out of answers; no secret for a holder that has none."""

    secret: LLMSecret | None
    patterns: Patterns


def model_key_read(holder: str) -> ModelKey:
    """As it is now. Two or three queries."""
    secret = holder_llm(holder)
    values = [] if secret is None else [(MODEL_KEY, secret.api_key.reveal().strip().encode())]
    return ModelKey(secret, Patterns(values))


@dataclass(frozen=True, slots=True)
class Injection:
    """A header that is added to calls of some hosts."""

    hosts: tuple[Rule, ...]
    header: str
    value: str = field(repr=False)

    def is_for(self, host: str, port: int) -> bool:
        """A rule without a port is for 443."""
        return any(rule.matches(host, port) and (rule.port or 443) == port for rule in self.hosts)


@dataclass(frozen=True, slots=True)
class Injections:
    """All of a holder's, and what to take out of answers: every value that is injected anywhere."""

    all: tuple[Injection, ...]
    patterns: Patterns


def injections_read(holder: str) -> Injections:
    """As they are now. Two or three queries."""
    found: list[Injection] = []
    values: list[tuple[str, bytes]] = []
    for name, value in values_read(purpose="inject", holder=holder).items():
        if value.inject is None:
            continue
        header, _, template = value.inject["header"].partition(":")
        text = value.text.reveal()
        hosts = tuple(rule_parse(host, is_checked=True) for host in value.inject["hosts"])
        found.append(Injection(hosts, header.strip(), template.strip().replace("{value}", text)))
        values.append((name, text.encode()))
    return Injections(tuple(found), Patterns(values))


@dataclass(slots=True)
class _Kept(Generic[T]):
    fingerprint: str
    what: T
    until: float


class Opened(Generic[T]):
    """What was opened for holders, for half a minute. Used by many threads."""

    def __init__(self, read: Callable[[str], T]) -> None:
        self._read = read
        self._kept: dict[str, _Kept[T]] = {}
        self._lock = threading.Lock()

    def of(self, holder: str) -> T:
        """As it is now: one query, or some more when it was replaced or not used lately."""
        # Before the values: a replacement in between makes them newer than this says, so they are read once more.
        fingerprint = holder_fingerprint(holder)
        with self._lock:
            kept = self._kept.get(holder)
        if kept is None or kept.fingerprint != fingerprint or kept.until < time.monotonic():
            kept = _Kept(fingerprint, self._read(holder), time.monotonic() + KEPT_SECONDS)
            with self._lock:
                self._kept[holder] = kept
        return kept.what

    def forget_old(self) -> None:
        """Drop what is over its time; to be called every few seconds."""
        moment = time.monotonic()
        with self._lock:
            old = [holder for holder, kept in self._kept.items() if kept.until < moment]
            over = len(self._kept) - len(old) - MOST_KEPT
            old += list(self._kept)[: max(0, over)]
            for holder in old:
                self._kept.pop(holder, None)


def admit(sandbox_id: str, protocol: Protocol, keys: Opened[ModelKey]) -> Admission:
    """Decide whether this sandbox may call this vendor now. Two queries, more when its key changed. Raises Denied."""
    session = _asking(sandbox_id)
    if session["status"] == SessionStatus.ENDED:
        raise Denied(403, "permission_error", "The session of this sandbox has ended.")
    if session["pk"] is not None:
        _budget_check(session)
    opened = keys.of(session["owner"] or sandbox_id)
    secret, patterns = opened.secret, opened.patterns
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
        session["tenant_id"],
        sandbox_id,
        session["pk"],
        session["agent_kind"] or "",
        endpoint.url,
        endpoint.allow_private,
        key,
        patterns,
    )


def injections_for(sandbox_id: str, opened: Opened[Injections]) -> Injections:
    """What is injected for this sandbox now. Two queries, more when a bundle changed. Raises Denied."""
    session = _asking(sandbox_id)
    if session["status"] == SessionStatus.ENDED:
        raise Denied(403, "not_injected", "The session of this sandbox has ended.")
    return opened.of(session["owner"] or sandbox_id)


_COLUMNS: Final = (
    "tenant_id",
    "owner",
    "agent_session__pk",
    "agent_session__status",
    "agent_session__agent_kind",
    "agent_session__llm_vendor",
    "agent_session__llm_base_url",
    "agent_session__budget",
    "agent_session__input_tokens",
    "agent_session__output_tokens",
    "agent_session__cost_usd",
)
_ASKING: Final = Prepared(
    lambda sandbox_id: Sandbox.objects.filter(
        public_id=sandbox_id, state__in=_SPEAKS, tenant__suspended_at__isnull=True
    ).values_list(*_COLUMNS)
)


def _asking(sandbox_id: str) -> dict[str, Any]:
    """The sandbox's owner and its session's columns, None without one. Raises Denied."""
    rows = _ASKING.rows(sandbox_id)
    if not rows or rows[0][0] is None:
        raise Denied(403, "permission_error", "This sandbox may call nothing now.")
    names = (name.removeprefix("agent_session__") for name in _COLUMNS)
    found = dict(zip(names, rows[0], strict=True))
    if isinstance(found["budget"], str):
        found["budget"] = json.loads(found["budget"])
    found["cost_usd"] = Decimal(str(found["cost_usd"] or 0))
    return found


def _budget_check(session: dict[str, Any]) -> None:
    tokens = session["input_tokens"] + session["output_tokens"]
    if spent := over_budget(session["budget"] or {}, tokens, session["cost_usd"]):
        raise Denied(403, "permission_error", f"budget_spent: {spent}")


def model_admit(admission: Admission, model: str) -> None:
    """Whether its agent may use the model of that name. Raises Denied."""
    try:
        model_check(admission.agent_kind, model)
    except ValidationFailed as error:
        raise Denied(400, "invalid_request_error", f"invalid_model: {error.detail}") from None

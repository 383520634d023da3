"""Which agent, model and key go together (CONTRACT 5)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from accounts.principal import Principal
from e2a.core.errors import NotBuilt, ValidationFailed
from sandboxes.models import Template
from sandboxes.selectors import template_get
from secrets_vault.services import holder_llm
from sessions_app.llm import BROKER_VENDORS, BUILT_VENDORS, model_endpoint
from sessions_app.models import Session

AGENT_KINDS: Final = ("deictic", "claude-code", "codex", "shell")
PROGRAMS: Final = frozenset({"claude-code", "codex"})
"""Agents that are programs in the sandbox, with a model of one vendor."""
VENDORS: Final = ("anthropic", "openai", "google", "deepseek")
_DEFAULT_VENDOR: Final = {"deictic": "anthropic", "claude-code": "anthropic", "codex": "openai"}
MODEL = re.compile(r"^[a-zA-Z0-9._:/-]{1,128}\Z")
_MODEL_OF_AGENT: Final = {
    "claude-code": (re.compile(r"^claude-"), "claude-code needs a model named claude-…"),
    "codex": (re.compile(r"^(gpt-|o[0-9])"), "codex needs a model named gpt-… or o and a digit"),
}


@dataclass(frozen=True, slots=True)
class LLMChoice:
    """`llm` of a request. Empty text means: not given here, so the bundle's setting or a default."""

    vendor: str
    model: str = ""
    base_url: str = ""


def agent_check(kind: str, template_name: str) -> Template:
    """The template, which has that agent. Raises `unknown_agent`, `unknown_template`."""
    if kind not in AGENT_KINDS:
        raise ValidationFailed.of(
            "agent.kind", "unknown_agent", f"agent.kind is one of {', '.join(AGENT_KINDS)}."
        )
    template = template_get(template_name)
    if kind not in template.agents:
        raise ValidationFailed.of(
            "agent.kind", "unknown_agent", f"The template {template_name} has no agent {kind}."
        )
    return template


def model_check(kind: str, model: str) -> None:
    """Raises `invalid_model` when the name is malformed or of another vendor's agent."""
    if not MODEL.match(model):
        raise ValidationFailed.of("llm.model", "invalid_model", "This is not the form of a model name.")
    rule = _MODEL_OF_AGENT.get(kind)
    if rule is not None and not rule[0].match(model):
        raise ValidationFailed.of("llm.model", "invalid_model", rule[1] + ".")


def _vendor(kind: str, named: str) -> str:
    """Whose model the agent calls."""
    default = _DEFAULT_VENDOR[kind]
    vendor = named or default
    if vendor not in (BROKER_VENDORS if kind in PROGRAMS else BUILT_VENDORS):
        raise NotBuilt(f"The vendor {vendor} is not built yet.", code="vendor_unavailable")
    if vendor != default:
        raise ValidationFailed.of(
            "llm.vendor", "vendor_mismatch", f"The agent {kind} calls models of {default}."
        )
    return vendor


def llm_check(*, principal: Principal, session: Session, choice: LLMChoice | None) -> LLMChoice | None:
    """The model, address and key of a session agree; returns what to store with it.

    A key belongs to the origin it was saved for: another `base_url` needs `secrets:write` on the caller's API key.
    Raises `llm_not_allowed`, `vendor_unavailable` (501), `vendor_mismatch`, `missing_llm_key`, `invalid_model`,
    `forbidden_url`, `origin_mismatch`.
    """
    kind = session.agent_kind
    if kind == "shell":
        if choice is not None:
            raise ValidationFailed.of("llm", "llm_not_allowed", "The agent shell calls no model.")
        return None
    vendor = _vendor(kind, choice.vendor if choice else "")
    secret = holder_llm(holder=session.public_id)
    if secret is None:
        raise ValidationFailed.of("secrets", "missing_llm_key", "None of the bundles holds an LLM_API_KEY.")
    model = (choice.model if choice else "") or secret.model or ""
    if not model:
        raise ValidationFailed.of(
            "llm.model", "invalid_model", "Name a model here or as LLM_MODEL in a bundle."
        )
    model_check(kind, model)
    base_url = choice.base_url if choice else ""
    used = model_endpoint(vendor, base_url or secret.base_url)
    own = model_endpoint(vendor, secret.key_base_url)
    if used.url.origin != own.url.origin and not principal.has_scope("secrets:write"):
        raise ValidationFailed.of(
            "llm.base_url",
            "origin_mismatch",
            "The key belongs to another origin; naming this one needs the scope secrets:write.",
        )
    return LLMChoice(vendor, choice.model if choice else "", base_url)

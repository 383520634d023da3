"""Model vendors behind one small interface: `open_model` gives a `ModelClient`, `base` says what it does."""

from __future__ import annotations

from dataclasses import dataclass

from django.conf import settings

from e2a.core.errors import NotBuilt
from e2a.core.outbound import CheckedUrl, Timeouts, check_base_url, outbound_client, trusted_url
from sessions_app.llm.base import ModelClient

__all__ = ["BROKER_VENDORS", "BUILT_VENDORS", "Endpoint", "model_endpoint", "open_model"]

BUILT_VENDORS = frozenset({"anthropic"})
"""Those that our own loop speaks with."""
BROKER_VENDORS = frozenset({"anthropic", "openai"})
"""Those that programs in sandboxes speak with, through the broker."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a vendor's calls go. `url.origin` is what a model key belongs to."""

    url: CheckedUrl
    allow_private: frozenset[str]


def model_endpoint(vendor: str, base_url: str | None, *, field: str = "llm.base_url") -> Endpoint:
    """The endpoint for a session or bundle that names `base_url`; None is the operator's default.

    Reads settings. Raises NotBuilt `vendor_unavailable` and ValidationFailed `forbidden_url`.
    """
    if vendor not in BROKER_VENDORS:
        raise NotBuilt(f"Models of {vendor} are not available here yet.", code="vendor_unavailable")
    allowed: frozenset[str] = settings.E2A.llm_allow_private
    default = trusted_url(settings.E2A.vendor_urls[vendor])
    if base_url is None or base_url.rstrip("/") == default.url:
        return Endpoint(default, allowed | {default.authority})
    return Endpoint(check_base_url(base_url, allow_private=allowed, field=field), allowed)


def open_model(
    *, vendor: str, api_key: str, endpoint: Endpoint, timeouts: Timeouts | None = None
) -> ModelClient:
    """A client for the calls of one session, to be closed. Keeps its connection between calls."""
    if vendor not in BUILT_VENDORS:
        raise NotBuilt(f"Models of {vendor} are not available here yet.", code="vendor_unavailable")
    # Importing the SDK takes 2 s: only processes that call models pay for it.
    from sessions_app.llm.anthropic import AnthropicModel

    http = outbound_client(allow_private=endpoint.allow_private, timeouts=timeouts)
    return AnthropicModel(api_key=api_key, base_url=endpoint.url, http=http)

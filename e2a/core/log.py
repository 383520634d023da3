"""Structured logs, scrubbed: one line an event, with request ids, without credentials or query strings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import structlog

from e2a.core.requests import request_id_var

_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\be2a_(live|test)_[0-9A-Za-z]{4,}"), r"e2a_\1_[scrubbed]"),
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*\.?[A-Za-z0-9_-]*"), "[scrubbed:jwt]"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[^\s\"']{6,}"), r"\1 [scrubbed]"),
    (re.compile(r"\bsk-[A-Za-z0-9_-]{8,}"), "[scrubbed:sk]"),
    (re.compile(r"(?i)([?&](?:token|ticket|key|code|secret|jwt|access_token)=)[^&\s\"']+"), r"\1[scrubbed]"),
    (
        re.compile(r"(?i)((?:authorization|x-api-key|cookie|set-cookie)['\"]?\s*[:=]\s*['\"]?)[^\s,'\"]+"),
        r"\1[scrubbed]",
    ),
)
_HIDDEN_NAMES = re.compile(r"(?i)(password|secret|token|authorization|api_key|cookie|^code$|otp|jwt)")


def scrub(text: str) -> str:
    """`text` without anything that looks like a credential of ours or of a vendor."""
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def _scrubbed(value: Any) -> Any:
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, Mapping):
        return {key: _scrub_item(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_scrubbed(item) for item in value]
    return value


def _scrub_item(name: str, value: Any) -> Any:
    if _HIDDEN_NAMES.search(name) and isinstance(value, str) and value:
        return "[scrubbed]"
    return _scrubbed(value)


def scrub_event(logger: Any, method: str, event: dict[str, Any]) -> dict[str, Any]:
    """structlog processor: scrubs every value, by its name and by its look."""
    return {key: _scrub_item(key, value) for key, value in event.items()}


def add_request_id(logger: Any, method: str, event: dict[str, Any]) -> dict[str, Any]:
    """structlog processor: the id of the request that is being served."""
    request_id = request_id_var.get()
    if request_id:
        event.setdefault("request_id", request_id)
    return event


_SHARED: list[Any] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    add_request_id,
]


def configure(log_format: str, *, level: str = "INFO") -> dict[str, Any]:
    """Set structlog up and return Django's `LOGGING`. Standard-library loggers pass the same scrubber."""
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_SHARED,
            structlog.processors.StackInfoRenderer(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    renderer: Any
    if log_format == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=False, pad_event_to=0)
    final: list[Any] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    final += [structlog.processors.format_exc_info, scrub_event, renderer]
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "structured": {
                "()": structlog.stdlib.ProcessorFormatter,
                "foreign_pre_chain": _SHARED,
                "processors": final,
            }
        },
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "structured"}},
        "root": {"handlers": ["stderr"], "level": level},
        "loggers": {
            # Its lines hold the whole query string, so `?token=` too. Ours are written by the access-log middleware.
            "uvicorn.access": {"handlers": [], "propagate": False, "level": "CRITICAL"},
            "uvicorn.error": {"handlers": [], "propagate": True, "level": "WARNING"},
            "django.server": {"handlers": [], "propagate": False, "level": "CRITICAL"},
            "django.request": {"handlers": [], "propagate": True, "level": "ERROR"},
            "httpx2": {"level": "WARNING"},
            "httpcore2": {"level": "WARNING"},
            "anthropic": {"level": "WARNING"},
            "docker": {"level": "WARNING"},
            "urllib3": {"level": "WARNING"},
        },
    }

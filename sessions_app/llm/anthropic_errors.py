"""What an error answer means to a turn. The vendor's list: https://platform.claude.com/docs/en/api/errors"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any

from e2a.core.clock import now
from sessions_app.llm.base import ErrorCode, ModelError

Mask = Callable[[str], str]
"""Takes the key out of a text."""

_BY_STATUS: dict[int, tuple[ErrorCode, bool]] = {
    401: ("llm_auth", False),
    402: ("llm_billing", False),
    403: ("llm_auth", False),
    408: ("llm_server_error", True),
    409: ("llm_server_error", True),
    413: ("llm_context_too_long", False),
    429: ("llm_rate_limited", True),
    503: ("llm_overloaded", True),
    529: ("llm_overloaded", True),
}
_BY_TYPE: dict[str, int] = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}
_TOO_LONG = ("prompt is too long", "exceed context limit", "exceeds the context window")


def from_status(status: int, message: object, headers: Mapping[str, str], *, mask: Mask) -> ModelError:
    """The error of an HTTP status. `message` is the vendor's own, if the body was in the vendor's form."""
    code, retryable = _meaning(status, message)
    if headers.get("x-should-retry") == "false":
        retryable = False
    return ModelError(
        code,
        _detail(message, mask) or _usual_detail(status),
        retryable=retryable,
        status=status,
        retry_after=_retry_after(headers),
    )


def from_error_event(data: Any, *, mask: Mask) -> ModelError:
    """The error of an `error` event in the middle of a stream, which has no status of its own."""
    error = data.get("error") if isinstance(data, dict) else None
    kind = error.get("type") if isinstance(error, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    status = _BY_TYPE.get(kind, 500) if isinstance(kind, str) else 500
    code, retryable = _meaning(status, message)
    return ModelError(
        code, _detail(message, mask) or _usual_detail(status), retryable=retryable, status=status
    )


def _meaning(status: int, message: object) -> tuple[ErrorCode, bool]:
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    if status >= 500:
        return "llm_server_error", True
    if status < 400:
        return "llm_bad_response", False
    if isinstance(message, str) and any(phrase in message.lower() for phrase in _TOO_LONG):
        return "llm_context_too_long", False
    return "llm_bad_request", False


def _detail(message: object, mask: Mask) -> str:
    """The vendor's sentence, masked before it is cut, so that no part of a key stays. May be empty."""
    if not isinstance(message, str):
        return ""
    return "".join(char if char.isprintable() else " " for char in mask(message))[:500].strip()


def _usual_detail(status: int) -> str:
    if status < 400:
        return f"The model's endpoint answered {status}; redirects are not followed."
    return f"The model's endpoint answered {status}."


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from `retry-after-ms` or `retry-after` (seconds or a date); None without a sensible one."""
    seconds = _number(headers.get("retry-after-ms"), 1000.0)
    if seconds is None:
        seconds = _number(headers.get("retry-after"), 1.0)
    if seconds is None and headers.get("retry-after"):
        try:
            moment = parsedate_to_datetime(headers["retry-after"])
        except ValueError:
            return None
        seconds = ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - now()).total_seconds()
    return None if seconds is None else max(0.0, seconds)


def _number(text: str | None, unit: float) -> float | None:
    try:
        value = float(text or "") / unit
    except ValueError:
        return None
    return value if math.isfinite(value) else None

"""The one tree of errors. It says who must act and whether waiting helps.

E2AError
├── CallerError                     the caller must change something; shown in full
│   ├── ValidationFailed     400    with the fields
│   ├── NotFound             404    missing and foreign alike
│   ├── Conflict             409
│   ├── Gone                 410
│   ├── TooLarge             413
│   └── RateLimited          429    waiting helps: `retry_after` seconds
├── AccessError
│   ├── Unauthenticated      401    one body for all causes
│   └── Forbidden            403
├── NotBuilt                 501
├── Unavailable              503    waiting helps, ours to mend; the detail is safe to show
└── OurError                 500    opaque to the caller, logged with its cause
    ├── EngineError                 `retryable` says whether the same call may work later
    │   └── EngineUnavailable       the engine does not answer at all
    ├── GuestError                  the guest answered no: `code` is the guest's
    ├── GuestUnreachable            the guest or the gateway did not answer
    └── DeadlineExceeded            a wait ended: says what was awaited and for how long
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class FieldError:
    """What is wrong with one field of a request. `field` is a dotted path, `code` is for programs."""

    field: str
    code: str
    detail: str


class E2AError(Exception):
    """Base of all errors that e2a raises on purpose. `detail` is one sentence for a person."""

    status = 500
    code = "internal_error"
    title = "Internal error"
    members: Mapping[str, str] = MappingProxyType({})
    """More of the problem's body, for programs (RFC 9457's extension members)."""

    def __init__(self, detail: str = "", *, code: str | None = None) -> None:
        super().__init__(detail or self.title)
        self.detail = detail or self.title
        if code is not None:
            self.code = code


class CallerError(E2AError):
    """The caller must change something."""

    status = 400
    code = "bad_request"
    title = "Bad request"


class ValidationFailed(CallerError):
    """Fields that are wrong. The problem's own `code` is `validation_failed` unless a single cause names itself."""

    code = "validation_failed"
    title = "Validation failed"

    def __init__(
        self,
        detail: str = "",
        *,
        code: str | None = None,
        errors: tuple[FieldError, ...] | list[FieldError] = (),
    ) -> None:
        super().__init__(detail, code=code)
        self.errors = tuple(errors)

    @classmethod
    def of(cls, field: str, code: str, detail: str) -> ValidationFailed:
        """One field, whose code is also the problem's code."""
        return cls(detail, code=code, errors=(FieldError(field, code, detail),))


class NotFound(CallerError):
    status = 404
    code = "not_found"
    title = "Not found"


class Conflict(CallerError):
    status = 409
    code = "conflict"
    title = "Conflict"


class Gone(CallerError):
    status = 410
    code = "gone"
    title = "Gone"


class TooLarge(CallerError):
    status = 413
    code = "too_large"
    title = "Too large"


class RateLimited(CallerError):
    """Too often. `retry_after` is in whole seconds, at least 1; `limit` and `remaining` describe the window."""

    status = 429
    code = "rate_limited"
    title = "Too many requests"

    def __init__(
        self,
        detail: str = "",
        *,
        retry_after: int = 1,
        limit: int = 0,
        remaining: int = 0,
        code: str | None = None,
    ) -> None:
        super().__init__(detail, code=code)
        self.retry_after = max(1, retry_after)
        self.limit = limit
        self.remaining = remaining


class QuotaExceeded(CallerError):
    """The tenant's plan allows no more of this at once."""

    status = 429
    code = "quota_exceeded"
    title = "Quota exceeded"


class AccessError(E2AError):
    status = 403
    code = "forbidden"
    title = "Forbidden"


class Unauthenticated(AccessError):
    status = 401
    code = "invalid_token"
    title = "Authentication needed"


class Forbidden(AccessError):
    pass


class NotBuilt(E2AError):
    status = 501
    code = "not_built"
    title = "Not built yet"


class Unavailable(E2AError):
    status = 503
    code = "unavailable"
    title = "Service unavailable"

    def __init__(self, detail: str = "", *, code: str | None = None, retry_after: int = 5) -> None:
        super().__init__(detail, code=code)
        self.retry_after = retry_after


class OurError(E2AError):
    pass


class EngineError(OurError):
    """The container engine refused or failed. `retryable`: the same call may work later."""

    code = "engine_error"
    title = "The container engine failed"

    def __init__(self, detail: str = "", *, retryable: bool = False, code: str | None = None) -> None:
        super().__init__(detail, code=code)
        self.retryable = retryable


class EngineUnavailable(EngineError):
    """The engine does not answer at all: the daemon is down, or its socket is missing."""

    code = "engine_unavailable"
    title = "The container engine is not reachable"

    def __init__(self, detail: str = "") -> None:
        super().__init__(detail, retryable=True)


class GuestError(OurError):
    """The guest understood and said no; `code` and `detail` are the guest's, `guest_status` its HTTP status."""

    code = "guest_error"
    title = "The sandbox refused"

    def __init__(self, detail: str = "", *, code: str | None = None, guest_status: int = 500) -> None:
        super().__init__(detail, code=code)
        self.guest_status = guest_status


class GuestUnreachable(OurError):
    """The gateway or the guest did not answer; the sandbox may be gone."""

    code = "guest_unreachable"
    title = "The sandbox does not answer"


class DeadlineExceeded(OurError):
    """A wait came to its end. Never raise it without saying what was awaited and for how long."""

    code = "deadline_exceeded"
    title = "Timed out"

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(f"{what} not done after {seconds:g} s")
        self.what = what
        self.seconds = seconds

"""`application/problem+json` (RFC 9457): the one shape of every error, on `/v1` and below it."""

from __future__ import annotations

import json
from typing import Any

import structlog
from django.core.exceptions import RequestDataTooBig, TooManyFieldsSent
from django.http import Http404, HttpRequest, HttpResponse
from rest_framework import exceptions as drf
from rest_framework.response import Response

from e2a.core import errors
from e2a.core.requests import request_id

log = structlog.get_logger(__name__)

CONTENT_TYPE = "application/problem+json"
TYPE_BASE = "urn:e2a:error:"


def problem(error: errors.E2AError, *, request_id: str) -> dict[str, Any]:
    """The body of an error. Ours stay opaque: only code and request id leave."""
    ours = isinstance(error, errors.OurError) or type(error) is errors.E2AError
    body: dict[str, Any] = {
        "type": TYPE_BASE + ("internal_error" if ours else error.code),
        "title": "Internal error" if ours else error.title,
        "status": error.status,
        "detail": "Something failed on our side. Quote the request_id when you report it."
        if ours
        else error.detail,
        "code": "internal_error" if ours else error.code,
        "request_id": request_id,
    }
    if isinstance(error, errors.ValidationFailed) and error.errors:
        body["errors"] = [{"field": e.field, "code": e.code, "detail": e.detail} for e in error.errors]
    if not ours:
        body |= error.members
    return body


def problem_headers(error: errors.E2AError) -> dict[str, str]:
    """Headers that belong to the error: when to come back, how to authenticate, never cached."""
    headers = {"Cache-Control": "no-store"}
    if isinstance(error, errors.RateLimited):
        headers["Retry-After"] = str(error.retry_after)
        headers["RateLimit-Limit"] = str(error.limit)
        headers["RateLimit-Remaining"] = str(error.remaining)
        headers["RateLimit-Reset"] = str(error.retry_after)
    elif isinstance(error, errors.Unavailable):
        headers["Retry-After"] = str(error.retry_after)
    elif isinstance(error, errors.Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def problem_response(error: errors.E2AError, request: HttpRequest) -> HttpResponse:
    """The error as a plain Django response, for what is not a DRF view."""
    body = problem(error, request_id=request_id(request))
    response = HttpResponse(json.dumps(body), status=error.status, content_type=CONTENT_TYPE)
    for name, value in problem_headers(error).items():
        response[name] = value
    return response


def translated(error: Exception) -> errors.E2AError | None:
    """The member of our tree that a framework's exception stands for; `None` for what nobody expected."""
    match error:
        case errors.E2AError():
            return error
        case drf.ValidationError():
            fields = _flatten(error.get_full_details())
            known = {e.code for e in fields}
            code = next(iter(known)) if len(known) == 1 and known & _SPEAKING_CODES else None
            return errors.ValidationFailed("Some fields are wrong; see errors.", code=code, errors=fields)
        case drf.ParseError():
            return errors.CallerError("The body is not well-formed JSON.", code="malformed_json")
        case drf.UnsupportedMediaType():
            failure = errors.CallerError("The body must be application/json.", code="unsupported_media_type")
            failure.status, failure.title = 415, "Unsupported media type"
            return failure
        case drf.NotAcceptable():
            failure = errors.CallerError("This answer is JSON only.", code="not_acceptable")
            failure.status, failure.title = 406, "Not acceptable"
            return failure
        case drf.MethodNotAllowed():
            failure = errors.CallerError(str(error.detail), code="method_not_allowed")
            failure.status, failure.title = 405, "Method not allowed"
            return failure
        case drf.NotAuthenticated() | drf.AuthenticationFailed():
            return errors.Unauthenticated("A valid bearer token is needed.")
        case drf.PermissionDenied():
            return errors.Forbidden("You may not do this.")
        case drf.NotFound() | Http404():
            return errors.NotFound("There is no such thing here.")
        case drf.Throttled():
            return errors.RateLimited(
                "Too many requests.", retry_after=int(getattr(error, "wait", None) or 1)
            )
        case RequestDataTooBig():
            return errors.TooLarge("The body is over 1 MiB.")
        case TooManyFieldsSent():
            return errors.CallerError("The request has too many fields.")
        case _:
            return None


_SPEAKING_CODES = {
    "unknown_field",
    "unknown_agent",
    "invalid_model",
    "forbidden_url",
    "reserved_name",
    "value_too_short",
    "secret_collision",
    "missing_llm_key",
    "llm_not_allowed",
    "unknown_template",
    "secrets_too_large",
}


def _flatten(details: Any, path: str = "") -> list[errors.FieldError]:
    """DRF's nested details as a flat list with dotted paths."""
    if isinstance(details, dict) and set(details) == {"message", "code"}:
        return [errors.FieldError(path or "body", str(details["code"]), str(details["message"]))]
    found: list[errors.FieldError] = []
    if isinstance(details, dict):
        for key, value in details.items():
            name = path if key == "non_field_errors" else f"{path}.{key}" if path else str(key)
            found += _flatten(value, name)
    elif isinstance(details, list):
        for index, value in enumerate(details):
            leaf = isinstance(value, dict) and set(value) == {"message", "code"}
            found += _flatten(value, path if leaf else f"{path}.{index}" if path else str(index))
    return found


def exception_handler(error: Exception, context: dict[str, Any]) -> Response | None:
    """DRF's hook: every exception of an API view becomes a problem, the unexpected ones opaque and logged."""
    request: HttpRequest = context["request"]._request
    known = translated(error)
    if known is None:
        log.exception("request.failed", exc_info=error)
        known = errors.OurError()
    elif isinstance(known, errors.OurError):
        log.error("request.failed", exc_info=error, code=known.code, detail=known.detail)
    response = Response(
        problem(known, request_id=request_id(request)), status=known.status, content_type=CONTENT_TYPE
    )
    for name, value in problem_headers(known).items():
        response[name] = value
    response.exception = True
    return response


def handler404(request: HttpRequest, exception: Exception | None = None) -> HttpResponse:
    """Unknown paths: a problem on the API, a page elsewhere."""
    return _plain(errors.NotFound("There is no such path."), request, "404.html")


def handler500(request: HttpRequest) -> HttpResponse:
    return _plain(errors.OurError(), request, "500.html")


def handler403(request: HttpRequest, exception: Exception | None = None) -> HttpResponse:
    return _plain(errors.Forbidden(), request, "403.html")


def handler400(request: HttpRequest, exception: Exception | None = None) -> HttpResponse:
    return _plain(errors.CallerError(), request, "400.html")


def _plain(error: errors.E2AError, request: HttpRequest, template: str) -> HttpResponse:
    if request.path.startswith("/v1/"):
        return problem_response(error, request)
    from django.template.loader import render_to_string

    return HttpResponse(render_to_string(template, {"request_id": request_id(request)}), status=error.status)

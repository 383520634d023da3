"""Our own answers on a preview's host: why there is nothing to see, for a person or a program."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Final

from django.template.loader import render_to_string

from e2a.core import errors
from e2a.core.problems import CONTENT_TYPE, problem, problem_headers
from e2a.core.requests import Scope, request_id_var
from sandboxes.preview.headers import Header
from sandboxes.preview.hosts import PreviewHost
from sandboxes.socket_access import NO_SANDBOX, SANDBOX_OVER, AttachRefused

STYLE: Final = (
    ":root{color-scheme:light dark}body{font:16px/1.6 system-ui,sans-serif;max-width:38rem;margin:12vh auto 0;"
    "padding:0 1.25rem}h1{font-size:1.4rem;line-height:1.3}code,pre{font:.9rem/1.5 ui-monospace,monospace}"
    "pre{padding:.8rem 1rem;overflow:auto;border:1px solid color-mix(in srgb,currentColor 25%,transparent);"
    "border-radius:.5rem}small{opacity:.7}"
)
_POLICY: Final = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; "
    f"style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'"
)


class BadGateway(errors.E2AError):
    """The server inside does not answer as it should; the sandbox's owner must act."""

    status = 502
    code = "bad_answer"
    title = "The server in the sandbox failed"


class GatewayTimeout(errors.E2AError):
    status = 504
    code = "port_silent"
    title = "The server in the sandbox does not answer"


def answered(error: Exception, preview: PreviewHost) -> errors.E2AError:
    """What is told of an error: nothing that a stranger may not know, everything that its owner can mend."""
    match error:
        case errors.GuestError(code="port_closed"):
            return BadGateway(f"Nothing listens on port {preview.port} of the sandbox.", code="port_closed")
        case errors.GuestError(code="port_silent"):
            return GatewayTimeout(f"Port {preview.port} of the sandbox accepts no connection.")
        case errors.GuestError(code="busy"):
            return errors.Unavailable("The sandbox has too many connections open.", code="busy")
        case AttachRefused(code=code) if code in (SANDBOX_OVER, NO_SANDBOX):
            return errors.Gone(error.reason, code="not_running")
        case errors.Conflict(code="not_running"):
            return errors.Gone(error.detail, code="not_running")
        case errors.GuestUnreachable() | errors.DeadlineExceeded() | errors.GuestError():
            return errors.Unavailable("The sandbox does not answer.", code="sandbox_unreachable")
        case errors.E2AError():
            return error
    return errors.OurError()


def refusal(scope: Scope, error: errors.E2AError, *, port: int | None) -> tuple[int, list[Header], bytes]:
    """Status, headers and body: a page for a browser, a problem for a program."""
    told = problem(error, request_id=request_id_var.get())
    accepts = b",".join(value for name, value in scope["headers"] if name == b"accept")
    if b"text/html" in accepts:
        body = str(
            render_to_string(
                "sandboxes/preview_refused.html", {"problem": told, "port": port, "style": STYLE}
            )
        )
        kind = "text/html; charset=utf-8"
    else:
        body, kind = json.dumps(told), CONTENT_TYPE
    headers = {
        "Content-Type": kind,
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "X-E2A-Answered-By": "preview",
        **problem_headers(error),
    }
    sent = body.encode()
    listed = [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
    return error.status, [*listed, (b"content-length", str(len(sent)).encode())], sent

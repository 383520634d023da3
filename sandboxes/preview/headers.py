"""What of a request reaches the server inside, and what of its answer reaches the browser. No I/O.

The server sees a request as from a browser on its own machine: `Host: localhost:<port>`, and an `Origin` or `Referer`
of its own preview says the same. So servers that check `Host` against rebinding, or `Origin` against `Host`, work as
they do at home. Where it really came from is in `X-Forwarded-*`. A redirect to that address is turned back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import parse_qs

from sandboxes.preview.hosts import PreviewHost

Header = tuple[bytes, bytes]

COOKIE: Final = "__Host-e2a-preview"
PLAIN_COOKIE: Final = "e2a-preview"
"""Without HTTPS, in development: browsers differ in whether they take the other one there."""
TOKEN_PARAMETER: Final = "e2a_token"  # noqa: S105  (a name)
TOKEN_HEADER: Final = b"x-e2a-token"

_OURS = re.compile(r"(?:__host-|__secure-)?e2a-", re.IGNORECASE)
_HOP_BY_HOP = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization"),
        *(b"te", b"trailer", b"transfer-encoding", b"upgrade"),
    }
)
_NOT_IN = _HOP_BY_HOP | {b"host", b"expect", b"content-length", b"cookie", b"forwarded", TOKEN_HEADER}
_NOT_OUT = _HOP_BY_HOP | {
    # What follows would act on more than this origin: on cookies of the whole domain, on another host's address.
    *(b"clear-site-data", b"alt-svc", b"x-request-id"),
}
_FOR_A_PROXY = re.compile(rb"x-(?:accel|sendfile|lighttpd|litespeed|reproxy)")
"""Orders to a proxy in front of us, which would open its files."""


def cookies_named(headers: Iterable[Header], name: str) -> list[str]:
    """All values of that name: a page of a neighbouring host may have planted others."""
    return [value for found, value in _pairs(headers) if found == name]


def _pairs(headers: Iterable[Header]) -> Iterable[tuple[str, str]]:
    for key, line in headers:
        if key == b"cookie":
            for pair in line.decode("latin-1").split(";"):
                name, _, value = pair.strip().partition("=")
                yield name.strip(), value


def without_token(query: bytes) -> bytes:
    """The query string without our parameter; the rest as it was, byte by byte."""
    mark = TOKEN_PARAMETER.encode()
    return b"&".join(part for part in query.split(b"&") if part.partition(b"=")[0] != mark)


def _connection_named(headers: Iterable[Header]) -> set[bytes]:
    """Headers that `Connection` names are hop-by-hop too."""
    return {
        name.strip().lower()
        for key, line in headers
        if key.lower() == b"connection"
        for name in line.split(b",")
    }


def request_headers(
    headers: list[Header], *, preview: PreviewHost, address: str, is_socket: bool = False
) -> list[Header]:
    """What the server inside is sent, besides the framing of the body."""
    dropped = _NOT_IN | _connection_named(headers)
    own, local = preview.origin.encode(), f"http://localhost:{preview.port}".encode()
    kept: list[Header] = [] if is_socket else [(b"host", f"localhost:{preview.port}".encode())]
    for name, value in headers:
        if name in dropped or name.startswith(b"x-forwarded-"):
            continue
        if is_socket and name.startswith(b"sec-websocket-"):
            continue
        if name == b"origin" and value == own:
            value = local
        elif name == b"referer" and (value == own or value.startswith(own + b"/")):
            value = local + without_token_of_url(value[len(own) :])
        kept.append((name, value))
    theirs = [
        f"{name}={value}" if value else name for name, value in _pairs(headers) if not _OURS.match(name)
    ]
    if theirs:
        kept.append((b"cookie", "; ".join(theirs).encode("latin-1")))
    scheme, _, host = preview.origin.partition("://")
    kept += [
        (b"x-forwarded-for", address.encode("latin-1")),
        (b"x-forwarded-host", host.encode()),
        (b"x-forwarded-proto", scheme.encode()),
    ]
    return kept


def without_token_of_url(url: bytes) -> bytes:
    path, mark, query = url.partition(b"?")
    query = without_token(query)
    return path + mark + query if query else path


def answer_headers(headers: Iterable[Header], *, preview: PreviewHost) -> list[Header]:
    """What the browser is sent of the server's headers."""
    listed = [(name.lower(), value) for name, value in headers]
    dropped = _NOT_OUT | _connection_named(listed)
    kept: list[Header] = []
    for name, value in listed:
        if name in dropped or _FOR_A_PROXY.match(name):
            continue
        if name == b"set-cookie":
            cookie = _host_only(value)
            if cookie is None:
                continue
            value = cookie
        elif name in (b"location", b"content-location"):
            value = _outside(value, preview)
        kept.append((name, value))
    kept += [(b"x-accel-buffering", b"no"), (b"x-robots-tag", b"noindex")]
    return kept


def _host_only(cookie: bytes) -> bytes | None:
    """A cookie for this host alone; None for one that would replace ours."""
    parts = cookie.split(b";")
    if _OURS.match(parts[0].strip().decode("latin-1")):
        return None
    return b";".join(part for part in parts if part.partition(b"=")[0].strip().lower() != b"domain")


def _outside(location: bytes, preview: PreviewHost) -> bytes:
    """The server's own address as the browser knows it."""
    found = re.match(
        rb"https?://(?:localhost|127\.0\.0\.1|0\.0\.0\.0|\[::1?\]):(\d+)(?=[/?#]|$)", location, re.IGNORECASE
    )
    if found is None:
        return location
    port = int(found[1][:6])
    if not 1 <= port <= 65535:
        return location
    return PreviewHost(preview.sandbox_id, port).origin.encode() + location[found.end() :]


def token_of(query: bytes, headers: list[Header]) -> tuple[str | None, bool]:
    """The token that was shown, and whether the address holds it."""
    named = [value for name, value in headers if name == TOKEN_HEADER]
    if named:
        return named[-1].decode("latin-1"), False
    values = parse_qs(query.decode("latin-1"), keep_blank_values=True).get(TOKEN_PARAMETER)
    return (values[-1], True) if values else (None, False)


def cookie_headers(value: str, *, preview: PreviewHost, seconds: int) -> list[Header]:
    """HttpOnly and for this host only. `None` and `Partitioned`: a page that frames a preview has its own cookie."""
    common = f"Max-Age={seconds}; Path=/; HttpOnly"
    cookies = [f"{COOKIE}={value}; {common}; Secure; SameSite=None; Partitioned"]
    if not preview.is_secure:
        cookies.append(f"{PLAIN_COOKIE}={value}; {common}; SameSite=Lax")
    return [(b"set-cookie", cookie.encode()) for cookie in cookies]

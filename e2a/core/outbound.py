"""The only way out for addresses that a tenant chose: one URL rule for saving and use, and one HTTP client.

`check_base_url` says at save time whether a URL may be named. `outbound_client` makes a client that checks
every request again, resolves by itself, refuses unless all addresses are public, dials exactly the address
it checked (the name stays in SNI, Host and the certificate check), never follows a redirect and ignores
proxies of the environment. See SECURITY.md 6.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Collection
from dataclasses import dataclass

import httpx2

from e2a.core.addresses import (
    Resolver,
    parse_address,
    resolve_public,
    system_resolver,
    target_refusal,
)
from e2a.core.errors import ValidationFailed
from e2a.core.outbound_transport import (
    AddressRefused,
    Dial,
    OutboundClient,
    Timeouts,
    client_ssl_context,
    dial_tcp,
    refused_address,
)

__all__ = [
    "AddressRefused",
    "CheckedUrl",
    "OutboundClient",
    "Timeouts",
    "check_base_url",
    "outbound_client",
    "refused_address",
    "resolve_public",
    "trusted_url",
]

MAX_URL = 2048
_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-f:.]+\]|[a-z0-9.-]+)(?::(?P<port>[1-9][0-9]{0,4}))?"
    r"(?P<path>(?:/[a-z0-9._~:@+=,-]+)*/?)",
    re.IGNORECASE | re.ASCII,
)
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class CheckedUrl:
    """A base URL in its one normal form: lower-case host, no default port, no slash at the end."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def _shown_host(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def authority(self) -> str:
        """`host:port`, the form that an allow list takes."""
        return f"{self._shown_host}:{self.port}"

    @property
    def origin(self) -> str:
        """Scheme, host and port: what a model key belongs to. The default port is left out."""
        port = "" if self.port == _DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{self._shown_host}{port}"

    @property
    def url(self) -> str:
        return self.origin + self.path

    def __str__(self) -> str:
        return self.url


def _parsed(url: str) -> CheckedUrl:
    """Raises ValueError with a sentence for a person."""
    if len(url) > MAX_URL:
        raise ValueError(f"It is longer than {MAX_URL} characters.")
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError("It must look like https://host/path: no user, query, fragment, space or encoding.")
    scheme = match["scheme"].lower()
    host = match["host"].lower().strip("[]")
    port = int(match["port"] or _DEFAULT_PORTS[scheme])
    path = match["path"].rstrip("/")
    if port > 65535:
        raise ValueError("Its port is not a port.")
    if any(segment in (".", "..") for segment in path.split("/")):
        raise ValueError("Its path has dot segments.")
    if ":" in host:
        address = parse_address(host)
        if address is None:
            raise ValueError("Its host is not an IPv6 address.")
        host = str(address)
    checked = CheckedUrl(scheme, host, port, path)
    # The client parses with httpx2: what was checked must be what it will dial.
    used = httpx2.URL(checked.url)
    used_port = used.port or _DEFAULT_PORTS[used.scheme]
    if (used.scheme, used.raw_host.decode(), used_port) != (scheme, host, port):
        raise ValueError("It can be read in two ways.")
    return checked


def check_base_url(url: str, *, allow_private: Collection[str] = (), field: str = "base_url") -> CheckedUrl:
    """The URL in its normal form, when a tenant may name it: HTTPS, port 443, a public host by its form.

    `allow_private` holds the operator's entries, `host` (any port) or `host:port`, that may be private and
    plain HTTP. Nothing is resolved: the client does that at each connect. Raises ValidationFailed
    `forbidden_url`.
    """
    try:
        checked = _parsed(url)
        reason = target_refusal(checked.scheme, checked.host, checked.port, allow_private)
    except (ValueError, httpx2.InvalidURL) as error:
        reason = str(error)
    if reason is not None:
        raise ValidationFailed.of(field, "forbidden_url", f"This base URL is not allowed. {reason}")
    return checked


def trusted_url(url: str) -> CheckedUrl:
    """A base URL that the operator set: any host, port and scheme. Its `authority` goes into `allow_private`.

    Raises ValueError when it is no URL of the plain form.
    """
    try:
        return _parsed(url)
    except httpx2.InvalidURL as error:
        raise ValueError(str(error)) from error


def outbound_client(
    *,
    allow_private: Collection[str] = (),
    timeouts: Timeouts | None = None,
    resolver: Resolver = system_resolver,
    dial: Dial = dial_tcp,
    ssl_context: ssl.SSLContext | None = None,
    max_response_bytes: int = 64 * 1024 * 1024,
) -> OutboundClient:
    """A client that can only reach public hosts over HTTPS, and what `allow_private` lists.

    Refused and unreachable hosts fail alike, as `httpx2.ConnectError` with one text; `refused_address` tells
    the log the difference. A 3xx is an ordinary response. Answers are never compressed. `abort()` works from
    any thread. `resolver`, `dial` and `ssl_context` are for tests.
    """
    return OutboundClient(
        allow_private=frozenset(allow_private),
        timeouts=timeouts or Timeouts(),
        resolver=resolver,
        dial=dial,
        ssl_context=ssl_context or client_ssl_context(),
        max_response_bytes=max_response_bytes,
    )

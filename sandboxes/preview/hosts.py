"""Which host is which port of which sandbox. No I/O.

A preview's host is `{port}-{id}.{domain}`, the id without `sbx_`: lower-case letters and digits only, so it survives
DNS, which knows neither case nor underscores, and a certificate for `*.{domain}` covers it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from django.conf import settings

from e2a.core.errors import NotBuilt

_LABEL = re.compile(r"([1-9][0-9]{0,4})-([a-z2-7]{16,50})")
_LOOKS_LIKE_ONE = re.compile(r"[0-9]+-")
_HOST = re.compile(r"([a-z0-9.-]{1,255})\.?(?::[0-9]{1,5})?")


@dataclass(frozen=True, slots=True)
class PreviewHost:
    """One port of one sandbox, which need not exist."""

    sandbox_id: str
    port: int

    @property
    def origin(self) -> str:
        """Scheme, host and port, as a browser says it in `Origin`."""
        parts = urlsplit(_preview_url())
        default = {"http": 80, "https": 443}[parts.scheme]
        port = "" if parts.port in (None, default) else f":{parts.port}"
        return f"{parts.scheme}://{self.port}-{self.sandbox_id.removeprefix('sbx_')}.{parts.hostname}{port}"

    @property
    def is_secure(self) -> bool:
        return _preview_url().startswith("https:")


def _preview_url() -> str:
    """Raises `NotBuilt` (`preview_not_configured`) where an operator has given no address for previews."""
    if settings.E2A.preview_url is None:
        raise NotBuilt("This installation has no address for previews.", code="preview_not_configured")
    return str(settings.E2A.preview_url)


def previews_check() -> None:
    """Raises `NotBuilt` (`preview_not_configured`)."""
    _preview_url()


def preview_host(host: str) -> PreviewHost | None:
    """What a `Host` header names. None: it is below the previews' domain and yet no preview's.

    Raises LookupError when it is none of ours to answer: the application's, or nonsense.
    """
    if settings.E2A.preview_url is None:
        raise LookupError(host)
    domain = urlsplit(settings.E2A.preview_url).hostname or ""
    found = _HOST.fullmatch(host.lower())
    name = found[1].rstrip(".") if found else ""
    if not name.endswith(f".{domain}"):
        raise LookupError(host)
    label = name.removesuffix(f".{domain}")
    # In development the application is on the same domain, as `localhost` or a name below it.
    if domain == "localhost" and not _LOOKS_LIKE_ONE.match(label):
        raise LookupError(host)
    match = _LABEL.fullmatch(label)
    if match is None or int(match[1]) > 65535:
        return None
    return PreviewHost(sandbox_id=f"sbx_{match[2]}", port=int(match[1]))


def preview_sources() -> list[str]:
    """Where a form of ours may lead, for the content policy; none where there are no previews."""
    if settings.E2A.preview_url is None:
        return []
    scheme, _, host = settings.E2A.preview_url.partition("://")
    return [f"{scheme}://*.{host}"]

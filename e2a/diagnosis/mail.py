"""Whether mail can be handed on: the server is asked, and nothing is sent."""

from __future__ import annotations

import os
import smtplib
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from django.conf import settings

from e2a.core.diagnosis import Finding, fail, ok, warn

SMTP_SECONDS = 5.0


def mail_findings() -> Iterator[Finding]:
    ours = settings.E2A
    url = ours.email_url
    if not url or url.startswith("file:"):
        yield _folder(Path(getattr(settings, "EMAIL_FILE_PATH", ours.data_dir / "mail")), is_meant=bool(url))
        return
    parts = urlsplit(url)
    port = parts.port or (465 if parts.scheme == "smtps" else 587)
    where = f"{parts.hostname}:{port}"
    try:
        said = _greet(parts.scheme, parts.hostname or "localhost", port, parts.username, parts.password)
    except smtplib.SMTPAuthenticationError as error:
        yield fail(
            "mail", f"{where} refuses the user of EMAIL_URL: {error.smtp_code}", "Correct user and password."
        )
    except (OSError, smtplib.SMTPException, ssl.SSLError) as error:
        yield fail(
            "mail",
            f"{where} does not answer: {error}"[:300],
            "Correct EMAIL_URL; nobody can sign in by mail.",
        )
    else:
        yield ok("mail", f"{where} answers{said}; nothing was sent")


def _folder(folder: Path, *, is_meant: bool) -> Finding:
    made = folder if folder.exists() else folder.parent
    if not os.access(made, os.W_OK):
        return fail("mail", f"{folder} cannot be written", "Give the workers' user the right to.")
    seen = f"goes into {folder}, to nobody else"
    if settings.E2A.production and not is_meant:
        return warn("mail", seen, "Set EMAIL_URL: people sign in by a mailed code.")
    return ok("mail", seen)


def _greet(scheme: str, host: str, port: int, user: str | None, password: str | None) -> str:
    """EHLO, STARTTLS and the sign-in as a real mail would, without a mail."""
    server: Any
    if scheme == "smtps":
        server = smtplib.SMTP_SSL(host, port, timeout=SMTP_SECONDS, context=ssl.create_default_context())
    else:
        server = smtplib.SMTP(host, port, timeout=SMTP_SECONDS)
    with server:
        server.ehlo()
        said = ""
        if scheme == "smtp+tls":
            server.starttls(context=ssl.create_default_context())
            server.ehlo()
            said = " by TLS"
        if user:
            server.login(unquote(user), unquote(password or ""))
            said += " and takes the user"
        return said

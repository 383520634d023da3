"""Mail that goes into a folder, one file each: development, tests, and hosts that hand mail on themselves."""

from __future__ import annotations

import datetime as dt
import email.policy
import os
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from email.message import EmailMessage as ParsedMessage
from email.parser import BytesParser
from pathlib import Path

from django.conf import settings
from django.core.mail import EmailMessage
from django.core.mail.backends.base import BaseEmailBackend

from e2a.core.clock import now
from e2a.core.ids import new_id


class FolderBackend(BaseEmailBackend):
    """Writes `<time>-<random>.eml` into `EMAIL_FILE_PATH`; in development prints the mail too.

    A file appears whole or not at all, readable by its owner only: it holds sign-in codes.
    """

    def send_messages(self, email_messages: Sequence[EmailMessage]) -> int:
        folder = mail_folder()
        folder.mkdir(parents=True, exist_ok=True)
        for message in email_messages:
            content = message.message().as_bytes()
            stem = f"{now():%Y%m%dT%H%M%S.%fZ}-{secrets.token_hex(4)}"
            draft = folder / f".{stem}.part"
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            draft.rename(folder / f"{stem}.eml")
            if not settings.E2A.production:
                _print(message)
        return len(email_messages)


def _print(message: EmailMessage) -> None:
    rule = "─" * 60
    text = (
        f"{rule}\nMail to {', '.join(message.to)}: {message.subject}\n\n{str(message.body).strip()}\n{rule}\n"
    )
    sys.stdout.write(text)
    sys.stdout.flush()


def mail_folder() -> Path:
    return Path(getattr(settings, "EMAIL_FILE_PATH"))  # noqa: B009  (set only when mail goes to a folder)


def goes_to_folder() -> bool:
    """Whether mail of this installation lands in a folder."""
    return settings.EMAIL_BACKEND == "accounts.mail.FolderBackend"


def mail_send(*, to: str, subject: str, text: str) -> None:
    """Send one plain text mail now. Raises what the back end raises: `OSError`, `SMTPException`."""
    # An id of our own: Django's holds the host's name and runs of digits that look like a code.
    message = EmailMessage(subject, text, to=[to], headers={"Message-ID": f"<{new_id('mail')}@e2a>"})
    message.send()


@dataclass(frozen=True, slots=True)
class StoredMail:
    """A mail out of the folder, for the development page."""

    to: str
    subject: str
    text: str
    at: dt.datetime


def mails_newest(count: int) -> list[StoredMail]:
    """The newest mails of the folder, newest first. A file that vanishes meanwhile is left out."""
    folder = mail_folder()
    names = sorted((path for path in folder.glob("*.eml")), reverse=True)[:count] if folder.is_dir() else []
    found = []
    for path in names:
        try:
            found.append(_parsed(path))
        except FileNotFoundError:
            continue
    return found


def _parsed(path: Path) -> StoredMail:
    at = dt.datetime.fromtimestamp(path.stat().st_mtime, dt.UTC)
    parsed = BytesParser(_class=ParsedMessage, policy=email.policy.default).parsebytes(path.read_bytes())
    body = parsed.get_body(("plain",))
    text = body.get_content() if body is not None else ""
    return StoredMail(to=str(parsed["To"]), subject=str(parsed["Subject"]), text=str(text).strip(), at=at)

"""`manage.py quickstart`: the newcomer's proof, and the operator's smoke test."""

from __future__ import annotations

import re
import time
from typing import Any, Final, cast, get_args
from urllib.parse import urlsplit

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from accounts.mail import goes_to_folder, mail_folder, mails_newest
from e2a.quickstart import (
    DEFAULT_MODEL,
    PROMPTS,
    AgentKind,
    Plan,
    QuickstartFailed,
    Screen,
    quickstart_play,
)
from e2a.settings.environment import llm_api_key

MAIL_SECONDS: Final = 30.0
DEVELOPMENT_EMAIL: Final = "quickstart@example.com"
_CODE: Final = re.compile(r"^\s*([0-9]{6}|(?:[A-Z2-7]{4}-){3}[A-Z2-7]{4})\s*$", re.MULTILINE)


class Command(BaseCommand):
    help = (
        "Play the public quickstart against a running server over real HTTP and WebSocket, showing it all. "
        "Succeeds only when the task's exit code is 0."
    )
    requires_system_checks: list[str] = []  # It knows a server by its address only.

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--url", help="the server; by default E2A_PUBLIC_URL, else what E2A_BIND says")
        parser.add_argument(
            "--agent", choices=get_args(AgentKind), help="by default deictic with a model key, else shell"
        )
        parser.add_argument("--email", help=f"who signs in; in development {DEVELOPMENT_EMAIL}")
        parser.add_argument(
            "--llm-key", help="the model key for deictic; by default LLM_API_KEY of the environment"
        )
        parser.add_argument(
            "--model", default=DEFAULT_MODEL, help="the model for deictic; by default %(default)s"
        )
        parser.add_argument("--prompt", help="another task than listing the files")

    def handle(self, *args: Any, **options: Any) -> None:
        url = (options["url"] or _own_url()).rstrip("/")
        if urlsplit(url).scheme not in ("http", "https"):
            raise CommandError(f"--url {url}: an address begins with http:// or https://.")
        llm_key = options["llm_key"] or llm_api_key()
        agent = cast(AgentKind, options["agent"] or ("deictic" if llm_key else "shell"))
        if agent == "deictic" and not llm_key:
            raise CommandError("The agent deictic calls a model: set LLM_API_KEY, or give --llm-key.")
        reads_folder = not settings.E2A.production and goes_to_folder() and _is_this_machine(url)
        email = options["email"] or (DEVELOPMENT_EMAIL if reads_folder else "")
        if not email:
            raise CommandError("Say who signs in: --email. The code is mailed there.")
        began = time.time()
        screen = Screen(self._write)
        plan = Plan(
            url=url,
            email=email,
            agent=agent,
            prompt=options["prompt"] or PROMPTS[agent],
            read_code=lambda: self._mailed_code(email, began) if reads_folder else self._asked_code(email),
            llm_key=llm_key,
            model=options["model"],
        )
        try:
            exit_code = quickstart_play(plan, screen)
        except QuickstartFailed as error:
            screen.close_output()
            raise CommandError(str(error)) from error
        except KeyboardInterrupt:
            screen.close_output()
            raise CommandError("Stopped.", returncode=130) from None
        if exit_code != 0:
            raise CommandError(f"The task ended with {exit_code}.")

    def _write(self, text: str) -> None:
        self.stdout.write(text, ending="")
        self.stdout.flush()

    def _mailed_code(self, email: str, since: float) -> str:
        """The code in the newest mail to that address. Raises `QuickstartFailed` after 30 s without one."""
        folder = mail_folder()
        deadline = time.monotonic() + MAIL_SECONDS
        while True:
            for mail in mails_newest(20):
                # A file's time is cut to the clock's tick, so a mail may look a moment older than it is.
                if (
                    mail.to == email
                    and mail.at.timestamp() >= since - 0.1
                    and (found := _CODE.search(mail.text))
                ):
                    self._write(f"  The mail is in {folder}.\n")
                    return found[1]
            if time.monotonic() > deadline:
                raise QuickstartFailed(
                    f"No mail to {email} came into {folder} within {MAIL_SECONDS:g} s. Does the worker run? "
                    "Has this command the server's E2A_DATA_DIR and EMAIL_URL?"
                )
            time.sleep(0.1)

    def _asked_code(self, email: str) -> str:
        self._write(f"  The code mailed to {email}: ")
        try:
            code = input().strip()
        except EOFError:
            raise QuickstartFailed("No code was typed in.") from None
        if not code:
            raise QuickstartFailed("No code was typed in.")
        return code


def _own_url() -> str:
    """Where this installation serves."""
    host, _, port = settings.E2A.bind.rpartition(":")
    return settings.E2A.public_url or f"http://{'127.0.0.1' if host in ('', '0.0.0.0') else host}:{port}"  # noqa: S104


def _is_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "127.0.0.1", "::1") or host == settings.E2A.bind.rpartition(":")[0]

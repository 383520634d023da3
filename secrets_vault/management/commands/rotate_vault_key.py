"""`manage.py rotate_vault_key`: wrap every tenant's data key with the newest key of E2A_VAULT_KEYS."""

from __future__ import annotations

import base64
import secrets
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from e2a.core.clock import now
from e2a.core.idempotency import KEPT_SECONDS
from e2a.core.keyring import KeyRing, KeyRingError
from secrets_vault.rotation import BATCH, Rotation, data_keys_rewrap, wrapped_by


class Command(BaseCommand):
    help = (
        "Wrap every tenant's data key with the newest (first) key of E2A_VAULT_KEYS, while everything runs. First "
        "put the new key in front of the ring and restart all processes; remove the old key only when this says so."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--new-key", action="store_true", help="Only print a new key for the ring.")
        parser.add_argument("--check", action="store_true", help="Only say which keys hold how much.")
        parser.add_argument(
            "--batch", type=int, default=BATCH, help=f"Data keys in one transaction ({BATCH})."
        )

    def handle(self, *args: Any, **options: Any) -> None:
        if options["new_key"]:
            encoded = base64.b64encode(secrets.token_bytes(32)).decode()
            self.stdout.write(f"{now():k%y%m%d%H%M}:{encoded}")
            return
        ring: KeyRing = settings.E2A.vault_keys
        try:
            newest = ring.newest
        except KeyRingError as error:
            raise CommandError(str(error)) from error
        if not 1 <= options["batch"] <= 10_000:
            raise CommandError("--batch is 1 to 10000")
        if options["check"]:
            self._tell(ring, Rotation())
            return
        done = data_keys_rewrap(ring, batch=options["batch"], progress=self._progress)
        self.stdout.write(f"{done.rewrapped} data keys are wrapped by {newest.id!r} now.")
        self._tell(ring, done)
        if done.failed:
            raise CommandError(f"{len(done.failed)} data keys do not open and are as they were.")

    def _progress(self, done: Rotation) -> None:
        self.stdout.write(f"  {done.rewrapped} …")

    def _tell(self, ring: KeyRing, done: Rotation) -> None:
        """What each key still holds, and which may go."""
        for tenant, why in sorted(done.failed.items()):
            self.stderr.write(f"  {tenant}: {why}")
        held = wrapped_by()
        for key_id in sorted(held.keys() - {key.id for key in ring.keys}):
            self.stderr.write(f"{key_id!r} is not in the ring, and {held[key_id]} data keys need it.")
        for number, key in enumerate(ring.keys):
            count = held.get(key.id, 0)
            if number == 0:
                self.stdout.write(f"{key.id!r} is the newest: it wraps {count}.")
            elif count:
                self.stdout.write(f"{key.id!r} still wraps {count}: keep it, and run this again.")
            else:
                self.stdout.write(
                    f"{key.id!r} wraps none: take it out of E2A_VAULT_KEYS {KEPT_SECONDS // 3600} h after the last "
                    "process was restarted with the new key (stored answers of idempotent requests live that long)."
                )

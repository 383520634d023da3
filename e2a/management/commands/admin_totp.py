"""`manage.py admin_totp ADDRESS`: an operator's second factor."""

from __future__ import annotations

import io
from typing import Any

import qrcode
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction
from django_otp.plugins.otp_totp.models import TOTPDevice

from accounts.addresses import address_key
from accounts.audit import audit_write
from accounts.models import User


class Command(BaseCommand):
    help = (
        "Give an operator (see createsuperuser) a second factor for the admin; shows it once, to be scanned."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("address", help="The operator's e-mail address.")
        parser.add_argument("--replace", action="store_true", help="In place of the one that there is.")

    def handle(self, *args: Any, **options: Any) -> None:
        user = User.objects.filter(email_key=address_key(options["address"])).first()
        if user is None or not user.is_staff:
            raise CommandError(f"{options['address']} is no operator. Make one: manage.py createsuperuser")
        with transaction.atomic():
            old = TOTPDevice.objects.filter(user=user)
            if old.exists() and not options["replace"]:
                raise CommandError(f"{user.email} has a second factor already; say --replace for a new one.")
            old.delete()
            device = TOTPDevice.objects.create(user=user, name="authenticator", confirmed=True)
            audit_write("admin.totp_set", tenant_id=user.tenant_id, target=user.public_id)
        picture = qrcode.QRCode(border=2)
        picture.add_data(device.config_url)
        drawn = io.StringIO()
        picture.print_ascii(out=drawn, invert=True)
        self.stdout.write(drawn.getvalue())
        self.stdout.write(device.config_url)
        self.stdout.write("Scan it, or type it into an authenticator. It is not shown again.")

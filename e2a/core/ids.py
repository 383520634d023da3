"""Public ids: a prefix that says what it is, and 26 base32 characters (130 bits) from the system's CSPRNG."""

from __future__ import annotations

import re
import secrets
from typing import Any

from django.db import models

ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
LENGTH = 26
PATTERN = re.compile(r"^(usr|ten|key|sec|ses|tsk|sbx|job|req|apr|snp|prv)_[a-z2-7]{16,64}$")


def new_id(prefix: str) -> str:
    """A fresh id such as `ses_k3v…`. One call of the CSPRNG: 32 symbols divide a byte's 256 without bias."""
    return prefix + "_" + "".join(ALPHABET[byte & 31] for byte in secrets.token_bytes(LENGTH))


class _NewId:
    """A serialisable default, so that migrations can name it."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def __call__(self) -> str:
        return new_id(self.prefix)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _NewId) and other.prefix == self.prefix

    def __hash__(self) -> int:
        return hash(self.prefix)

    def deconstruct(self) -> tuple[str, list[str], dict[str, Any]]:
        return ("e2a.core.ids._NewId", [self.prefix], {})


class PublicIdField(models.CharField[str, str]):
    """The id that leaves the database. Rows keep a small integer key for joins; only this one is shown."""

    def __init__(self, prefix: str = "", **kwargs: Any) -> None:
        self.prefix = prefix
        kwargs.update(max_length=40, unique=True, editable=False, default=_NewId(prefix))
        super().__init__(**kwargs)

    def get_prep_value(self, value: Any) -> Any:
        """A look-up of what cannot be an id finds nothing: PostgreSQL fails on NUL, and anybody writes paths."""
        if isinstance(value, str) and ("\0" in value or not value.isascii()):
            return ""
        return super().get_prep_value(value)

    def deconstruct(self) -> Any:
        name, path, args, kwargs = super().deconstruct()
        for key in ("max_length", "unique", "editable", "default"):
            kwargs.pop(key, None)
        return name, path, [self.prefix, *args], kwargs

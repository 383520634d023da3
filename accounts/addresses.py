"""Mail addresses: one accepted spelling, and one look-up key for all spellings that mean the same mailbox."""

from __future__ import annotations

import re
import unicodedata

import idna

MAX_LENGTH = 254
"""RFC 5321 allows a path of 256 with its brackets."""

_LOCAL = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*")
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


class AddressError(ValueError):
    """No address that mail could be sent to. The message is a sentence for the person who typed it."""


def address_clean(text: str) -> str:
    """The address without blanks around it, its domain in ASCII form. Raises `AddressError`.

    Quoted local parts, domain literals, lists, control characters and letters that merely look like ASCII
    ones (`ı`, the Kelvin sign, full-width letters) are refused: each is a way to two spellings of one
    mailbox, or to two mailboxes of one spelling (SECURITY 1.11).
    """
    address = text.strip(" \t")
    if len(address) > MAX_LENGTH:
        raise AddressError(f"An address has at most {MAX_LENGTH} characters.")
    local, _, domain = address.rpartition("@")
    if any(_folds_to_ascii(char) for char in address):
        raise AddressError("This address has a letter that only looks like a plain one.")
    if not domain.isascii():
        try:
            domain = idna.encode(domain.lower()).decode()
        except (idna.IDNAError, UnicodeError) as error:
            raise AddressError("The part after the @ is no domain name.") from error
    labels = domain.split(".")
    if len(local) > 64 or not _LOCAL.fullmatch(local):
        raise AddressError("This is not a mail address.")
    if len(domain) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise AddressError("The part after the @ is no domain name.")
    if domain.lower() != "localhost" and (len(labels) < 2 or labels[-1].isdigit()):
        raise AddressError("The part after the @ is no domain name.")
    if len(local) + 1 + len(domain) > MAX_LENGTH:
        raise AddressError(f"An address has at most {MAX_LENGTH} characters.")
    return f"{local}@{domain}"


def address_key(address: str) -> str:
    """What the address is looked up by: NFKC, case folded, no blanks around it. Never mailed to."""
    return unicodedata.normalize("NFKC", address.strip(" \t")).casefold()


def _folds_to_ascii(char: str) -> bool:
    if char.isascii():
        return False
    folded = unicodedata.normalize("NFKD", char).casefold()
    # 'é' decomposes into an ASCII letter too, but composes back to itself; a look-alike does not.
    composed = unicodedata.normalize("NFKC", char).casefold()
    return folded.isascii() or any(part.isascii() for part in composed) or char == "ı"

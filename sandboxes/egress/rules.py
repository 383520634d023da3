"""Egress rules: which hosts and ports a sandbox may reach. Default deny; a deny beats every allow.

A rule is a host with an optional port:

    api.example.com        this host, on ports 80 and 443
    api.example.com:8443   this host, on that port
    *.example.com          every host below example.com, at any depth; neither example.com nor evilexample.com
    *                      every public host
    203.0.113.7, [2001:db8::1]:443   an address, only when it is asked for as such

Hosts are compared as lower-case A-labels (IDNA 2008, with UTS 46 mapping for what a person types) without the dot at
the end. What a name resolves to is checked apart from this when it is dialled: private addresses are refused
whatever a rule says.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import idna

from e2a.core.addresses import is_allowed_private, name_refusal, parse_address
from e2a.core.errors import FieldError, ValidationFailed

DEFAULT_PORTS: Final = frozenset({80, 443})
"""What a rule without a port means (SECURITY 5.7)."""
MAX_RULES: Final = 200
"""In each list. All of them are looked at for every connection: some 20 µs."""
MAX_RULE_CHARS: Final = 300
_PORT = re.compile(r"[1-9][0-9]{0,4}")


class BadHost(ValueError):
    """The text names no host; says why."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of a list, in its one normal form."""

    host: str
    """An A-label name, an address as Python spells it, or `*`."""
    below: bool
    """The rule is for what is below `host`, not for `host`."""
    port: int | None
    """Only this port; None: 80 and 443."""

    def matches(self, host: str, port: int) -> bool:
        """Whether the rule speaks of this host (normal form) and port."""
        if port not in DEFAULT_PORTS if self.port is None else port != self.port:
            return False
        if self.host == "*":
            return parse_address(host) is None
        return host.endswith("." + self.host) if self.below else host == self.host

    def __str__(self) -> str:
        shown = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'*.' if self.below else ''}{shown}{'' if self.port is None else f':{self.port}'}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a connection may be made, and what decided it."""

    is_allowed: bool
    reason: str
    """`allowed`, `denied` (a deny rule) or `not_allowed` (no rule speaks of it)."""
    rule: str = ""


@dataclass(frozen=True, slots=True)
class EgressRules:
    """Both lists. The empty one allows nothing."""

    allow: tuple[Rule, ...] = ()
    deny: tuple[Rule, ...] = ()

    @classmethod
    def parse(
        cls, given: object, *, field: str = "egress", allow_private: Collection[str] = ()
    ) -> EgressRules:
        """Rules as the API takes them, `{"allow": [text…], "deny": [text…]}`.

        `allow_private` are hosts of `E2A_EGRESS_ALLOW_PRIVATE`, which may be named although they look like those of a
        local network. Raises `ValidationFailed` (`bad_egress`) with every entry that is wrong.
        """
        if not isinstance(given, Mapping) or given.keys() - {"allow", "deny"}:
            raise ValidationFailed.of(field, "bad_egress", 'This is {"allow": [hosts], "deny": [hosts]}.')
        errors: list[FieldError] = []
        lists = {
            name: _list(given.get(name, []), f"{field}.{name}", errors, allow_private)
            for name in ("allow", "deny")
        }
        if errors:
            raise ValidationFailed(errors[0].detail, code="bad_egress", errors=errors)
        return cls(lists["allow"], lists["deny"])

    @classmethod
    def stored(cls, kept: Mapping[str, Any]) -> EgressRules:
        """What `as_json` made. Raises BadHost."""
        allow, deny = (
            tuple(rule_parse(text, is_checked=True) for text in kept.get(name, ()))
            for name in ("allow", "deny")
        )
        return cls(allow, deny)

    def as_json(self) -> dict[str, list[str]]:
        return {"allow": [str(rule) for rule in self.allow], "deny": [str(rule) for rule in self.deny]}

    def joined(self, other: EgressRules) -> EgressRules:
        """Both together: a template's rules and a request's."""
        return EgressRules(
            tuple(dict.fromkeys(self.allow + other.allow)), tuple(dict.fromkeys(self.deny + other.deny))
        )

    def verdict(self, host: str, port: int) -> Verdict:
        """What becomes of a connection to this host (normal form) and port."""
        for rule in self.deny:
            if rule.matches(host, port):
                return Verdict(False, "denied", str(rule))
        for rule in self.allow:
            if rule.matches(host, port):
                return Verdict(True, "allowed", str(rule))
        return Verdict(False, "not_allowed")


def rule_parse(text: str, *, allow_private: Collection[str] = (), is_checked: bool = False) -> Rule:
    """Raises BadHost. `is_checked`: it was parsed before, so that a name may be one of a local network."""
    text = text.strip()
    if not text or len(text) > MAX_RULE_CHARS:
        raise BadHost(f"A rule has 1 to {MAX_RULE_CHARS} characters.")
    host, port = _port_off(text)
    if host == "*":
        return Rule("*", False, port)
    below = host.startswith("*.")
    name = host_normal(host[2:] if below else host)
    if below and parse_address(name) is not None:
        raise BadHost("Nothing is below an address.")
    listed = not below and is_allowed_private(name, port or 80, allow_private)
    if parse_address(name) is None and not listed and not is_checked:
        # One label may be a whole registry (`*.com`), but not a name of a local network.
        reason = name_refusal(f"a.{name}" if below else name)
        if reason is not None:
            raise BadHost(f"It must name a public host; {reason}.")
    return Rule(name, below, port)


def rule_text(host: str, port: str) -> str:
    """The rule for one host and port, as a person would write it. Not checked."""
    shown = f"[{host}]" if ":" in host else host
    return shown if port.isdigit() and int(port) in DEFAULT_PORTS else f"{shown}:{port}"


def host_normal(text: str) -> str:
    """The one form of a host name or address that rules and requests are compared in. Raises BadHost.

    `[…]` around an IPv6 address, capitals, a dot at the end and U-labels are taken; anything else that is not a plain
    host name is refused.
    """
    if text.startswith("[") or text.endswith("]"):
        address = parse_address(text[1:-1]) if text.startswith("[") and text.endswith("]") else None
        if address is None or address.version != 6:
            raise BadHost("In brackets there is an IPv6 address.")
        return str(address)
    address = parse_address(text)
    if address is not None:
        return str(address)
    name = text.removesuffix(".")
    if not name or len(name) > 253 or "*" in name:
        raise BadHost("It is not a host name.")
    try:
        encoded = idna.encode(name, uts46=True).decode() if not name.isascii() else name.lower()
    except (idna.IDNAError, UnicodeError) as error:
        raise BadHost("It is not a host name.") from error
    if not re.fullmatch(
        r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*", encoded
    ):
        raise BadHost("It is not a host name.")
    return encoded


def _port_off(text: str) -> tuple[str, int | None]:
    """`host:port` in two. An IPv6 address needs brackets to have a port."""
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not host.endswith("]")) or text.endswith("]"):
        return text, None
    if not _PORT.fullmatch(port) or int(port) > 65535:
        raise BadHost("A port is 1 to 65535.")
    return host, int(port)


def _list(
    given: object, field: str, errors: list[FieldError], allow_private: Collection[str]
) -> tuple[Rule, ...]:
    if not isinstance(given, Sequence) or isinstance(given, str | bytes) or len(given) > MAX_RULES:
        errors.append(FieldError(field, "bad_egress", f"This is a list of at most {MAX_RULES} hosts."))
        return ()
    return tuple(dict.fromkeys(_entries(given, field, errors, allow_private)))


def _entries(
    given: Sequence[object], field: str, errors: list[FieldError], allow_private: Collection[str]
) -> Iterable[Rule]:
    for number, entry in enumerate(given):
        try:
            if not isinstance(entry, str):
                raise BadHost("This is a text.")
            yield rule_parse(entry, allow_private=allow_private)
        except BadHost as bad:
            errors.append(FieldError(f"{field}.{number}", "bad_egress", str(bad)))

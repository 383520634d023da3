"""Which hosts and addresses of the outside world may be reached on a tenant's behalf.

Pure rules and one bounded name look-up; nothing here connects. The numbers are SECURITY.md 6.2, 6.3 and 6.7.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable, Collection, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import idna

IPAddress = IPv4Address | IPv6Address
Resolver = Callable[[str, int], Sequence[str]]
"""(host, port) to address texts. Raises OSError when the name has none."""

MAX_LOOKUPS = 64
"""Name look-ups at once in one process. They cannot be interrupted, so slow ones pile up here."""

_NEVER: tuple[IPv4Network | IPv6Network, ...] = tuple(
    ip_network(text)
    for text in (
        "0.0.0.0/8",  # "This host": Linux connects to loopback.
        "169.254.0.0/16",  # Link-local, the metadata service of most clouds.
        "100.100.100.200/32",  # Alibaba's metadata service.
        "168.63.129.16/32",  # Azure's wire server, in a public range.
        "224.0.0.0/4",
        "240.0.0.0/4",
        "::/128",
        "::ffff:0:0/96",  # IPv4 in disguise.
        "64:ff9b::/96",
        "64:ff9b:1::/48",
        "2001::/32",
        "2002::/16",
        "fd00:ec2::/32",  # AWS metadata.
        "fd20:ce::/32",  # Google's metadata.
        "fe80::/10",
        "ff00::/8",
    )
)
_NOT_PUBLIC: tuple[IPv4Network | IPv6Network, ...] = tuple(
    ip_network(text)
    for text in (
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "::/96",
        "2001::/23",
        "fc00::/7",
        "fec0::/10",
    )
)
_INSIDE_SUFFIXES = (
    "localhost", "localdomain", "local", "internal", "intranet", "private", "corp", "home", "lan",
    "home.arpa",
    # Public names whose only purpose is to resolve to an address that the name chooses.
    "nip.io", "sslip.io", "xip.io", "localtest.me", "lvh.me", "vcap.me", "lacolhost.com", "traefik.me",
)  # fmt: skip
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_EMBEDDED_IPV4 = re.compile(
    r"(?<![0-9])([0-9]{1,3})[.-]([0-9]{1,3})[.-]([0-9]{1,3})[.-]([0-9]{1,3})(?![0-9])"
)


class NameLookupError(OSError):
    """The name has no address, or none came in time."""


class NotPublicError(Exception):
    """The name or one of its addresses may not be reached. `reason` is for the log, never for the tenant."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def parse_address(text: str) -> IPAddress | None:
    """The address that `text` spells in its usual form; None for a name, a zone id and any other spelling."""
    if "%" in text:
        return None
    try:
        return ip_address(text)
    except ValueError:
        return None


def is_allowed_private(host: str, port: int, allow_private: Collection[str]) -> bool:
    """Whether the operator listed this host. Entries are `host` (any port), `host:port`, `[ipv6]:port`."""
    shown = f"[{host}]" if ":" in host else host
    return any(entry.lower() in (host, shown, f"{shown}:{port}") for entry in allow_private)


def address_refusal(address: IPAddress, *, private_ok: bool = False) -> str | None:
    """Why this address may not be dialled, or None. `private_ok` lifts private ranges, but never metadata."""
    for network in _NEVER:
        if address.version == network.version and address in network:
            return f"{address} is in {network}, which is never dialled"
    if private_ok:
        return None
    for network in _NOT_PUBLIC:
        if address.version == network.version and address in network:
            return f"{address} is in {network}"
    if not address.is_global or address.is_multicast:
        return f"{address} is not a public address"
    if is_own_address(address):
        return f"{address} is this machine"
    return None


def is_own_address(address: IPAddress) -> bool:
    """Whether the address is one of this machine's. Asks the routing table, sends nothing, some 10 µs."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(address), 9))
            # The kernel talks to a local address from that same address.
            return parse_address(str(probe.getsockname()[0])) == address
    except OSError:
        return False  # No route there: then it is not here.


def name_refusal(host: str) -> str | None:
    """Why this lower-case host name cannot be a public one, by its form alone; None when it can."""
    if not host or len(host) > 253:
        return "it is empty or longer than 253 characters"
    labels = host.split(".")
    if not all(_LABEL.fullmatch(label) for label in labels):
        return "it is not a host name in ASCII form (internationalised names as xn--…, no trailing dot)"
    for label in labels:
        if label.startswith("xn--"):
            try:
                idna.decode(label)
            except (idna.IDNAError, UnicodeError):
                return "it has a label that is no valid internationalised name"
    if _NUMBER.fullmatch(labels[-1]):
        return "it is an unusual spelling of an address"
    if len(labels) == 1:
        return "it is a name of a local network"
    if any(host == suffix or host.endswith("." + suffix) for suffix in _INSIDE_SUFFIXES):
        return "it is a name of a local network"
    for match in _EMBEDDED_IPV4.finditer(host):
        embedded = parse_address(".".join(match.groups()))
        if embedded is not None and address_refusal(embedded) is not None:
            return "it carries a private address"
    return None


def target_refusal(scheme: str, host: str, port: int, allow_private: Collection[str] = ()) -> str | None:
    """Why nothing may be sent to this scheme, lower-case host and port, as a sentence; None when it may.

    Looks at the form only; the addresses behind a name are checked when it is dialled.
    """
    allowed = is_allowed_private(host, port, allow_private)
    if not allowed:
        if scheme != "https":
            return "It must begin with https://."
        if port != 443:
            return "It must use port 443."
    address = parse_address(host)
    if address is not None:
        return address_refusal(address, private_ok=allowed) and "It must name a public host."
    if not allowed and (reason := name_refusal(host)) is not None:
        return f"It must name a public host; {reason}."
    return None


def system_resolver(host: str, port: int) -> list[str]:
    """All addresses of the name, in the order the system prefers."""
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return [str(sockaddr[0]) for _, _, _, _, sockaddr in answers]


_lookup_slots = threading.BoundedSemaphore(MAX_LOOKUPS)


class NameLookup:
    """One look-up in a thread of its own, since `getaddrinfo` knows no time limit and cannot be stopped.

    `cancel` may be called from any thread and makes `wait` return at once.
    """

    def __init__(self, host: str, port: int, resolver: Resolver) -> None:
        self._host = host
        self._port = port
        self._resolver = resolver
        self._done = threading.Event()
        self._answers: list[str] | None = None
        if not _lookup_slots.acquire(blocking=False):
            raise NameLookupError(f"{MAX_LOOKUPS} name look-ups are under way already")
        threading.Thread(target=self._run, name=f"lookup {host}", daemon=True).start()

    def _run(self) -> None:
        try:
            # UnicodeError: the system's own IDNA step refuses the name.
            with contextlib.suppress(OSError, UnicodeError):
                self._answers = list(dict.fromkeys(self._resolver(self._host, self._port)))
        finally:
            _lookup_slots.release()
            self._done.set()

    def cancel(self) -> None:
        self._done.set()

    def wait(self, seconds: float) -> list[str]:
        """The answers, never empty. Raises NameLookupError: none, not in time, or cancelled."""
        self._done.wait(seconds)
        if not self._answers:
            raise NameLookupError(f"no address for {self._host} within {seconds:g} s")
        return self._answers


def checked_addresses(
    host: str, port: int, answers: Sequence[str], *, allow_private: Collection[str] = ()
) -> list[IPAddress]:
    """The answers as addresses, when **all** of them may be dialled; else raises NotPublicError."""
    private_ok = is_allowed_private(host, port, allow_private)
    addresses: list[IPAddress] = []
    for text in answers:
        address = parse_address(text)
        if address is None:
            raise NotPublicError(f"{host} resolves to {text!r}, which is not a plain address")
        reason = address_refusal(address, private_ok=private_ok)
        if reason is not None:
            raise NotPublicError(f"{host}: {reason}")
        addresses.append(address)
    return addresses


def resolve_public(
    host: str,
    port: int,
    *,
    allow_private: Collection[str] = (),
    resolver: Resolver = system_resolver,
    seconds: float = 5.0,
) -> list[IPAddress]:
    """The addresses of a host, all of them checked; dial only these. `host` may be an address itself.

    Raises NotPublicError when any address may not be reached, NameLookupError when none came in `seconds`.
    """
    if parse_address(host) is not None:
        return checked_addresses(host, port, [host], allow_private=allow_private)
    answers = NameLookup(host, port, resolver).wait(seconds)
    return checked_addresses(host, port, answers, allow_private=allow_private)

"""Whether the nodes that the database knows are alive, their gateways with them, and the broker."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from django.conf import settings

from e2a.core.clock import now
from e2a.core.diagnosis import Finding, fail, ok, warn
from sandboxes.gateway.address import UnixAddress, address_parse, socket_path
from sandboxes.models import Node
from sandboxes.pool_figures import pool_figures
from sandboxes.selectors import HEARTBEAT_SECONDS

GATEWAY_SECONDS = 3.0
START = "Start it with `manage.py up`, or as docs/reference/commands.md says."


def node_findings() -> Iterator[Finding]:
    """Each node: heartbeat, engine, what it wants an operator to see; and its gateway."""
    nodes = list(Node.objects.order_by("name"))
    if not nodes:
        yield fail("node", "no node has ever reported", START)
    for node in nodes:
        age = None if node.heartbeat_at is None else (now() - node.heartbeat_at).total_seconds()
        check = f"node {node.name}"
        if age is None or age > HEARTBEAT_SECONDS:
            seen = "never reported" if age is None else f"last reported {age:.0f} s ago"
            yield fail(check, seen, f"{START} If that host is gone for good, delete the row.")
            continue
        if not node.is_engine_up:
            yield fail(
                check,
                f"alive, but its engine is not: {node.detail}",
                "Mend Docker there.",
            )
        else:
            yield ok(check, f"alive, {node.engine_version}, room for {node.capacity}")
        if node.notice:
            yield fail(check, node.notice, "Until then it removes no container that no row knows.")
        for sentence in node.soft_limits:
            yield warn(check, sentence, "Run its node process as root, or live with it.")
        yield address_finding(f"gateway of {node.name}", node.address)


def broker_findings() -> Iterator[Finding]:
    """The model broker, where gateways look for it."""
    yield address_finding("broker", settings.E2A.broker_address)


def address_finding(check: str, address: str) -> Finding:
    """Whether somebody of ours answers `/healthz` there within 3 s."""
    try:
        answer = _healthz(address)
    except (OSError, ValueError) as error:
        return fail(check, f"{address} does not answer: {error}", START)
    if b" 200 " not in answer.split(b"\r\n", 1)[0]:
        return fail(check, f"{address} answers {answer[:80]!r}", "Something else listens there.")
    return ok(check, f"{address} answers")


def _healthz(address: str) -> bytes:
    found = address_parse(address)
    request = b"GET /healthz HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n\r\n"
    if isinstance(found, UnixAddress):
        with socket_path(found.path) as path, socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(GATEWAY_SECONDS)
            connection.connect(path)
            connection.sendall(request)
            return connection.recv(4096)
    with socket.create_connection((found.host, found.port), GATEWAY_SECONDS) as connection:
        connection.settimeout(GATEWAY_SECONDS)
        connection.sendall(request)
        return connection.recv(4096)


def pool_findings() -> Iterator[Finding]:
    """Whether the pool serves: more misses than hits in a day is worth a word."""
    for one in pool_figures():
        rate = one.hit_rate
        seen = f"{one.parked} of {one.wanted} parked; in 24 h {one.hits} warm and {one.missed} cold creates"
        if rate is not None and rate < 0.5 and one.wanted:
            yield warn(
                f"pool of {one.template}",
                f"{seen}: {one.reasons}",
                "Raise E2A_POOL, E2A_POOL_RATE or the node's room.",
            )
        else:
            yield ok(f"pool of {one.template}", seen)

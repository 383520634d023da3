"""SECURITY.md 6.8: who can speak with the network is a list, each entry with its reason. Whatever a tenant names is
reached through `e2a.core.outbound` and `outbound_async` only."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("e2a", "accounts", "keys", "secrets_vault", "sandboxes", "sessions_app")
CLIENTS = {
    "httpx2", "httpcore2", "requests", "urllib3", "urllib.request", "http.client", "aiohttp", "websockets", "smtplib",
    "ftplib", "boto3", "socket.create_connection", "asyncio.open_connection", "loop.create_connection",
}  # fmt: skip
ALLOWED = {
    "e2a/core/outbound.py": "the way out",
    "e2a/core/outbound_transport.py": "the way out",
    "e2a/core/outbound_async.py": "the way out",
    "e2a/core/outbound_wire.py": "the way out",
    "sandboxes/gateway/egress_proxy.py": "dials what the sandbox's rules and the address check let pass",
    "sessions_app/llm/anthropic.py": "gives its SDK the way out's client",
    "sessions_app/broker/exchange.py": "names errors of the way out",
    "sandboxes/gateway/broker_door.py": "from the gateway to the broker",
    "sandboxes/guest_client/sync.py": "to gateways",
    "sandboxes/guest_client/aio.py": "to gateways",
    "sandboxes/preview/websocket.py": "to a server in a sandbox, over a socket of the gateway's",
    "sandboxes/diagnosis/nodes.py": "asks gateways and the broker how they are",
    "sandboxes/engines/docker.py": "to Docker",
    "sandboxes/storage/s3.py": "to the operator's storage",
    "accounts/tasks.py": "names errors of the operator's mail server",
    "e2a/diagnosis/mail.py": "to the operator's mail server",
    "e2a/management/commands/up.py": "asks our own web process whether it is ready",
    "e2a/quickstart.py": "a client of our own API",
}


def _clients_of(source: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{node.value.id}.{node.attr}")
    return {client for client in CLIENTS for name in found if name == client or name.startswith(f"{client}.")}


def test_6_8_network_clients_are_used_where_the_list_says_and_nowhere_else() -> None:
    used = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if _clients_of(path.read_text())
    }
    assert used == set(ALLOWED)


def test_6_8_a_client_is_found_however_it_is_imported() -> None:
    for source in (
        "import requests", "from urllib.request import urlopen", "import http.client as h",
        "from urllib import request", "loop.create_connection(None, 'a', 1)",
        "import socket\nsocket.create_connection(('a', 1))", "from asyncio import open_connection",
    ):  # fmt: skip
        assert _clients_of(source), source
    assert not _clients_of("import socket\nimport urllib.parse\nfrom http import HTTPStatus")

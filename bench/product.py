"""The product under measurement: its own stack, its accounts, and a look at its pool."""

from __future__ import annotations

import http.client
import json
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.live import LiveStack, wait_for

SETTLE_SECONDS = 90.0
KEPT_SECONDS = 3.0
"""uvicorn closes a connection that idles for 5 s."""
_QUIET = frozenset({"parked", "running"})
"""States of sandboxes that nobody is at work on."""


class WrongAnswer(Exception):
    """What was measured did not do what it was asked for, so its time says nothing."""


def check(fact: object, what: object) -> None:
    """Raises WrongAnswer unless `fact` holds."""
    if not fact:
        raise WrongAnswer(str(what)[:2000])


class Caller:
    """A client of the REST API: http.client, one connection kept alive, or a fresh one for each call."""

    def __init__(self, stack: LiveStack, token: str, *, keep_alive: bool = True) -> None:
        self._stack = stack
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._keep_alive = keep_alive
        self._connection: http.client.HTTPConnection | None = None
        self._used_at = 0.0

    def warm_up(self) -> None:
        """Have a connection open, so that the next call's time holds no connect."""
        self.call("GET", "/v1/templates", wants=200)

    def call(self, method: str, path: str, body: object = None, *, wants: int) -> Any:
        """The answer's JSON. Raises WrongAnswer for another status than `wants`."""
        connection = self._connection
        if connection is None or time.monotonic() - self._used_at > KEPT_SECONDS:
            connection = http.client.HTTPConnection("127.0.0.1", self._stack.port, timeout=60)
        data = None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, data, self._headers)
            answer = connection.getresponse()
            raw = answer.read()
        except BaseException:
            connection.close()
            self._connection = None
            raise
        if self._keep_alive:
            self._connection, self._used_at = connection, time.monotonic()
        else:
            connection.close()
        check(answer.status == wants, f"{method} {path}: {answer.status} {raw!r}")
        return json.loads(raw)

    def upload(self, path: str, content: bytes) -> None:
        """PUT raw bytes. Raises WrongAnswer unless they are taken."""
        answer, raw = self._exchange("PUT", path, content)
        check(answer.status == 200, f"PUT {path}: {answer.status} {raw[:500]!r}")

    def download(self, path: str) -> bytes:
        """GET raw bytes. Raises WrongAnswer unless they are there."""
        answer, raw = self._exchange("GET", path, None)
        check(answer.status == 200, f"GET {path}: {answer.status} {raw[:500]!r}")
        return raw

    def token_of(self, sandbox_id: str) -> str | None:
        """A token for the sandbox's sockets; None where this revision makes none."""
        answer, raw = self._exchange("POST", f"/v1/sandboxes/{sandbox_id}/token", b"{}")
        if answer.status == 404:
            return None
        check(answer.status == 201, f"token: {answer.status} {raw[:500]!r}")
        return str(json.loads(raw)["token"])

    def _exchange(self, method: str, path: str, data: bytes | None) -> tuple[http.client.HTTPResponse, bytes]:
        """One call on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self._stack.port, timeout=120)
        try:
            kind = "application/json" if method == "POST" else "application/octet-stream"
            connection.request(method, path, data, self._headers | {"Content-Type": kind})
            answer = connection.getresponse()
            return answer, answer.read()
        finally:
            connection.close()


@dataclass(frozen=True, slots=True)
class Watcher:
    """Reads the product's SQLite file from outside; never writes."""

    database: Path
    pool_size: int

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        connection = sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=10)
        try:
            return connection.execute(query, values).fetchall()
        finally:
            connection.close()

    def wait_settled(self) -> None:
        """Return once the pool is full and no container is being made or taken away. At most 90 s."""
        wait_for(self._is_settled, what="a full pool", seconds=SETTLE_SECONDS, every=0.02)

    def _is_settled(self) -> bool:
        counted = dict(
            self.rows(
                "SELECT state, count(*) FROM sandboxes_sandbox WHERE state != 'destroyed' GROUP BY state"
            )
        )
        return int(counted.get("parked", 0)) >= self.pool_size and set(counted) <= _QUIET

    def is_warm(self, session_id: str) -> bool:
        """Whether the session's sandbox came out of the pool."""
        rows = self.rows("SELECT is_warm FROM sandboxes_sandbox WHERE owner = ?", session_id)
        check(len(rows) == 1, f"{session_id} has {len(rows)} sandboxes")
        return bool(rows[0][0])

    def parked_containers(self) -> Sequence[str]:
        """Docker's ids of the parked sandboxes."""
        return [
            row[0] for row in self.rows("SELECT container_id FROM sandboxes_sandbox WHERE state = 'parked'")
        ]


def stack_for_bench(folder: Path, *, pool_size: int) -> LiveStack:
    """The whole product on real Docker with a pool of that size, not started yet."""
    return LiveStack(folder, environment={"E2A_POOL": f"standard={pool_size}"})


def watcher_of(stack: LiveStack, *, pool_size: int) -> Watcher:
    return Watcher(stack.data_dir / "db.sqlite3", pool_size)

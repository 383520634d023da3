"""One session over a real WebSocket, with a log that the test writes and faults that the test asks for."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs, urlsplit

from websockets.exceptions import ConnectionClosed
from websockets.sync.server import Server, ServerConnection, serve

Frame = dict[str, Any]

WAIT_SECONDS = 15.0


class ScriptedSession:
    """The server side of one session. Everything public may be used from the test's thread."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.log: list[Frame] = []
        self.tokens = {"good"}
        self.received: list[Frame] = []
        self.connects: list[dict[str, str]] = []
        self.open: set[ServerConnection] = set()
        self.refusals: list[int] = []  # close codes for the connections to come, before `ready`
        self.ended = False  # 4410 after the replay
        self.doubled = False  # every stored frame is sent twice
        self.lost_hints: set[int] = set()  # seqs that are left out the first time
        self.cut_after: Iterator[int] | None = None  # per connection: stored frames until the cable is cut
        self.cut_on_task = False  # the next task is taken, and the cable cut before the answer
        self.resync: Frame | None = None  # sent after the next `ready` of a connection with a cursor
        self.agent = "deictic"
        self.task_ids: dict[str, str] = {}
        self.run: Callable[[str, str], object] | None = None  # what a new task does: (task_id, prompt)
        self._server: Server | None = None

    # ---- What tests say -----------------------------------------------------------------------------------

    def append(self, kind: str, **fields: Any) -> int:
        """Store a frame; every open connection gets it. Returns its seq."""
        with self.changed:
            seq = len(self.log) + 1
            now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
            self.log.append({"type": kind, "seq": seq, "ts": now, **fields})
            self.changed.notify_all()
            return seq

    def say(self, text: str, task: str = "tsk_1") -> int:
        return self.append("stdout", task_id=task, source="assistant", data=text)

    def print(self, text: str, task: str = "tsk_1", stream: str = "stdout") -> int:
        return self.append(stream, task_id=task, source="tool", data=text)

    def start_task(self, prompt: str, task: str = "tsk_1") -> None:
        self.append("task_queued", task_id=task)
        self.append("task_started", task_id=task, prompt=prompt, attempt=1)
        self.append("status", status="running")

    def exit_task(self, code: int = 0, task: str = "tsk_1") -> None:
        self.append("exit", task_id=task, exit_code=code)
        self.append("status", status="idle", stop_reason="end_turn" if code == 0 else "error")

    def send_unstored(self, kind: str, **fields: Any) -> None:
        for connection in list(self.open):
            connection.send(json.dumps({"type": kind, **fields}))

    def cut(self) -> None:
        """Pull the cable: no close frame (the browser sees 1006)."""
        for connection in list(self.open):
            _cut(connection)

    def close(self, code: int) -> None:
        for connection in list(self.open):
            connection.close(code)

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        end = time.monotonic() + WAIT_SECONDS
        with self.changed:
            while not condition():
                left = end - time.monotonic()
                assert left > 0, f"waited {WAIT_SECONDS} s for {what}; got {self.received}, {self.connects}"
                self.changed.wait(min(left, 0.5))

    def frames(self, kind: str) -> list[Frame]:
        return [frame for frame in self.received if frame["type"] == kind]

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"ws://localhost:{self._server.socket.getsockname()[1]}/v1/sessions/ses_1/ws"

    # ---- The socket ----------------------------------------------------------------------------------------

    def _serve(self, connection: ServerConnection) -> None:
        assert connection.request is not None
        query = {key: values[0] for key, values in parse_qs(urlsplit(connection.request.path).query).items()}
        with self.changed:
            self.connects.append(query)
            refusal = self.refusals.pop(0) if self.refusals else None
            self.changed.notify_all()
        if refusal is None and query.get("token") not in self.tokens:
            refusal = 4401
        if refusal is not None:
            connection.close(refusal)
            return
        with self.changed:
            self.open.add(connection)
            left = next(self.cut_after, -1) if self.cut_after else -1
        pump = threading.Thread(target=self._pump, args=(connection, query.get("after"), left), daemon=True)
        pump.start()
        try:
            for message in connection:
                self._take(connection, json.loads(message))
        except ConnectionClosed:
            return
        finally:
            with self.changed:
                self.open.discard(connection)
                self.changed.notify_all()
            pump.join()

    def _take(self, connection: ServerConnection, frame: Frame) -> None:
        with self.changed:
            self.received.append(frame)
            self.changed.notify_all()
        if frame["type"] != "task":
            return
        if frame["id"] in self.task_ids:
            return  # the same task again: its first answer is in the log
        task = self.task_ids[frame["id"]] = f"tsk_{frame['id'][:8]}"
        if self.cut_on_task:
            self.cut_on_task = False
            _cut(connection)
        self.append("task_queued", task_id=task, id=frame["id"], prompt=frame["prompt"])
        if self.run is not None:
            self.append("task_started", task_id=task, prompt=frame["prompt"], attempt=1)
            self.run(task, frame["prompt"])

    def _pump(self, connection: ServerConnection, after: str | None, left: int) -> None:
        def send(frame: Frame) -> None:
            connection.send(json.dumps(frame))

        try:
            head = len(self.log)
            send({"type": "ready", "seq": head, "session": self._session()})
            cursor = head
            if after is not None:
                cursor = int(after)
                if self.resync is not None:
                    send(self.resync)
                    cursor, self.resync = self.resync["from"] - 1, None
            caught_up = after is None
            while connection in self.open:
                with self.changed:
                    frames = self.log[cursor:]
                    if not frames and caught_up:
                        self.changed.wait(0.5)
                        continue
                for frame in frames:
                    cursor += 1
                    if frame["seq"] in self.lost_hints:
                        self.lost_hints.discard(frame["seq"])
                        continue
                    for _ in range(2 if self.doubled else 1):
                        send(frame)
                    left -= 1
                    if left == 0:
                        _cut(connection)
                        return
                if not caught_up:
                    caught_up = True
                    send({"type": "caught_up", "seq": cursor})
                    if self.ended:
                        connection.close(4410)
                        return
        except ConnectionClosed:
            return

    def _session(self) -> Frame:
        statuses = [frame["status"] for frame in self.log if frame["type"] == "status"]
        return {
            "chat_session_id": "ses_1",
            "status": (statuses or ["idle"])[-1],
            "agent": {"kind": self.agent},
        }


def _cut(connection: ServerConnection) -> None:
    try:
        connection.socket.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it was cut before


@contextmanager
def scripted_session() -> Iterator[ScriptedSession]:
    session = ScriptedSession()
    with serve(session._serve, "localhost", 0, close_timeout=1, compression=None) as server:
        session._server = server
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield session
        session.cut()

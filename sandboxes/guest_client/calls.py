"""Each thing that can be asked of a guest, as a request. No I/O: both clients send these."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from sandboxes.guest_client.shapes import PROCESS_ID, ProcessSpec, RedactedValue


@dataclass(frozen=True, slots=True, repr=False)
class Call:
    """One request to a guest. `target` is path and query, quoted. `what` names it in errors."""

    what: str
    method: str
    target: str
    body: bytes | None = None
    content_type: str = "application/json"
    byte_range: str | None = None
    """The value of a `Range` header."""
    is_tunnel: bool = False
    """It asks to switch to bytes both ways."""
    of_gateway: bool = False
    """The gateway itself is asked, about the sandbox's way out; `target` is the query only."""

    def __repr__(self) -> str:
        return f"Call({self.what!r})"


def _target(path: str, /, **query: str | int | None) -> str:
    given = {name: value for name, value in query.items() if value is not None}
    if not given:
        return path
    # A file's name need not be UTF-8: such bytes are surrogates in text, and themselves again in a URL.
    return f"{path}?{urlencode(given, safe='/', quote_via=quote, errors='surrogateescape')}"


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _process(process_id: str, part: str = "") -> str:
    if PROCESS_ID.fullmatch(process_id) is None:
        raise ValueError(f"{process_id!r} is not a process id")
    return f"/processes/{process_id}{part}"


def health() -> Call:
    return Call("its health", "GET", "/health")


def stats() -> Call:
    return Call("its counters", "GET", "/stats")


def configure(
    *, env: Mapping[str, str], redact: Iterable[RedactedValue], deadline_seconds: float | None
) -> Call:
    document = {
        "env": dict(env),
        "redact": [{"name": one.name, "value": one.value} for one in redact],
        "deadline_seconds": deadline_seconds,
    }
    return Call("its configuration", "PUT", "/configure", _json(document))


def process_start(spec: ProcessSpec, *, follow: bool, after: int | None = None) -> Call:
    document: dict[str, Any] = {"id": spec.id}
    if spec.command is not None:
        document["command"] = spec.command
    if spec.argv is not None:
        document["argv"] = list(spec.argv)
    if spec.env is not None:
        document["env"] = dict(spec.env)
    if spec.stdin is not None:
        document["stdin"] = base64.b64encode(spec.stdin).decode()
    if spec.pty is not None:
        document["pty"] = {"cols": spec.pty.cols, "rows": spec.pty.rows}
    for name in ("cwd", "timeout_seconds", "log_bytes"):
        if (value := getattr(spec, name)) is not None:
            document[name] = value
    if spec.keep_stdin_open:
        document["keep_stdin_open"] = True
    if spec.kill_on_disconnect:
        document["kill_on_disconnect"] = True
    if spec.on_full != "drop":
        document["on_full"] = spec.on_full
    target = _target("/processes", follow=1 if follow else None, after=after)
    return Call(f"the start of process {spec.id}", "POST", target, _json(document))


def process_follow(process: ProcessSpec | str, *, after: int, follow: bool) -> Call:
    """Output of a process that is there by its id; of one that is started, if need be, by its spec."""
    if isinstance(process, ProcessSpec):
        return process_start(process, follow=True, after=after or None)
    process_id = process
    target = _target(_process(process_id, "/output"), after=after, follow=int(follow))
    return Call(f"the output of process {process_id}", "GET", target)


def process_get(process_id: str) -> Call:
    return Call(f"process {process_id}", "GET", _process(process_id))


def process_list() -> Call:
    return Call("its processes", "GET", "/processes")


def process_stdin(process_id: str, data: bytes, *, close: bool) -> Call:
    target = _target(_process(process_id, "/stdin"), close=int(close))
    return Call(f"input for process {process_id}", "POST", target, data, "application/octet-stream")


def process_signal(process_id: str, signal: str) -> Call:
    body = _json({"signal": signal})
    return Call(f"{signal} for process {process_id}", "POST", _process(process_id, "/signal"), body)


def process_resize(process_id: str, *, cols: int, rows: int) -> Call:
    body = _json({"cols": cols, "rows": rows})
    return Call(f"the window of process {process_id}", "POST", _process(process_id, "/resize"), body)


def process_forget(process_id: str) -> Call:
    return Call(f"the end of process {process_id}", "DELETE", _process(process_id))


def file_read(path: str, *, byte_range: str | None = None) -> Call:
    return Call(f"file {path!r}", "GET", _target("/files", path=path), byte_range=byte_range)


def file_write(path: str, *, mode: int | None) -> Call:
    """Its body is streamed by the client."""
    target = _target("/files", path=path, mode=None if mode is None else f"{mode:04o}")
    return Call(f"the writing of file {path!r}", "PUT", target, None, "application/octet-stream")


def archive_read(path: str) -> Call:
    return Call(f"the archive of {path!r}", "GET", _target("/archive", path=path))


def archive_write(path: str) -> Call:
    """Its body is streamed by the client."""
    return Call(
        f"the unpacking into {path!r}", "PUT", _target("/archive", path=path), None, "application/x-tar"
    )


def snapshot_read(*, limit_bytes: int) -> Call:
    return Call("its files", "GET", _target("/snapshot", limit=limit_bytes))


def snapshot_write() -> Call:
    """Its body is streamed by the client."""
    return Call("the restoring of its files", "PUT", "/snapshot", None, "application/x-tar")


def file_delete(path: str, *, recursive: bool) -> Call:
    target = _target("/files", path=path, recursive=1 if recursive else None)
    return Call(f"the deletion of {path!r}", "DELETE", target)


def file_stat(path: str) -> Call:
    return Call(f"the state of {path!r}", "GET", _target("/files/stat", path=path))


def file_list(path: str, *, after: str = "") -> Call:
    target = _target("/files/list", path=path, after=after or None)
    return Call(f"the content of folder {path!r}", "GET", target)


def file_watch(path: str, *, recursive: bool) -> Call:
    target = _target("/files/watch", path=path, recursive=1 if recursive else None)
    return Call(f"changes in {path!r}", "GET", target)


def file_move(source: str, destination: str) -> Call:
    return Call(f"the move of {source!r}", "POST", "/files/move", _json({"from": source, "to": destination}))


def file_mkdir(path: str) -> Call:
    return Call(f"folder {path!r}", "POST", "/files/mkdir", _json({"path": path}))


def egress_set(rules: Mapping[str, Any]) -> Call:
    """The query has the body's digest, since the signature covers the query and not the body."""
    body = _json(rules)
    target = f"?sha256={hashlib.sha256(body).hexdigest()}"
    return Call("its egress rules", "PUT", target, body, of_gateway=True)


def egress_shown() -> Call:
    return Call("what it reached", "GET", "", of_gateway=True)


def tunnel(port: int) -> Call:
    return Call(f"a tunnel to port {port}", "POST", f"/tunnels/{port}", is_tunnel=True)

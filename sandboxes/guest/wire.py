"""HTTP/1.1, JSON and output frames, as far as the guest speaks them (PROTOCOL.md)."""

import _json
import _struct
import os

HEAD_LIMIT = 16 * 1024
FRAME = _struct.Struct(">BQI")
STDOUT, STDERR, EXIT, GAP, KEEP_ALIVE = 1, 2, 3, 4, 5

REASONS = {
    200: "OK",
    201: "Created",
    206: "Partial Content",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    411: "Length Required",
    413: "Content Too Large",
    416: "Range Not Satisfiable",
    426: "Upgrade Required",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    504: "Gateway Timeout",
    507: "Insufficient Storage",
}


class Refused(Exception):
    """What the caller is told instead of an answer: a status and `{"code", "detail"}`."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(f"{status} {code}: {detail}")
        self.status = status
        self.code = code
        self.detail = detail

    def body(self) -> dict[str, str]:
        return {"code": self.code, "detail": self.detail}


class Request:
    """A parsed head. `length` is the declared body size, -1 when it comes in chunks."""

    __slots__ = ("expects_continue", "headers", "keep_alive", "length", "method", "path", "query")

    def __init__(self, method: str, path: str, query: dict[str, str], headers: dict[str, str]) -> None:
        self.method = method
        self.path = path
        self.query = query
        self.headers = headers
        self.keep_alive = headers.get("connection", "").lower() != "close"
        self.expects_continue = headers.get("expect", "").lower() == "100-continue"
        coding = headers.get("transfer-encoding")
        text = headers.get("content-length", "0")
        if coding is not None:
            if coding.lower() != "chunked" or "content-length" in headers:
                raise Refused(400, "bad_request", "the body has no single length")
            self.length = -1
        elif text.isascii() and text.isdigit() and len(text) < 16:
            self.length = int(text)
        else:
            raise Refused(400, "bad_request", "Content-Length is not a number")

    def flag(self, name: str) -> bool:
        """Return a 0/1 query parameter; absent is false."""
        value = self.query.get(name, "0")
        if value not in ("0", "1"):
            raise Refused(400, "bad_request", f"{name} is 0 or 1")
        return value == "1"

    def number(self, name: str) -> int:
        """Return a query parameter that counts bytes; absent is 0."""
        value = self.query.get(name, "0")
        if not (value.isascii() and value.isdigit() and len(value) < 19):
            raise Refused(400, "bad_request", f"{name} is a whole number of bytes")
        return int(value)


def parse_head(head: bytes) -> Request:
    """Parse everything before the empty line; raises Refused 400."""
    lines = head.decode("latin-1").split("\r\n")
    parts = lines[0].split(" ")
    if len(parts) != 3 or parts[2] not in ("HTTP/1.1", "HTTP/1.0") or not parts[1].startswith("/"):
        raise Refused(400, "bad_request", "the first line is not an HTTP/1.1 request")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        name = name.lower()
        if not colon or not name or name.strip() != name:
            raise Refused(400, "bad_request", "a header line is malformed")
        if name in headers and name in ("content-length", "transfer-encoding"):
            raise Refused(400, "bad_request", f"{name} is given twice")
        headers[name] = value.strip()
    if parts[2] == "HTTP/1.0":
        headers.setdefault("connection", "close")
    path, _, query = parts[1].partition("?")
    pairs: dict[str, str] = {}
    if query:
        for pair in query.split("&"):
            name, _, value = pair.partition("=")
            pairs[unquote(name)] = unquote(value.replace("+", " "))
    return Request(parts[0], unquote(path), pairs, headers)


def unquote(text: str) -> str:
    """Undo percent-encoding; bytes that are no UTF-8 survive as surrogates, as file names do."""
    if "%" not in text:
        return text if text.isascii() else os.fsdecode(text.encode("latin-1"))
    first, *rest = text.encode("latin-1").split(b"%")
    out = [first]
    for piece in rest:
        try:
            out.append(bytes((int(piece[:2], 16),)) + piece[2:])
        except ValueError:
            raise Refused(400, "bad_request", "a percent sign is not followed by two digits") from None
    return os.fsdecode(b"".join(out))


class _Scanning:
    """What the C scanner asks of its JSONDecoder."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    memo: dict[str, str] = {}

    @staticmethod
    def parse_constant(name: str) -> float:
        raise ValueError(f"{name} is not JSON")


def _no_default(value: object) -> object:
    raise TypeError(f"{type(value).__name__} has no JSON")


_scan = _json.make_scanner(_Scanning())  # type: ignore[arg-type]
_encode = _json.make_encoder(
    None, _no_default, _json.encode_basestring_ascii, None, ": ", ", ", False, False, False
)


def from_json(body: bytes | bytearray) -> dict[str, object]:
    """Parse a JSON object; raises Refused 400."""
    try:
        text = body.decode().strip(" \t\r\n")
        value, end = _scan(text, 0)
        whole = end == len(text)
    except (ValueError, StopIteration, RecursionError, SystemError):
        # SystemError: where the scanner would raise an exception of the json package, which is not imported.
        raise Refused(400, "bad_request", "the body is not JSON") from None
    if not whole or not isinstance(value, dict):
        raise Refused(400, "bad_request", "the body is not one JSON object")
    return value


def to_json(value: object) -> bytes:
    return "".join(_encode(value, 0)).encode()


def response(status: int, value: object, keep_alive: bool) -> bytes:
    """Return a whole JSON response."""
    body = to_json(value)
    return head(status, "application/json", len(body), keep_alive) + body


def head(status: int, kind: str, length: int | None, keep_alive: bool, extra: str = "") -> bytes:
    """Return a response head; without a length the body ends with the connection."""
    size = "" if length is None else f"Content-Length: {length}\r\n"
    close = "" if keep_alive else "Connection: close\r\n"
    return (
        f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Type: {kind}\r\n{size}{close}{extra}\r\n"
    ).encode()


CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
STREAM_HEAD = {
    status: head(status, "application/vnd.e2a.frames", None, keep_alive=False) for status in (200, 201)
}

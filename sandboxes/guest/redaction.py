"""Streaming redaction: known values, also encoded ones, never leave in clear however the stream is cut.

The law: for every way of cutting a stream into pieces, the concatenation of what `feed` and `end` return
equals the redaction of the whole stream at once, which replaces the leftmost match, the longest of those
that start there, and goes on behind it. To keep it, exactly the suffix that could still become a match is
held back. Best effort by nature: a program can encode a value in a way nobody lists here; the wall is to not
give it the value.

Pure and free of imports that cost memory: the guest and the worker share it.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

SHORTEST_VALUE = 8
"""Shorter values would redact ordinary words."""

_HEAD = 4
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


def encodings(value: bytes) -> set[bytes]:
    """Return the forms of a value that are redacted: itself, base64 at three offsets, hex, URL- and
    JSON-escaped.
    """
    forms = {value, value.hex().encode(), value.hex().upper().encode()}
    for offset in range(3):
        text = _base64_inside(value, offset)
        forms |= {text, text.replace(b"+", b"-").replace(b"/", b"_")}
    for keep in (b"", b"/", b" "):  # quote(safe=""), quote() and quote_plus()
        escaped = b"".join(
            bytes((byte,)) if byte in _PLAIN or (byte in keep and byte != 32) else b"%%%02X" % byte
            for byte in value
        )
        if keep == b" ":
            escaped = escaped.replace(b"%20", b"+")
        forms |= {escaped, _lower_escapes(escaped)}
    for ascii_only in (True, False):
        text = _json_escaped(value, ascii_only)
        forms |= {text, text.replace(b"/", b"\\/")}
    if b"\n" in value:
        forms.add(value.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))  # What a terminal makes of it.
        stripped = value.strip()
        if len(stripped) >= SHORTEST_VALUE:
            forms.add(stripped)  # What `$(cat file)` makes of it.
    return forms


def _base64_inside(value: bytes, offset: int) -> bytes:
    """Return the base64 digits that depend on `value` alone when it starts `offset` bytes into a group of
    three.
    """
    bits = int.from_bytes(value, "big")
    count = len(value) * 8
    skipped = (-offset * 8) % 6
    digits = (count - skipped) // 6
    bits = (bits & ((1 << (count - skipped)) - 1)) >> ((count - skipped) % 6)
    # 6-bit digits out of an integer: through bytes, three at a time, so that long values stay linear.
    padding = -digits % 4
    packed = (bits << (6 * padding)).to_bytes((digits + padding) * 6 // 8, "big")
    out = bytearray()
    for at in range(0, len(packed), 3):
        group = int.from_bytes(packed[at : at + 3], "big")
        out += bytes(_BASE64[group >> shift & 63] for shift in (18, 12, 6, 0))
    return bytes(out[:digits])


def _lower_escapes(escaped: bytes) -> bytes:
    first, *rest = escaped.split(b"%")
    return b"%".join([first, *(piece[:2].lower() + piece[2:] for piece in rest)])


def _json_escaped(value: bytes, ascii_only: bool) -> bytes:
    short = {8: "\\b", 9: "\\t", 10: "\\n", 12: "\\f", 13: "\\r", 34: '\\"', 92: "\\\\"}
    out: list[str] = []
    for character in value.decode("utf-8", "surrogateescape"):
        code = ord(character)
        if code in short:
            out.append(short[code])
        elif code < 32 or (ascii_only and code > 126):
            if code > 0xFFFF:
                code -= 0x10000
                out.append(f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}")
            else:
                out.append(f"\\u{code:04x}")
        else:
            out.append(character)
    return "".join(out).encode("utf-8", "surrogateescape")


class Patterns:
    """What to look for, compiled once and shared by many streams. Empty patterns pass everything through.

    `values` are (name, value) pairs. Values under 8 bytes are not used; `skipped` names them. Where two
    values share a form the first name wins.
    """

    def __init__(self, values: "Iterable[tuple[str, bytes]]" = ()) -> None:
        self.skipped: list[str] = []
        self._replacements: dict[bytes, bytes] = {}
        for name, value in values:
            if len(value) < SHORTEST_VALUE:
                self.skipped.append(name)
                continue
            for form in encodings(value):
                self._replacements.setdefault(form, b"[redacted:%s]" % name.encode())
        # Patterns by their first bytes, and all strings too short to have these: a tail is looked up, not
        # tried.
        self._by_head: dict[bytes, list[bytes]] = {}
        self._stubs: set[bytes] = set()
        for form in self._replacements:
            self._by_head.setdefault(form[:_HEAD], []).append(form)
            self._stubs.update(form[:size] for size in range(1, _HEAD))
        self._reach = {head: max(map(len, forms)) - 1 for head, forms in self._by_head.items()}

    def __bool__(self) -> bool:
        return bool(self._replacements)

    def redact(self, data: bytes) -> bytes:
        """Return the redaction of a whole stream."""
        return self.split(data, final=True)[0]

    def split(self, data: bytes, *, final: bool) -> tuple[bytes, bytes]:
        """Return (what may go out, what must be held back); nothing is held back when `final`."""
        if not self._replacements:
            return data, b""
        held_from = len(data) if final else self._undecided(data, 0)
        if held_from == 0:
            return b"", data
        # The next place of each pattern; found again only when the scan has passed it.
        places: list[tuple[int, int, bytes]] = []
        for form in self._replacements:
            place = data.find(form)
            if place >= 0:
                places.append((place, -len(form), form))
        if not places:
            return data[:held_from], data[held_from:]
        out: list[bytes] = []
        at = 0
        places.sort()
        while places and places[0][0] < held_from:
            start, _, form = places[0]
            out += (data[at:start], self._replacements[form])
            at = start + len(form)
            if at > held_from:
                held_from = len(data) if final else self._undecided(data, at)
            places = [place for place in self._moved(places, data, at) if place[0] >= 0]
            places.sort()
        out.append(data[at:held_from])
        return b"".join(out), data[held_from:]

    @staticmethod
    def _moved(
        places: list[tuple[int, int, bytes]], data: bytes, at: int
    ) -> "Iterable[tuple[int, int, bytes]]":
        for place in places:
            yield place if place[0] >= at else (data.find(place[2], at), place[1], place[2])

    def _undecided(self, data: bytes, at: int) -> int:
        """Return where the longest suffix of data[at:] starts that is a proper beginning of a pattern."""
        size = len(data)
        best = size
        for length in range(1, min(_HEAD, size - at + 1)):
            if data[size - length :] in self._stubs:
                best = size - length
        for head, forms in self._by_head.items():
            start = data.find(head, max(at, size - self._reach[head]))
            while 0 <= start < best:
                tail = data[start:]
                if any(len(form) > len(tail) and form.startswith(tail) for form in forms):
                    best = start
                    break
                start = data.find(head, start + 1)
        return best


class Redactor:
    """One stream being redacted. `patterns` may be exchanged at any time; it holds for what is still held
    back.
    """

    __slots__ = ("_held", "patterns")

    def __init__(self, patterns: Patterns) -> None:
        self.patterns = patterns
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """Take a piece of the stream; return what is decided by now, possibly nothing."""
        if not self.patterns and not self._held:
            return data
        out, self._held = self.patterns.split(self._held + data, final=False)
        return out

    def end(self) -> bytes:
        """Return the rest: the stream has ended."""
        out, self._held = self.patterns.split(self._held, final=True)
        return out

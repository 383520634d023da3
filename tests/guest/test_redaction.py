"""SECURITY 4.12: known values never leave in clear, however the stream is cut."""

from __future__ import annotations

import base64
import itertools
import json
import os
import time
from urllib.parse import quote, quote_plus

from hypothesis import example, given, settings
from hypothesis import strategies as st

from sandboxes.guest.redaction import Patterns, Redactor, encodings
from tests.guest.guest import Guest, ended

SECRET = b'sk-live/"4f+9 z\xc3\xa9=A'


def naive(patterns: Patterns, data: bytes) -> bytes:
    """The definition: at each place the longest match, else one byte."""
    out = b""
    at = 0
    table = patterns._replacements
    while at < len(data):
        match = max((form for form in table if data.startswith(form, at)), key=len, default=None)
        out += data[at : at + 1] if match is None else table[match]
        at += 1 if match is None else len(match)
    return out


# Few letters, so that values overlap, contain each other and begin like each other all the time.
VALUES = st.lists(st.text("ab", min_size=8, max_size=12).map(str.encode), min_size=1, max_size=4)
STREAM = st.lists(st.one_of(st.text("abc", max_size=20).map(str.encode), st.integers(0, 3)), max_size=12)


@settings(max_examples=400, deadline=None)
@given(values=VALUES, parts=STREAM, cuts=st.lists(st.integers(0, 200), max_size=30))
@example(values=[b"aaaaaaaa", b"aaaaaaaab"], parts=[b"aaaaaaaaaaaab"], cuts=list(range(13)))
@example(values=[b"abababab", b"babababa"], parts=[b"aababababababab"], cuts=list(range(15)))
def test_4_12_law_of_concat_for_every_chunking(
    values: list[bytes], parts: list[bytes | int], cuts: list[int]
) -> None:
    patterns = Patterns((f"V{number}", value) for number, value in enumerate(values))
    data = b"".join(values[part % len(values)] if isinstance(part, int) else part for part in parts)
    redactor = Redactor(patterns)
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    out = b"".join(redactor.feed(data[a:b]) for a, b in itertools.pairwise(places)) + redactor.end()
    assert out == patterns.redact(data) == naive(patterns, data)


@settings(deadline=None)
@given(
    value=st.binary(min_size=8, max_size=40),
    before=st.binary(max_size=20),
    after=st.binary(max_size=20),
    size=st.integers(1, 7),
)
def test_4_12_law_of_concat_for_any_bytes(value: bytes, before: bytes, after: bytes, size: int) -> None:
    patterns = Patterns([("K", value)])
    data = before + value + base64.b64encode(before + value + after) + after + value.hex().encode()
    redactor = Redactor(patterns)
    pieces = [redactor.feed(data[at : at + size]) for at in range(0, len(data), size)]
    out = b"".join(pieces) + redactor.end()
    assert out == naive(patterns, data)
    assert value not in out.replace(b"[redacted:K]", b"\n") or value in b"[redacted:K]"


@settings(deadline=None)
@given(value=st.binary(min_size=8, max_size=60), before=st.binary(max_size=5), after=st.binary(max_size=5))
def test_4_12_base64_is_found_at_each_of_three_offsets(value: bytes, before: bytes, after: bytes) -> None:
    patterns = Patterns([("K", value)])
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        assert b"[redacted:K]" in patterns.redact(encode(before + value + after))


@settings(deadline=None)
@given(value=st.text(min_size=8, max_size=30))
def test_4_12_escaped_forms_are_found(value: str) -> None:
    raw = value.encode("utf-8", "surrogatepass")
    try:
        raw.decode()
    except UnicodeDecodeError:
        return
    forms = encodings(raw)
    for text in (
        quote(value, safe=""),
        quote(value),
        quote_plus(value),
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
        raw.hex(),
        raw.hex().upper(),
    ):
        assert text.encode() in forms


def test_only_a_beginning_of_a_value_is_held_back() -> None:
    redactor = Redactor(Patterns([("KEY", b"secret-value")]))
    assert redactor.feed(b"hello sec") == b"hello "
    assert redactor.feed(b"ond secret-val") == b"second "
    assert redactor.feed(b"ue and") == b"[redacted:KEY] and"
    assert redactor.feed(b" secret-valu") == b" "
    assert redactor.end() == b"secret-valu"


def test_the_longest_of_two_values_wins() -> None:
    patterns = Patterns([("SHORT", b"abcdefgh"), ("LONG", b"abcdefghij")])
    assert patterns.redact(b"abcdefghij abcdefghi") == b"[redacted:LONG] [redacted:SHORT]i"


def test_short_values_are_not_used_and_named() -> None:
    patterns = Patterns([("PIN", b"1234567"), ("KEY", b"12345678")])
    assert patterns.skipped == ["PIN"]
    assert patterns.redact(b"1234567 12345678") == b"1234567 [redacted:KEY]"


def test_nothing_configured_costs_nothing() -> None:
    piece = os.urandom(1 << 16)
    redactor = Redactor(Patterns())
    assert redactor.feed(piece) is piece


def test_fifty_values_are_fast_enough() -> None:
    patterns = Patterns((f"K{number}", os.urandom(20).hex().encode()) for number in range(50))
    redactor = Redactor(patterns)
    piece = (b"The quick brown fox jumps over the lazy dog 0123456789abcdef. " * 1100)[: 1 << 16]
    begun = time.process_time()
    for _ in range(16):
        redactor.feed(piece)
    assert time.process_time() - begun < 1  # 1 MiB; about 0.1 s on the machine this was made on.
    begun = time.process_time()
    for _ in range(1000):
        redactor.feed(b"x")
    assert time.process_time() - begun < 1


def test_a_value_of_64_kib_that_comes_byte_by_byte_stays_linear() -> None:
    value = os.urandom(32768).hex().encode()
    redactor = Redactor(Patterns([("BIG", value)]))
    begun = time.process_time()
    out = b"".join(redactor.feed(value[at : at + 16]) for at in range(0, len(value), 16)) + redactor.end()
    assert out == b"[redacted:BIG]"
    assert time.process_time() - begun < 5


def test_4_12_a_value_printed_slowly_is_redacted(guest: Guest) -> None:
    guest.configure(env={"KEY": "s3cr3t-value"}, redact=[{"name": "KEY", "value": "s3cr3t-value"}])
    script = 'echo begin; for i in $(seq 0 11); do printf %s "${KEY:$i:1}"; sleep 0.03; done; echo; echo end'
    result = guest.run(script)
    assert result.stdout == b"begin\n[redacted:KEY]\nend\n"


def test_4_12_encoded_values_are_redacted_in_output_and_errors(guest: Guest) -> None:
    value = SECRET.decode()
    guest.configure(env={"KEY": value}, redact=[{"name": "KEY", "value": value}])
    result = guest.run(
        'printf %s "$KEY"; echo; printf %s "a$KEY" | base64 -w0; echo; '
        'printf %s "$KEY" | od -An -tx1 | tr -d " \\n"; '
        'printf %s "$KEY" >&2'
    )
    text = result.stdout.split(b"\n")
    assert text[0] == b"[redacted:KEY]"
    assert b"[redacted:KEY]" in text[1]
    assert text[2] == b"[redacted:KEY]"
    assert result.stderr == b"[redacted:KEY]"


def test_offsets_count_redacted_bytes(guest: Guest) -> None:
    guest.configure(redact=[{"name": "K", "value": "0123456789abcdef"}])
    result = guest.run("echo 0123456789abcdef; echo next", id="x")
    assert result.stdout == b"[redacted:K]\nnext\n"
    assert result.exit["output_bytes"] == 18
    assert ended(guest.output("x", after=13)).stdout == b"next\n"


def test_new_redaction_holds_at_once_for_what_runs(guest: Guest) -> None:
    stream = guest.follow(
        "echo first-secret; read x; echo first-secret second-secret", id="x", keep_stdin_open=True
    )
    stream.read_until(b"first-secret\n")
    guest.configure(
        redact=[{"name": "TWO", "value": "second-secret"}, {"name": "ONE", "value": "first-secret"}]
    )
    guest.request("POST", "/processes/x/stdin", b"\n")
    assert ended(stream).stdout == b"[redacted:ONE] [redacted:TWO]\n"


def test_configure_names_values_that_are_too_short(guest: Guest) -> None:
    answer = guest.configure(redact=[{"name": "PIN", "value": "1234"}])
    assert answer.json == {"configured": True, "not_redacted": ["PIN"]}


def test_a_terminal_is_redacted_too(guest: Guest) -> None:
    guest.configure(redact=[{"name": "PEM", "value": "-----BEGIN-----\nline one\n"}])
    result = guest.run("printf -- '-----BEGIN-----\\nline one\\n'", pty={"cols": 80, "rows": 24})
    assert result.stdout == b"[redacted:PEM]"

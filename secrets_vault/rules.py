"""What a bundle may be called and what it may hold (CONTRACT 4). Pure: no database, no network."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from e2a.core.addresses import name_refusal
from e2a.core.errors import FieldError, ValidationFailed
from e2a.core.outbound import check_base_url
from secrets_vault.crypto import SecretText

MAX_BUNDLES: Final = 50
MAX_NAMES: Final = 50
MAX_VALUE_BYTES: Final = 64 * 1024
MAX_BUNDLES_A_HOLDER: Final = 10
MAX_ENVIRONMENT_BYTES: Final = 1024 * 1024
MIN_VALUE_LENGTH: Final = 8
MAX_VERSIONS: Final = 10
MAX_INJECT_HOSTS: Final = 16
MAX_HEADER_LENGTH: Final = 256

LLM_API_KEY: Final = "LLM_API_KEY"
LLM_BASE_URL: Final = "LLM_BASE_URL"
LLM_MODEL: Final = "LLM_MODEL"
SETTINGS: Final = frozenset({LLM_BASE_URL, LLM_MODEL})
"""Names whose values are settings, not secrets: they may be short and are not redacted."""
LLM_NAMES: Final = SETTINGS | {LLM_API_KEY}
"""Names that never reach a sandbox."""

BUNDLE_NAME_PATTERN: Final = "[a-z0-9][a-z0-9-]{0,62}"
VALUE_NAME_PATTERN: Final = "[A-Z_][A-Z0-9_]{0,127}"
RESERVED_PATTERN: Final = (
    "E2A_.*|LD_.*|PYTHON.*|PATH|NODE_OPTIONS|HOME|USER|SHELL|(HTTP|HTTPS|ALL|NO|FTP|RSYNC|SOCKS)_PROXY"
)
MODEL_PATTERN: Final = "[a-zA-Z0-9._:/-]{1,128}"
HEADER_PATTERN: Final = r"[A-Za-z][A-Za-z0-9-]{0,63}: [\x20-\x7e]*\{value\}[\x20-\x7e]*"

_refusal = ValidationFailed.of

_BUNDLE_NAME = re.compile(BUNDLE_NAME_PATTERN)
_VALUE_NAME = re.compile(VALUE_NAME_PATTERN)
_RESERVED = re.compile(RESERVED_PATTERN, re.IGNORECASE | re.DOTALL)
_MODEL = re.compile(MODEL_PATTERN)
_API_KEY = re.compile(r"[\x21-\x7e]+")
_HEADER = re.compile(HEADER_PATTERN)
_HEADER_SAFE = re.compile(r"[\x20-\x7e]+")
_INJECT_HOST = re.compile(r"(?:\*\.)?(?P<name>[A-Za-z0-9.-]{1,253})(?::(?P<port>[1-9][0-9]{0,4}))?")
_NOT_INJECTABLE = frozenset(
    {
        "connection", "content-encoding", "content-length", "expect", "host", "keep-alive", "te",
        "proxy-authenticate", "proxy-authorization", "proxy-connection", "trailer", "transfer-encoding",
        "upgrade", "via",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class NewValue:
    """A checked value. `keeps_inject`: it says nothing of injection, so a patch leaves that alone."""

    text: SecretText
    inject: dict[str, Any] | None = None
    keeps_inject: bool = True

    @property
    def size(self) -> int:
        """Bytes in UTF-8."""
        return len(self.text.reveal().encode())


def is_bundle_name(name: str) -> bool:
    return _BUNDLE_NAME.fullmatch(name) is not None


def is_reserved_name(name: str) -> bool:
    """Whether an environment variable of this name would change how e2a or its sandboxes work. Blind to
    case.
    """
    return _RESERVED.fullmatch(name) is not None


def bundle_name_check(name: str) -> str:
    """The name. Raises `ValidationFailed` `invalid_name`."""
    if not is_bundle_name(name):
        raise _refusal(
            "name", "invalid_name", "A name has 1 to 63 of a-z, 0-9 and '-', and does not begin with '-'."
        )
    return name


def environment_bytes(name: str, size: int) -> int:
    """What a variable takes in an environment: `NAME=value` and its end."""
    return len(name) + size + 2


def values_check(
    values: Mapping[str, Any], *, may_remove: bool = False, allow_private: Collection[str] = ()
) -> dict[str, NewValue | None]:
    """The `values` of a request: name to text, or `{"value", "inject"?}`; with `may_remove` also `None`.

    Raises `ValidationFailed` with every field that is wrong; its code is the fields' own when they agree. The
    error quotes no value, and no malformed name either: it may be a value that was put on the wrong side.
    `allow_private`: hosts that the operator lets `LLM_BASE_URL` name.
    """
    if not values:
        raise _refusal("values", "required", "Give at least one value.")
    if len(values) > MAX_NAMES:
        raise _refusal("values", "secrets_too_large", f"A bundle has at most {MAX_NAMES} names.")
    found: dict[str, NewValue | None] = {}
    wrong: list[FieldError] = []
    for index, (name, raw) in enumerate(values.items(), start=1):
        try:
            _name_check(name, index)
            found[name] = None if raw is None and may_remove else _value_check(name, raw, allow_private)
        except ValidationFailed as error:
            wrong += error.errors
    if wrong:
        codes = {error.code for error in wrong}
        detail = wrong[0].detail if len(wrong) == 1 else "Some values are wrong; see errors."
        raise ValidationFailed(detail, code=codes.pop() if len(codes) == 1 else None, errors=wrong)
    size = sum(environment_bytes(name, value.size) for name, value in found.items() if value is not None)
    environment_check(size)
    return found


def environment_check(size: int, *, whose: str = "The values", field: str = "values") -> None:
    """Raises `ValidationFailed` `secrets_too_large` for more bytes than an environment may have."""
    if size > MAX_ENVIRONMENT_BYTES:
        raise _refusal(
            field,
            "secrets_too_large",
            f"{whose} take {size} bytes of environment; at most 1 MiB is possible.",
        )


def _name_check(name: str, index: int) -> None:
    if not isinstance(name, str) or _VALUE_NAME.fullmatch(name) is None:
        raise _refusal(
            "values",
            "invalid_name",
            f"Name number {index} is not made of A-Z, 0-9 and '_' (at most 128, not beginning with a digit).",
        )
    if is_reserved_name(name):
        raise _refusal(f"values.{name}", "reserved_name", f"{name} is reserved.")


def _value_check(name: str, raw: Any, allow_private: Collection[str]) -> NewValue:
    field = f"values.{name}"
    inject: dict[str, Any] | None = None
    keeps_inject = True
    if isinstance(raw, Mapping):
        if unknown := raw.keys() - {"value", "inject"}:
            raise _refusal(field, "unknown_field", f"{len(unknown)} fields besides value, inject.")
        if "value" not in raw:
            raise _refusal(f"{field}.value", "required", "The value itself is missing.")
        keeps_inject = "inject" not in raw
        inject = _inject_check(f"{field}.inject", raw.get("inject"))
        raw = raw["value"]
    if not isinstance(raw, str):
        raise _refusal(field, "invalid", 'A value is a text, or {"value": text, "inject": {…}}.')
    text = _text_check(name, field, raw, allow_private)
    if inject is not None:
        if name in LLM_NAMES:
            raise _refusal(f"{field}.inject", "invalid_inject", f"{name} never enters a sandbox anyway.")
        header_value_check(field, text)
    return NewValue(SecretText(text), inject, keeps_inject)


def header_value_check(field: str, text: str) -> None:
    """Raises `ValidationFailed` `invalid_inject` for a text that could break a header."""
    if not _HEADER_SAFE.fullmatch(text):
        raise _refusal(field, "invalid_inject", "A value for a header has printable ASCII only.")


def _text_check(name: str, field: str, text: str, allow_private: Collection[str]) -> str:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise _refusal(field, "invalid_value", "This text is not valid Unicode.") from None
    if size > MAX_VALUE_BYTES:
        raise _refusal(field, "secrets_too_large", f"A value has at most {MAX_VALUE_BYTES} bytes.")
    if "\0" in text:
        raise _refusal(field, "invalid_value", "A value cannot hold a NUL character.")
    if name == LLM_BASE_URL:
        return check_base_url(text, allow_private=allow_private, field=field).url
    if name == LLM_MODEL:
        if not _MODEL.fullmatch(text):
            raise _refusal(field, "invalid_model", f"A model's name matches ^{MODEL_PATTERN}$.")
        return text
    # The redactor replaces the value wherever it is printed: blanks alone would make every output unreadable.
    if len(text) < MIN_VALUE_LENGTH or text.isspace():
        raise _refusal(field, "value_too_short", f"It has at least {MIN_VALUE_LENGTH} characters.")
    if name == LLM_API_KEY and not _API_KEY.fullmatch(text):
        raise _refusal(field, "invalid_value", "A model key has neither blanks nor line ends.")
    return text


def _inject_check(field: str, raw: Any) -> dict[str, Any] | None:
    """The rule in its normal form: lower-case hosts, the header as given."""
    if raw is None:
        return None
    if not isinstance(raw, Mapping) or raw.keys() != {"hosts", "header"}:
        raise _refusal(field, "invalid_inject", 'It has the form {"hosts": […], "header": "Name: {value}"}.')
    hosts, header = raw["hosts"], raw["header"]
    if not isinstance(hosts, list) or not 1 <= len(hosts) <= MAX_INJECT_HOSTS:
        raise _refusal(f"{field}.hosts", "invalid_inject", f"Give 1 to {MAX_INJECT_HOSTS} hosts.")
    for index, host in enumerate(hosts):
        if (reason := _inject_host_refusal(host)) is not None:
            raise _refusal(f"{field}.hosts.{index}", "invalid_inject", f"A host {reason}.")
    if not isinstance(header, str) or len(header) > MAX_HEADER_LENGTH or not _HEADER.fullmatch(header):
        raise _refusal(
            f"{field}.header",
            "invalid_inject",
            "It is written 'Name: text with {value}', in printable ASCII.",
        )
    if header.count("{value}") != 1 or header.partition(":")[0].lower() in _NOT_INJECTABLE:
        raise _refusal(
            f"{field}.header",
            "invalid_inject",
            "{value} is there once; the header is not the connection's own.",
        )
    return {"hosts": [host.lower() for host in hosts], "header": header}


def _inject_host_refusal(host: Any) -> str | None:
    match = _INJECT_HOST.fullmatch(host) if isinstance(host, str) else None
    if match is None or int(match["port"] or 443) > 65535:
        return "is written host, *.host or host:443"
    reason = name_refusal(match["name"].lower())
    return None if reason is None else f"must be a public name: {reason}"

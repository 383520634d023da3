"""JSON as the contract has it: one object, no doubles, no NaN, bounded depth."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rest_framework.exceptions import ParseError
from rest_framework.parsers import BaseParser

MAX_DEPTH = 32


def strict_json(raw: bytes) -> Any:
    """Decode UTF-8 JSON. Raises `ValueError` on NaN, double keys, NUL or depth over 32 (SECURITY 9.11)."""
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    _check(value, MAX_DEPTH)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _check(value: Any, depth: int) -> None:
    if depth < 0:
        raise ValueError("nested too deeply")
    if isinstance(value, str):
        value.encode()  # A lone surrogate raises UnicodeEncodeError, which is a ValueError.
        if "\0" in value:
            raise ValueError("NUL is in a text")
    elif isinstance(value, dict):
        for name, item in value.items():
            name.encode()
            _check(item, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _check(item, depth - 1)


class StrictJSONParser(BaseParser):
    media_type = "application/json"

    def parse(
        self, stream: Any, media_type: str | None = None, parser_context: Mapping[str, Any] | None = None
    ) -> Any:
        raw = stream.read()
        if not raw.strip():
            return {}
        try:
            value = strict_json(raw)
        except ValueError as error:
            raise ParseError(str(error)) from error
        if not isinstance(value, dict):
            raise ParseError("the body must be a JSON object")
        return value

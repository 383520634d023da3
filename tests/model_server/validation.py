"""What the vendor refuses, as far as our requests could get it wrong. Messages follow the vendor's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

VERSIONS = {"2023-06-01", "2026-10-21"}
_GONE_IN_2026 = {"temperature", "top_p", "top_k"}
"""https://platform.claude.com/docs/en/api/migration-2026-10-21"""
_FIELDS = {
    "model", "messages", "max_tokens", "system", "tools", "tool_choice", "stream", "metadata",
    "stop_sequences", "temperature", "top_k", "top_p", "thinking", "output_config", "service_tier",
    "container", "inference_geo", "cache_control", "context_management", "speed",
}  # fmt: skip
_TYPED_TOOLS = {
    "bash_20250124": "bash",
    "text_editor_20250124": "str_replace_editor",
    "text_editor_20250429": "str_replace_based_edit_tool",
    "text_editor_20250728": "str_replace_based_edit_tool",
}
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")
_TOOL_ID = re.compile(r"[a-zA-Z0-9_-]+")
_BLOCKS = {
    "user": {"text", "image", "document", "tool_result"},
    "assistant": {"text", "tool_use", "thinking", "redacted_thinking"},
}


class InvalidRequestError(Exception):
    """`invalid_request_error` of the vendor; the text is its message."""


def _need(condition: object, message: str) -> None:
    if not condition:
        raise InvalidRequestError(message)


def validate(body: Any, headers: Mapping[str, str], known_thinking: Mapping[str, str]) -> None:
    """Raises InvalidRequestError. `known_thinking`: texts by signature, which must come back unchanged."""
    _need(headers.get("anthropic-version") in VERSIONS, "anthropic-version: header is required")
    content_type = headers.get("content-type", "")
    _need(content_type.startswith("application/json"), "content-type: must be application/json")
    _need(isinstance(body, dict), "the body must be a JSON object")
    for name in body:
        is_gone = name in _GONE_IN_2026 and headers["anthropic-version"] == "2026-10-21"
        _need(name in _FIELDS and not is_gone, f"{name}: Extra inputs are not permitted")
    _need(isinstance(body.get("model"), str) and body["model"], "model: Field required")
    maximum = body.get("max_tokens")
    _need(type(maximum) is int and maximum >= 1, "max_tokens: must be at least 1")
    _system(body.get("system"))
    _tools(body.get("tools", []))
    _messages(body.get("messages"), known_thinking)
    marks = _cache_marks(body)
    _need(marks <= 4, f"A maximum of 4 blocks with cache_control may be provided. Found {marks}.")


def _system(system: Any) -> None:
    if system is None or isinstance(system, str):
        return
    _need(isinstance(system, list), "system: Input should be a valid string or list")
    for number, block in enumerate(system):
        _text(block, f"system.{number}")


def _text(block: Any, where: str) -> None:
    _need(isinstance(block, dict) and block.get("type") == "text", f"{where}: must be a text block")
    _need(isinstance(block.get("text"), str), f"{where}.text: Field required")
    _need(block["text"].strip(), f"{where}: text content blocks must contain non-whitespace text")


def _tools(tools: Any) -> None:
    _need(isinstance(tools, list), "tools: Input should be a valid list")
    names: set[str] = set()
    for number, tool in enumerate(tools):
        where = f"tools.{number}"
        _need(isinstance(tool, dict), f"{where}: must be an object")
        name, kind = tool.get("name"), tool.get("type", "custom")
        _need(isinstance(name, str) and _TOOL_NAME.fullmatch(name), f"{where}.name: bad tool name")
        _need(name not in names, "tools: Tool names must be unique.")
        names.add(name)
        if kind == "custom":
            schema = tool.get("input_schema")
            _need(isinstance(schema, dict), f"{where}.custom.input_schema: Field required")
            _need(schema.get("type") == "object", f"{where}.custom.input_schema.type: should be 'object'")
            _need(isinstance(tool.get("description", ""), str), f"{where}.description: not a string")
        else:
            tags = f"{where}: Input tag {kind!r} found using 'type' does not match any of the expected tags"
            _need(kind in _TYPED_TOOLS, tags)
            _need(name == _TYPED_TOOLS[kind], f"{where}.{kind}.name: should be {_TYPED_TOOLS[kind]!r}")
            _need("input_schema" not in tool, f"{where}.{kind}.input_schema: Extra inputs are not permitted")


def _messages(messages: Any, known_thinking: Mapping[str, str]) -> None:
    _need(isinstance(messages, list) and messages, "messages: at least one message is required")
    open_calls: set[str] = set()
    seen_calls: set[str] = set()
    expected = "user"
    for number, message in enumerate(messages):
        where = f"messages.{number}"
        _need(isinstance(message, dict) and set(message) == {"role", "content"}, f"{where}: bad message")
        role, content = message["role"], message["content"]
        if role == "system" and number:  # Between turns a program may speak; Claude Code does.
            _system(content)
            continue
        _need(role == expected, f"{where}: roles must alternate between user and assistant, from user")
        expected = "assistant" if role == "user" else "user"
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        _need(isinstance(blocks, list) and blocks, f"{where}: all messages must have non-empty content")
        answered: set[str] = set()
        calls: set[str] = set()
        for position, block in enumerate(blocks):
            place = f"{where}.content.{position}"
            kind = block.get("type") if isinstance(block, dict) else None
            _need(kind in _BLOCKS[role], f"{place}: block type {kind!r} is not for role {role}")
            if kind == "text":
                _text(block, place)
                _need(role == "assistant" or not block.get("citations"), f"{place}.citations: not permitted")
            elif kind == "tool_use":
                _tool_use(block, place)
                _need(block["id"] not in seen_calls, f"{place}: `tool_use` ids must be unique")
                calls.add(block["id"])
                seen_calls.add(block["id"])
            elif kind == "tool_result":
                identifier = block.get("tool_use_id")
                _need(
                    identifier in open_calls,
                    f"{place}: unexpected `tool_use_id` found in `tool_result` blocks: {identifier}. Each"
                    " `tool_result` block must have a corresponding `tool_use` block in the message before.",
                )
                _need(identifier not in answered, f"{place}: each tool_use must have a single result")
                _need(len(answered) == position, f"{place}: tool_result blocks must come first")
                _tool_result(block, place)
                answered.add(identifier)
            elif kind == "thinking":
                _thinking(block, place, known_thinking)
        missing = open_calls - answered
        _need(
            not missing,
            f"{where}: `tool_use` ids were found without `tool_result` blocks after: {sorted(missing)}",
        )
        open_calls = calls
    _need(expected == "assistant", "messages: the last message must be from the user")


def _tool_use(block: dict[str, Any], where: str) -> None:
    identifier, name = block.get("id"), block.get("name")
    _need(isinstance(identifier, str) and _TOOL_ID.fullmatch(identifier), f"{where}.id: bad tool_use id")
    _need(isinstance(name, str) and _TOOL_NAME.fullmatch(name), f"{where}.name: bad tool name")
    _need(isinstance(block.get("input"), dict), f"{where}.input: Input should be a valid dictionary")


def _tool_result(block: dict[str, Any], where: str) -> None:
    allowed = {"type", "tool_use_id", "content", "is_error", "cache_control"}
    _need(set(block) <= allowed, f"{where}: Extra inputs are not permitted")
    content = block.get("content", "")
    _need(isinstance(content, str | list), f"{where}.content: should be a string or a list of blocks")
    if isinstance(content, list):
        for number, part in enumerate(content):
            if isinstance(part, dict) and part.get("type") in ("image", "document"):
                continue
            _text(part, f"{where}.content.{number}")
    _need(isinstance(block.get("is_error", False), bool), f"{where}.is_error: should be a boolean")


def _thinking(block: dict[str, Any], where: str, known: Mapping[str, str]) -> None:
    signature = block.get("signature")
    _need(isinstance(signature, str) and signature in known, f"{where}: Invalid `signature` in `thinking`")
    unchanged = block.get("thinking") == known[str(signature)] and set(block) == {
        "type",
        "thinking",
        "signature",
    }
    _need(unchanged, f"{where}: `thinking` blocks in an assistant message cannot be modified")


def _cache_marks(value: Any) -> int:
    """How many blocks carry `cache_control`. Tool inputs and schemas do not count."""
    if isinstance(value, list):
        return sum(_cache_marks(item) for item in value)
    if not isinstance(value, dict):
        return 0
    here = 0
    if value.get("cache_control") is not None:
        _need(value["cache_control"].get("type") == "ephemeral", "cache_control.type: should be 'ephemeral'")
        _need(value.get("type") not in ("thinking", "redacted_thinking"), "cache_control: not on thinking")
        here = 1
    return here + sum(
        _cache_marks(item) for key, item in value.items() if key not in ("input", "input_schema")
    )

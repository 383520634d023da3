"""OpenAI's Responses protocol of the scripted model server: the same scripts, another wire.

A text is an output message, a tool call a `function_call`, a thought a `reasoning` item. What stands in the input as
`function_call_output` counts as the tool's result.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests.model_server.script import Answer, Json, Reply
from tests.model_server.validation import InvalidRequestError

PATH = "/v1/responses"
_ITEMS = {
    "message", "reasoning", "function_call", "function_call_output", "custom_tool_call", "additional_tools",
    "custom_tool_call_output", "web_search_call", "local_shell_call", "local_shell_call_output",
}  # fmt: skip


def validate(body: Any) -> None:
    """Raises InvalidRequestError, in the vendor's words as far as they matter."""
    if not isinstance(body, dict) or not isinstance(body.get("model"), str):
        raise InvalidRequestError("Missing required parameter: 'model'.")
    items = body.get("input")
    if isinstance(items, str):
        return
    if not isinstance(items, list) or not items:
        raise InvalidRequestError("Missing required parameter: 'input'.")
    calls: set[str] = set()
    answered: set[str] = set()
    for number, item in enumerate(items):
        kind = item.get("type", "message")
        if kind not in _ITEMS:
            raise InvalidRequestError(f"Invalid value: '{kind}' for 'input[{number}].type'.")
        if kind in ("function_call", "custom_tool_call"):
            calls.add(item["call_id"])
        elif kind.endswith("call_output"):
            if item["call_id"] not in calls:
                raise InvalidRequestError(f"No tool call found for function call output {item['call_id']}.")
            answered.add(item["call_id"])
    if missing := calls - answered:
        raise InvalidRequestError(f"No tool output found for function call {sorted(missing)[0]}.")


def as_messages(body: Json) -> list[Json]:
    """The input in the shape of Anthropic's messages, as far as scripts and tests look at it."""
    items = body.get("input", [])
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[Json] = []
    for item in items:
        kind = item.get("type", "message")
        if kind == "message":
            parts = item["content"]
            parts = [{"text": parts}] if isinstance(parts, str) else parts
            blocks = [{"type": "text", "text": part["text"]} for part in parts if "text" in part]
            messages.append({"role": item["role"], "content": blocks})
        elif kind in ("function_call", "custom_tool_call"):
            raw = item.get("arguments", item.get("input"))
            block = {"type": "tool_use", "id": item["call_id"], "name": item["name"], "input": raw}
            messages.append({"role": "assistant", "content": [block]})
        elif kind.endswith("call_output"):
            block = {"type": "tool_result", "tool_use_id": item["call_id"], "content": item["output"]}
            if messages and messages[-1]["content"][0]["type"] == "tool_result":
                messages[-1]["content"].append(block)
            else:
                messages.append({"role": "user", "content": [block]})
    return messages


def error_answer(answer: Answer) -> Answer:
    """An error of a script, which is in Anthropic's shape, in OpenAI's."""
    try:
        error = json.loads(answer.body)["error"]
    except (ValueError, KeyError, TypeError):
        return answer
    body = {
        "error": {"message": error["message"], "type": error["type"], "param": None, "code": error["type"]}
    }
    return Answer(answer.status, json.dumps(body).encode(), answer.headers)


def message(body: Json, reply: Reply, *, input_tokens: int, output_tokens: int) -> Json:
    """The whole response."""
    used = {"input_tokens": input_tokens, "output_tokens": output_tokens, **reply.usage}
    return {
        "id": f"resp_{id(reply):024x}",
        "object": "response",
        "created_at": 1_790_000_000,
        "status": "completed",
        "model": body["model"],
        "output": [_item(block, number) for number, block in enumerate(reply.blocks)],
        "usage": {
            "input_tokens": used["input_tokens"],
            "input_tokens_details": {"cached_tokens": used.get("cache_read_input_tokens", 0)},
            "output_tokens": used["output_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used["input_tokens"] + used["output_tokens"],
        },
    }


def events(response: Json, reply: Reply, pieces: Any) -> Iterator[Json]:
    """The response as its stream. `pieces(text, count)` cuts a text into deltas."""
    number = 0

    def event(kind: str, **data: Any) -> Json:
        nonlocal number
        number += 1
        return {"type": kind, "sequence_number": number, **data}

    started = {**response, "status": "in_progress", "output": [], "usage": None}
    yield event("response.created", response=started)
    for index, item in enumerate(response["output"]):
        place = {"output_index": index, "item_id": item["id"]}
        yield event("response.output_item.added", output_index=index, item=_empty(item))
        if item["type"] == "message":
            text = item["content"][0]["text"]
            place["content_index"] = 0
            yield event("response.content_part.added", **place, part={**item["content"][0], "text": ""})
            for piece in pieces(text, reply.pieces):
                yield event("response.output_text.delta", **place, delta=piece)
            yield event("response.output_text.done", **place, text=text)
            yield event("response.content_part.done", **place, part=item["content"][0])
        elif item["type"] == "function_call":
            for piece in pieces(item["arguments"], reply.pieces):
                yield event("response.function_call_arguments.delta", **place, delta=piece)
            yield event("response.function_call_arguments.done", **place, arguments=item["arguments"])
        yield event("response.output_item.done", output_index=index, item=item)
    yield event("response.completed", response=response)


def is_delta(event: Json) -> bool:
    return str(event["type"]).endswith(".delta")


def failed_event(error_type: str) -> Json:
    """What comes in the middle of a stream that breaks."""
    error = {"code": error_type, "message": "Overloaded"}
    return {"type": "response.failed", "response": {"id": "resp_failed", "status": "failed", "error": error}}


def _item(block: Json, number: int) -> Json:
    if block["type"] == "tool_use":
        return {
            "type": "function_call",
            "id": f"fc_{block['id']}",
            "call_id": block["id"],
            "name": block["name"],
            "arguments": json.dumps(block["input"]),
            "status": "completed",
        }
    if block["type"] == "thinking":
        summary = [{"type": "summary_text", "text": block["thinking"]}]
        return {
            "type": "reasoning",
            "id": f"rs_{number}",
            "summary": summary,
            "encrypted_content": "scripted",
        }
    part = {"type": "output_text", "text": block["text"], "annotations": [], "logprobs": []}
    return {
        "type": "message", "id": f"msg_{number}", "role": "assistant", "status": "completed", "content": [part],
    }  # fmt: skip


def _empty(item: Json) -> Json:
    if item["type"] == "function_call":
        return {**item, "arguments": "", "status": "in_progress"}
    if item["type"] == "message":
        return {**item, "content": [], "status": "in_progress"}
    return item

"""A scripted model server: the wire protocols of Anthropic and OpenAI over real HTTP, for tests and browsers.

    with ModelServer(then(call("bash", {"command": "ls"}), say("Done."))) as models:
        ...  # point a session at models.url with any key
        assert models.requests[0].key == "sk-ant-test"

A script is a list of answers, or a function of the request. The server checks each request as the vendor does
and answers a malformed one with a 400 that says why, so that a wrong conversation fails a test.
"""

from tests.model_server.script import (
    Answer,
    Gate,
    Misbehaviour,
    Reply,
    Script,
    Step,
    by_prompt,
    call,
    cut,
    fail,
    garbage,
    hang,
    last_prompt,
    midstream_error,
    redirect,
    say,
    then,
    think,
    together,
)
from tests.model_server.server import ModelServer, RecordedRequest

__all__ = [
    "Answer",
    "Gate",
    "Misbehaviour",
    "ModelServer",
    "RecordedRequest",
    "Reply",
    "Script",
    "Step",
    "by_prompt",
    "call",
    "cut",
    "fail",
    "garbage",
    "hang",
    "last_prompt",
    "midstream_error",
    "redirect",
    "say",
    "then",
    "think",
    "together",
]

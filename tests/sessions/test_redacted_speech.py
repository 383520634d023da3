"""What a model says, without secret values: as one text, in any pieces, in calls and in thoughts (SECURITY 4.12)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sandboxes.guest.redaction import Patterns
from sessions_app.llm.base import Block
from sessions_app.secrecy import SessionSecrets, SpokenText

KEY = "sk-ant-spoken-key"
TOKEN = "ghp_gesprochen_é_token"
EVERY = Patterns([("LLM_API_KEY", KEY.encode()), ("GITHUB_TOKEN", TOKEN.encode())])
SECRETS = SessionSecrets(EVERY, Patterns([("LLM_API_KEY", KEY.encode())]))


@given(
    st.lists(st.sampled_from([KEY, TOKEN, KEY[:9], TOKEN[:13], "é", "sk", " ", "x\n"]), max_size=8), st.data()
)
def test_any_pieces_of_a_text_say_the_same_as_the_whole(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    spoken = SpokenText(SECRETS)
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    said = "".join(spoken.feed(piece) for piece in pieces) + spoken.end()
    assert said == SECRETS.text(text)
    assert KEY not in said
    assert TOKEN not in said


def test_text_without_a_secret_is_not_held_back() -> None:
    spoken = SpokenText(SECRETS)
    assert spoken.feed("Hello, ") == "Hello, "
    assert spoken.feed("sk-ant-s") == ""
    assert spoken.feed("ome") == "sk-ant-some"
    assert spoken.end() == ""


def test_what_is_stored_has_none_and_what_is_run_has_all_but_the_model_key() -> None:
    content: list[Block] = [
        {"type": "thinking", "thinking": f"The token is {TOKEN}.", "signature": "s1"},
        {"type": "thinking", "thinking": "Nothing here.", "signature": "s2"},
        {"type": "text", "text": f"I use {TOKEN} and {KEY}."},
        {"type": "tool_use", "id": "t1", "name": "bash", "input": {"command": f"curl -H 'x: {TOKEN}' {KEY}"}},
    ]
    text = {"type": "text", "text": "I use [redacted:GITHUB_TOKEN] and [redacted:LLM_API_KEY]."}
    stored, run = SECRETS.to_store(content), SECRETS.to_run(content)
    assert stored[:2] == [content[1], text]
    assert stored[2]["input"] == {"command": "curl -H 'x: [redacted:GITHUB_TOKEN]' [redacted:LLM_API_KEY]"}
    assert run[:3] == [content[0], content[1], text]
    assert run[3]["input"] == {"command": f"curl -H 'x: {TOKEN}' [redacted:LLM_API_KEY]"}


def test_a_message_without_a_secret_is_verbatim() -> None:
    content: list[Block] = [
        {"type": "redacted_thinking", "data": "opaque"},
        {"type": "text", "text": "plain", "citations": [1]},
    ]
    assert SECRETS.to_store(content) == content
    assert SECRETS.to_run(content) == content

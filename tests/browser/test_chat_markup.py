"""What an agent or a command prints is shown as text, or as the few elements that the chat makes itself."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.browser.chat_harness.chat import Chat
from tests.browser.chat_harness.pages import Site
from tests.browser.chat_harness.server import ScriptedSession

pytestmark = pytest.mark.browser

ATTACK = "window.pwned=1"
HOSTILE = [
    f"<script>{ATTACK}</script>",
    f"<img src=x onerror={ATTACK}>",
    f'<img src="http://evil.test/a.png" onload="{ATTACK}">',
    f"<svg onload={ATTACK}>",
    f"<svg><script>{ATTACK}</script></svg>",
    f'<svg><a xlink:href="javascript:{ATTACK}"><text>x</text></a></svg>',
    f'<iframe src="javascript:{ATTACK}"></iframe>',
    f"<iframe srcdoc='<script>parent.{ATTACK}</script>'></iframe>",
    '<iframe src="http://evil.test/"></iframe>',
    f'<object data="javascript:{ATTACK}"></object>',
    f'<embed src="javascript:{ATTACK}">',
    f"<body onload={ATTACK}>",
    f"<details open ontoggle={ATTACK}>",
    f"<input autofocus onfocus={ATTACK}>",
    f"<video><source onerror={ATTACK}></video>",
    f"<math><mtext></mtext><script>{ATTACK}</script></math>",
    f'<form action="javascript:{ATTACK}"><button>x</button></form>',
    '<form action="http://evil.test/"><input type=submit></form>',
    '<link rel=stylesheet href="http://evil.test/x.css">',
    "<style>@import 'http://evil.test/x.css';</style>",
    '<meta http-equiv=refresh content="0;url=http://evil.test/">',
    '<base href="http://evil.test/">',
    f"<template><script>{ATTACK}</script></template>",
    "<e2a-chat connect-url=ws://evil.test token=x></e2a-chat>",
    f"</p></div></article><script>{ATTACK}</script>",
    f"<!--><script>{ATTACK}</script>",
    f"<![CDATA[<script>{ATTACK}</script>]]>",
    f"&lt;script&gt;{ATTACK}&lt;/script&gt;",
    f"&#60;script&#62;{ATTACK}",
    f"[x](javascript:{ATTACK})",
    f"[x](JaVaScRiPt:{ATTACK})",
    f"[x](java\tscript:{ATTACK})",
    f"[x](<java\nscript:{ATTACK}>)",
    f"[x](<javascript:{ATTACK}>)",
    f"[x]( javascript:{ATTACK})",
    f"[x](\x01javascript:{ATTACK})",
    f"[x](javascript&colon;{ATTACK})",
    f"[x](data:text/html,<script>{ATTACK}</script>)",
    f"[x](vbscript:{ATTACK})",
    "[x](blob:http://evil.test/1)",
    "[x](file:///etc/passwd)",
    "[x](//evil.test/)",
    "[x](/v1/docs)",
    f'[x](https://ok.test/"onmouseover="{ATTACK})',
    f'[x](https://ok.test/ "title\\" onclick={ATTACK}")',
    f"[<img src=x onerror={ATTACK}>](https://ok.test/)",
    f"[x][y]\n\n[y]: javascript:{ATTACK}",
    f"<javascript:{ATTACK}>",
    "![pixel](http://evil.test/pixel.png)",
    "![pixel][p]\n\n[p]: http://evil.test/pixel.png",
    f"![x](javascript:{ATTACK})",
    f'![x](https://ok.test/" onerror="{ATTACK})',
    f"```html\n<script>{ATTACK}</script>\n```",
    f'```" onclick="{ATTACK}\ncode\n```',
    f"| a | b |\n|---|---|\n| <img src=x onerror={ATTACK}> | [x](javascript:{ATTACK}) |",
    f"# <img src=x onerror={ATTACK}>",
    f"- <script>{ATTACK}</script>\n  - [x](javascript:{ATTACK})",
    f"> <script>{ATTACK}</script>",
    f"`<script>{ATTACK}</script>`",
    f"**<b onclick={ATTACK}>x</b>**",
    f"\x1b]8;;javascript:{ATTACK}\x07click\x1b]8;;\x07",
    "\x1b]0;title\x07\x1b[2J\x1b[31mred\x1b[0m\x1b]52;c;aGk=\x1b\\",
    "\u202egnp.exe\u202c \u2028\u2029\ufeff",
    "__proto__ constructor toString",
]
ELEMENTS_MADE = {
    "A",
    "ARTICLE",
    "BLOCKQUOTE",
    "BR",
    "BUTTON",
    "CODE",
    "DETAILS",
    "DIV",
    "EM",
    "FIGCAPTION",
    "FIGURE",
    "FORM",
    "H3",
    "H4",
    "H5",
    "H6",
    "HEADER",
    "HR",
    "LABEL",
    "LI",
    "OL",
    "P",
    "PRE",
    "S",
    "SECTION",
    "SPAN",
    "STRONG",
    "SUMMARY",
    "TABLE",
    "TBODY",
    "TD",
    "TEXTAREA",
    "TH",
    "THEAD",
    "TR",
    "UL",
}
AUDIT = """() => {
  const all = [...document.querySelector("e2a-chat").shadowRoot.querySelectorAll("*")];
  return {
    tags: [...new Set(all.map((e) => e.tagName))],
    links: all.filter((e) => e.tagName === "A").map((e) => [e.protocol, e.rel, e.target].join(" ")),
    handlers: all.flatMap((e) => e.getAttributeNames()).filter((n) => /^(on.*|style|src)$/.test(n)),
    pwned: window.pwned ?? null,
  };
}"""


def test_no_hostile_text_runs_loads_or_becomes_markup_however_it_is_split(
    chat: Chat, host: Site, session: ScriptedSession
) -> None:
    chat.show(host, session)
    chat.wait_connection("live")
    for number, payload in enumerate(HOSTILE):
        task = f"tsk_{number}"
        session.start_task(payload, task)
        for character in payload:  # every split point at once
            session.say(character, task)
        session.append(
            "tool_use",
            task_id=task,
            tool_use_id=f"tu_{number}",
            name=payload,
            input={"command": payload, payload: payload},
        )
        for character in payload:
            session.print(character, task)
        session.append("error", task_id=task, code=payload, detail=payload, retry="terminal")
        session.append("exit", task_id=task, exit_code=1, reason=payload, signal=payload)
    session.append("secrets_updated", bundle=HOSTILE[0], version=HOSTILE[1], keys=HOSTILE[:3])
    last = session.append("context_compacted", summary=HOSTILE[0])
    chat.wait_seq(last)
    expect(chat.find(".foot")).to_have_count(len(HOSTILE))
    expect(chat.log).to_contain_text("The conversation was shortened")

    seen = chat.page.evaluate(AUDIT)

    assert seen["pwned"] is None
    assert set(seen["tags"]) <= ELEMENTS_MADE
    assert seen["handlers"] == []
    assert {entry.split(" ", 1)[1] for entry in seen["links"]} == {"noopener nofollow ugc _blank"}
    assert {entry.split(" ", 1)[0] for entry in seen["links"]} <= {"http:", "https:", "mailto:"}
    assert [url for url in chat.requests if "evil" in url or "ok.test" in url] == []


DOCUMENT = """\
# Title with `code`

Some *emphasis*, **strong**, ***both***, ~~gone~~, snake_case_name, 2 * 3 * 4 and a\\*b.
A second line with a [link](https://example.com/a_(b)?c=d "t") and https://example.com/x_y_z, too.

- one
- two
  - nested **deep**
    1. deeper
- three

  with a paragraph

3. third
4. fourth

```python
def f(x):
    return "``` not a fence"

**no**
```

| a | b |
|---|:-:|
| 1 | `x\\|y` |
| 2 |

> quote *x*
>
> - item

---

~~~
tilde
~~~
Last **open and `open
"""


def test_markdown_that_streams_in_looks_like_markdown_that_came_at_once(
    chat: Chat, host: Site, session: ScriptedSession
) -> None:
    chat.show(host, session)
    chat.wait_connection("live")
    markup = "(task) => task.querySelector('.markdown').innerHTML"
    session.start_task("whole")
    session.say(DOCUMENT)
    session.exit_task()
    expect(chat.find(".foot")).to_contain_text("Done")
    whole = chat.find(".task").first.evaluate(markup)
    for size in (1, 2, 3, 7, 16):
        task = f"tsk_by_{size}"
        session.start_task("parts", task)
        for at in range(0, len(DOCUMENT), size):
            session.say(DOCUMENT[at : at + size], task)
            if at % (size * 8) == 0:
                chat.wait_seq(len(session.log))
        chat.wait_seq(len(session.log))
        assert chat.find(".task").last.evaluate(markup) == whole, size

    for expected in (
        "<h3>Title with <code>code</code></h3>",
        "<em>emphasis</em>, <strong>strong</strong>, <strong><em>both</em></strong>, <s>gone</s>, ",
        "snake_case_name, 2 * 3 * 4 and a*b.",
        'href="https://example.com/a_(b)?c=d"',
        ">https://example.com/x_y_z</a>, too.",
        "<li>two<ul><li>nested <strong>deep</strong><ol><li>deeper</li></ol></li></ul></li>",
        '<ol start="3"><li>third</li><li>fourth</li></ol>',
        'return "``` not a fence"\n\n**no**',
        "<td>2</td><td></td>",
        "<blockquote><p>quote <em>x</em></p><ul><li>item</li></ul></blockquote><hr>",
        "<p>Last **open and `open</p>",
    ):
        assert expected in whole, whole


def test_escape_sequences_vanish_and_a_carriage_return_rewrites_the_line(
    chat: Chat, host: Site, session: ScriptedSession
) -> None:
    text = (
        "\x1b[1;31mred\x1b[0m \x1b]0;title\x07plain \x1b]8;;http://x.test\x1b\\link\x1b]8;;\x1b\\ "
        "\x1bP1$r\x1b\\\x1b(B\x1b7\x9b2Jend\a\b\r\n10 %\r50 %\r100 %\nnever ended \x1b]0;\nstill here\n"
    )
    expected = "red plain link end\n100 %\nnever ended \nstill here\n"
    chat.show(host, session)
    chat.wait_connection("live")
    session.start_task("whole")
    session.print(text)
    session.start_task("split", "tsk_2")
    for character in text:
        session.print(character, "tsk_2")
    chat.wait_seq(len(session.log))
    assert chat.text() == expected * 2


def test_text_made_to_be_slow_to_parse_does_not_freeze_the_page(
    chat: Chat, host: Site, session: ScriptedSession
) -> None:
    slow = [
        "[" * 19_000,
        "*a" * 9_000,
        "`" * 19_000,
        "[](" * 6_000,
        "<http://" * 2_500,
        "> " * 9_000,
        "- " * 9_000,
    ]
    slow += [
        "_" * 3 + "a_" * 9_000,
        "|" * 19_000 + "\n" + "-|" * 9_000,
        "![" * 9_000,
        " " * 19_000 + "#",
        "#" * 19_000,
    ]
    chat.show(host, session)
    chat.wait_connection("live")
    for number, text in enumerate(slow):
        session.start_task(str(number), f"tsk_{number}")
        for at in range(0, len(text), 1_000):
            session.say(text[at : at + 1_000], f"tsk_{number}")
        chat.page.evaluate("window.t0 = performance.now()")
        chat.wait_seq(len(session.log))
        taken = chat.page.evaluate("performance.now() - t0")
        assert taken < 2_000, (number, text[:20], taken)


def test_more_output_than_a_page_can_hold_keeps_its_end(
    chat: Chat, host: Site, session: ScriptedSession
) -> None:
    session.start_task("yes")
    line = "y" * 99 + "\n"
    for _ in range(60):
        session.print(line * 100)
    session.print("the end\n")
    chat.show(host, session)
    chat.wait_seq(len(session.log))
    shown = chat.text()
    assert shown.endswith("the end\n")
    assert 350_000 < len(shown) <= 400_000
    expect(chat.find(".dropped")).to_contain_text("earlier characters are not shown")

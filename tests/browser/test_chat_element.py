"""`<e2a-chat>` keeps its promises towards the reader and the server, whatever the line does."""

from __future__ import annotations

import random
from typing import Literal

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.chat_harness.chat import Chat, chat_in
from tests.browser.chat_harness.pages import ROOT, Site
from tests.browser.chat_harness.server import ScriptedSession

pytestmark = pytest.mark.browser


def test_a_task_is_shown_with_its_prompt_text_command_output_and_exit(
    chat: Chat, host: Site, session: ScriptedSession
) -> None:
    session.start_task("List the files")
    session.say("I will **look**.")
    session.append(
        "tool_use", task_id="tsk_1", tool_use_id="tu_1", name="bash", input={"command": "ls /workspace"}
    )
    session.print("a.txt\n")
    session.print("no such file\n", stream="stderr")
    session.append(
        "tool_result", task_id="tsk_1", tool_use_id="tu_1", is_error=True, exit_code=2, truncated=False
    )
    session.append(
        "usage", task_id="tsk_1", input_tokens=900, output_tokens=100, cache_read_tokens=0, cost_usd=0.5
    )
    session.exit_task()

    chat.show(host, session)

    expect(chat.find(".prompt-text")).to_have_text("List the files")
    expect(chat.find(".markdown strong")).to_have_text("look")
    expect(chat.find(".tool summary code")).to_have_text("ls /workspace")
    expect(chat.find(".tool .exit")).to_have_text("exit 2")
    expect(chat.find(".output .stdout")).to_have_text("a.txt\n")
    expect(chat.find(".output .stderr")).to_have_text("no such file\n")
    expect(chat.find(".foot")).to_contain_text("Done")
    expect(chat.find(".usage")).to_have_text("1K tokens · $0.5000")
    expect(chat.find(".state")).to_have_text("Ready")


def test_enter_sends_shift_enter_makes_a_line_and_stop_cancels(
    chat: Chat, host: Site, session: ScriptedSession
) -> None:
    session.run = lambda task, prompt: session.append("status", status="running")
    chat.show(host, session)
    chat.wait_connection("live")
    expect(chat.find("button.stop")).to_be_hidden()

    chat.input.focus()
    chat.page.keyboard.type("echo 1")
    chat.page.keyboard.press("Shift+Enter")
    chat.page.keyboard.type("echo 2")
    chat.page.keyboard.press("Enter")

    session.wait(lambda: session.frames("task"), "the task")
    assert session.frames("task")[0]["prompt"] == "echo 1\necho 2"
    expect(chat.input).to_have_value("")
    expect(chat.find(".prompt")).to_have_count(1)
    chat.page.keyboard.press("Tab")  # to Stop, which comes after the text field
    chat.page.keyboard.press("Enter")
    session.wait(lambda: session.frames("cancel"), "the cancel")
    task = next(iter(session.task_ids.values()))
    assert session.frames("cancel") == [{"type": "cancel", "task_id": task}]
    session.exit_task(130, task)
    expect(chat.find(".foot")).to_contain_text("Stopped")
    expect(chat.find("button.stop")).to_be_hidden()


def test_thirty_cuts_in_four_hundred_lines_lose_double_and_reorder_nothing(
    chat: Chat, host: Site, session: ScriptedSession
) -> None:
    chance = random.Random(7)
    session.cut_after = iter([chance.randint(1, 24) for _ in range(30)])
    session.start_task("count")
    expected = "".join(f"line {n}\n" for n in range(400))
    for n in range(400):
        session.print(f"line {n}\n")
    session.exit_task()

    chat.show(host, session)

    expect(chat.find(".foot")).to_contain_text("Done", timeout=60_000)
    assert chat.text() == expected
    cursors = [int(query["after"]) for query in session.connects]
    assert len(cursors) >= 30
    assert cursors == sorted(cursors)


def test_a_frame_that_comes_twice_is_shown_and_told_once(
    chat: Chat, host: Site, session: ScriptedSession
) -> None:
    session.doubled = True
    chat.page.add_init_script(
        "window.seqs = []; addEventListener('e2a-frame', (e) => e.detail.ts && seqs.push(e.detail.seq))"
    )
    chat.show(host, session)
    session.start_task("x")
    for n in range(20):
        session.say(f"{n} ")
    session.exit_task()
    expect(chat.find(".foot")).to_contain_text("Done")
    assert chat.text() == " ".join(str(n) for n in range(20))
    assert chat.page.evaluate("seqs") == list(range(1, len(session.log) + 1))


def test_a_lost_hint_is_fetched_with_the_cursor(chat: Chat, host: Site, session: ScriptedSession) -> None:
    chat.show(host, session)
    chat.wait_connection("live")
    session.lost_hints = {5}
    session.start_task("x")
    for word in ("one ", "two ", "three"):
        session.say(word)
    session.exit_task()
    expect(chat.find(".foot")).to_contain_text("Done")
    assert chat.text() == "one two three"
    assert session.connects[1]["after"] == "4"


def test_what_a_dead_worker_wrote_is_taken_back(chat: Chat, host: Site, session: ScriptedSession) -> None:
    session.start_task("x")
    kept = session.say("Kept. ")
    session.say("Void text")
    session.append("tool_use", task_id="tsk_1", tool_use_id="tu_1", name="bash", input={"command": "void"})
    chat.show(host, session)
    expect(chat.find(".tool")).to_have_count(1)
    session.append("restarted", task_id="tsk_1", discard_after=kept)
    session.say("Goes on.")
    session.exit_task()
    expect(chat.find(".foot")).to_contain_text("Done")
    assert chat.text() == "Kept.Goes on."
    expect(chat.find(".tool")).to_have_count(0)
    expect(chat.find(".prompt-text")).to_have_text("x")
    expect(chat.log).to_contain_text("The worker was replaced")


def test_a_task_cut_off_before_its_answer_is_sent_again_under_the_same_id(
    chat: Chat, host: Site, session: ScriptedSession
) -> None:
    session.run = lambda task, prompt: session.exit_task(0, task)
    session.cut_on_task = True
    chat.show(host, session)
    chat.wait_connection("live")
    chat.input.fill("only once")
    chat.page.keyboard.press("Enter")
    expect(chat.find(".foot")).to_contain_text("Done")
    expect(chat.find(".prompt")).to_have_count(1)
    assert len(session.task_ids) == 1
    assert len({frame["id"] for frame in session.frames("task")}) == 1


def test_a_task_written_while_offline_is_sent_when_connected(
    chat: Chat, host: Site, session: ScriptedSession
) -> None:
    session.refusals = [1012] * 3
    session.run = lambda task, prompt: session.exit_task(0, task)
    chat.show(host, session)
    session.wait(lambda: session.connects, "the first try")
    chat.input.fill("later")
    chat.page.keyboard.press("Enter")
    expect(chat.find(".foot")).to_contain_text("Done")
    assert [frame["prompt"] for frame in session.frames("task")] == ["later"]


def test_a_task_that_the_server_refuses_can_be_sent_again(
    chat: Chat, host: Site, session: ScriptedSession
) -> None:
    chat.show(host, session)
    chat.wait_connection("live")
    session.task_ids = _RefuseFirst(session)
    chat.input.fill("too many")
    chat.page.keyboard.press("Enter")
    expect(chat.find(".hint")).to_contain_text("Not sent: The queue is full")
    session.task_ids = {}
    chat.page.get_by_role("button", name="Send again").click()
    session.wait(lambda: session.task_ids, "the second try")
    expect(chat.find(".prompt")).to_have_count(1)


class _RefuseFirst(dict[str, str]):
    """Knows every task already, and answers it with an error."""

    def __init__(self, session: ScriptedSession) -> None:
        super().__init__()
        self.session = session

    def __contains__(self, key: object) -> bool:
        self.session.send_unstored("error", code="queue_full", detail="The queue is full.")
        return True


RENEW = """
window.asked = [];
addEventListener("e2a-token-needed", (event) => {
  asked.push(event.detail.reason);
  event.respondWith(Promise.resolve("fresh"));
});
"""


def test_an_expired_token_is_asked_for_and_the_log_goes_on(
    chat: Chat, host: Site, session: ScriptedSession
) -> None:
    chat.page.add_init_script(RENEW)
    chat.show(host, session)
    session.start_task("x")
    session.say("before ")
    chat.wait_seq(4)
    session.tokens = {"fresh"}
    session.cut()
    session.wait(lambda: session.connects[-1]["token"] == "fresh", "the fresh token")
    assert session.connects[-1]["after"] == "4"
    session.say("after")
    session.exit_task()
    expect(chat.find(".foot")).to_contain_text("Done")
    assert chat.text() == "before after"
    assert chat.page.evaluate("asked") == ["expired"]


def test_tokens_that_are_never_good_are_not_asked_for_without_end(
    chat: Chat, host: Site, session: ScriptedSession
) -> None:
    session.tokens = set()
    chat.page.add_init_script(RENEW)
    chat.show(host, session)
    session.wait(lambda: len(session.connects) == 4, "four tries")
    expect(chat.find(".middle .banner")).to_contain_text("no longer valid. ")
    chat.wait_connection("token")
    assert chat.page.evaluate("asked.length") == 3


def test_a_new_token_attribute_ends_the_wait(chat: Chat, host: Site, session: ScriptedSession) -> None:
    session.start_task("hello")
    chat.show(host, session, 'token="bad"')
    chat.wait_connection("token")
    expect(chat.find(".middle .banner")).to_contain_text("no longer valid")
    chat.element("setAttribute('token', 'good')")
    chat.wait_connection("live")
    expect(chat.find(".prompt-text")).to_have_text("hello")
    expect(chat.find(".middle .banner")).to_be_hidden()


def test_properties_set_before_the_script_loads_are_used_and_the_token_stays_out_of_the_page(
    chat: Chat, host: Site, session: ScriptedSession
) -> None:
    session.start_task("hello")
    host.policy = None  # the test adds the script by itself
    host.pages["/"] = "<!doctype html><e2a-chat></e2a-chat>"
    chat.page.goto(host.origin + "/")
    chat.page.evaluate(
        "url => Object.assign(document.querySelector('e2a-chat'), {token: 'good', connectUrl: url})",
        session.url,
    )
    chat.page.add_script_tag(url="/static/e2a/chat.js")
    expect(chat.find(".prompt-text")).to_have_text("hello")
    assert "good" not in chat.page.content()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (4400, "protocol error"),
        (4403, "not allowed to open"),
        (4404, "no such session"),
        (4409, "opened somewhere else"),
    ],
)
def test_a_refusal_that_stays_is_told_and_not_tried_again(
    chat: Chat, host: Site, session: ScriptedSession, code: int, words: str
) -> None:
    session.refusals = [code]
    chat.show(host, session)
    chat.wait_connection("stopped")
    expect(chat.find(".middle .banner")).to_contain_text(words)
    expect(chat.input).to_be_disabled()
    assert len(session.connects) == 1
    chat.page.get_by_role("button", name="Try now").click()
    chat.wait_connection("live")
    expect(chat.input).to_be_enabled()


@pytest.mark.parametrize("code", [1011, 1012, 4408, 4413, 4500])
def test_a_passing_trouble_is_followed_by_a_reconnect(
    chat: Chat, host: Site, session: ScriptedSession, code: int
) -> None:
    chat.show(host, session)
    chat.wait_connection("live")
    session.close(code)
    session.wait(lambda: len(session.connects) == 2, "a reconnect")
    chat.wait_connection("live")


def test_too_fast_waits_longer_before_it_reconnects(chat: Chat, host: Site, session: ScriptedSession) -> None:
    chat.page.clock.install()
    session.refusals = [4429]
    chat.show(host, session)
    chat.wait_connection("waiting")
    expect(chat.find(".middle .banner")).to_contain_text("Too many")
    chat.page.clock.run_for(4_900)
    assert len(session.connects) == 1
    chat.page.clock.run_for(3_000)
    session.wait(lambda: len(session.connects) == 2, "a reconnect after five seconds")


def test_an_ended_session_is_replayed_and_then_left_alone(
    chat: Chat, host: Site, session: ScriptedSession
) -> None:
    session.start_task("x")
    session.exit_task()
    session.append("status", status="ended", end_reason="idle")
    session.ended = True
    chat.show(host, session)
    chat.wait_connection("ended")
    expect(chat.find(".state")).to_have_text("Ended: idle too long")
    expect(chat.find(".foot")).to_contain_text("Done")
    expect(chat.input).to_be_disabled()
    chat.element("shadowRoot.querySelector('textarea').value = 'x'")
    assert len(session.connects) == 1


def test_silence_is_probed_and_then_taken_for_a_dead_line(
    chat: Chat, host: Site, session: ScriptedSession
) -> None:
    chat.page.clock.install()
    chat.show(host, session)
    chat.page.clock.run_for(1_000)
    chat.wait_connection("live")
    chat.page.clock.run_for(26_000)
    session.wait(lambda: session.frames("ping"), "a ping")
    chat.page.clock.run_for(40_000)  # no pong comes
    session.wait(lambda: len(session.connects) == 2, "a reconnect")


def test_an_alien_log_replaces_the_one_on_screen(chat: Chat, host: Site, session: ScriptedSession) -> None:
    session.start_task("old")
    session.say("old text")
    chat.show(host, session)
    chat.wait_seq(4)
    with session.changed:
        session.log.clear()
    session.start_task("new")
    session.resync = {"type": "resync", "from": 1, "head": 3}
    session.cut()
    expect(chat.find(".prompt-text")).to_have_text("new")
    expect(chat.log).not_to_contain_text("old")


def test_a_cursor_that_is_too_old_goes_on_from_what_is_kept(
    chat: Chat, host: Site, session: ScriptedSession
) -> None:
    session.start_task("gone")
    session.start_task("kept", "tsk_2")
    session.resync = {"type": "resync", "from": 4, "head": 6}
    chat.show(host, session)
    chat.wait_seq(6)
    expect(chat.find(".prompt-text")).to_have_text("kept")
    expect(chat.log).to_contain_text("Earlier output is no longer kept")
    assert len(session.connects) == 1


def test_live_only_asks_for_no_history_but_loses_nothing_after_a_cut(
    chat: Chat, host: Site, session: ScriptedSession
) -> None:
    session.start_task("before")
    chat.show(host, session, 'token="good" live-only')
    chat.wait_connection("live")
    assert "after" not in session.connects[0]
    session.say("one ")
    chat.wait_seq(4)
    session.cut()
    session.say("two")
    session.wait(lambda: len(session.connects) == 2, "a reconnect")
    chat.wait_seq(5)
    assert session.connects[1]["after"] == "4"
    assert chat.text() == "one two"


def test_the_reader_is_told_about_secrets_summaries_errors_and_the_end(
    chat: Chat, host: Site, session: ScriptedSession
) -> None:
    session.start_task("x")
    session.append("secrets_updated", bundle="llm", version=3, keys=["LLM_API_KEY"])
    session.append("context_compacted", summary="They talked about files.")
    session.append("error", task_id="tsk_1", code="model_overloaded", detail="Busy.", retry="retrying")
    session.append("error", code="sandbox_lost", detail="It is gone.", retry="terminal")
    chat.show(host, session)
    chat.wait_connection("live")
    session.send_unstored("expiring", seconds_left=60, alive_because=None)
    expect(chat.page.get_by_text("This session ends in 60 s unless it is used.")).to_be_visible()
    session.send_unstored("expiring", seconds_left=59, alive_because="viewer_attached")
    expect(chat.page.get_by_text("This session reaches its time limit in 59 s.")).to_be_visible()
    for text in (
        "“llm” are now version 3: LLM_API_KEY",
        "They talked about files.",
        "Trying again…",
        "It is gone.",
    ):
        expect(chat.log).to_contain_text(text)
    session.append("status", status="running")
    expect(chat.page.get_by_text("This session reaches its")).to_be_hidden()


def test_a_task_wrongly_taken_for_refused_is_taken_back_when_the_server_has_it(
    chat: Chat, host: Site, session: ScriptedSession
) -> None:
    chat.show(host, session)
    chat.wait_connection("live")
    session.task_ids = _RefuseFirst(session)
    chat.input.fill("hello")
    chat.page.keyboard.press("Enter")
    expect(chat.find(".hint")).to_contain_text("Not sent")
    sent = session.frames("task")[0]
    session.append("task_queued", task_id="tsk_9", id=sent["id"], prompt=sent["prompt"])
    session.exit_task(0, "tsk_9")
    expect(chat.find(".foot")).to_contain_text("Done")
    expect(chat.find(".prompt")).to_have_count(1)
    expect(chat.find(".refused")).to_have_count(0)


def test_an_approval_is_answered_with_a_button(chat: Chat, host: Site, session: ScriptedSession) -> None:
    session.start_task("x")
    session.append("approval_requested", task_id="tsk_1", approval_id="apr_1", tool_use_id="tu_1")
    chat.show(host, session)
    chat.wait_connection("live")
    chat.page.get_by_role("button", name="Deny").click()
    session.wait(lambda: session.frames("approval"), "the answer")
    assert session.frames("approval") == [{"type": "approval", "approval_id": "apr_1", "decision": "deny"}]
    expect(chat.log).to_contain_text("Denied.")


def test_the_log_follows_the_end_only_while_the_reader_is_there(
    chat: Chat, host: Site, session: ScriptedSession
) -> None:
    session.start_task("x")
    session.say("\n\n".join(f"paragraph {n}" for n in range(60)))
    chat.show(host, session)
    chat.wait_seq(4)
    distance = "shadowRoot.querySelector('.log')"
    at_end = f"{distance}.scrollHeight - document.querySelector('e2a-chat').{distance}.scrollTop"
    height = chat.element(f"{distance}.clientHeight")
    assert chat.element(at_end) <= height + 2
    chat.log.evaluate("(log) => { log.scrollTop = 100 }")
    chat.page.evaluate("() => new Promise(requestAnimationFrame)")
    session.say("\n\nmore")
    chat.wait_seq(5)
    assert chat.element(f"{distance}.scrollTop") == 100
    chat.page.get_by_role("button", name="Newest").click()
    assert chat.element(at_end) <= height + 2


def test_thousands_of_frames_do_not_hold_the_page_up(
    chat: Chat, host: Site, session: ScriptedSession
) -> None:
    session.start_task("flood")
    session.append(
        "tool_use", task_id="tsk_1", tool_use_id="tu_1", name="bash", input={"command": "seq 5000"}
    )
    for n in range(5_000):
        session.print(f"{n}\n")
    session.append(
        "tool_result", task_id="tsk_1", tool_use_id="tu_1", is_error=False, exit_code=0, truncated=False
    )
    for n in range(3_000):
        session.say(f"word{n} " + ("\n\n" if n % 40 == 39 else ""))
    session.exit_task()
    chat.page.add_init_script(
        """
        window.longest = 0;
        let last;
        const tick = () => {
          const now = performance.now();
          longest = Math.max(longest, now - last);
          last = now;
          requestAnimationFrame(tick);
        };
        addEventListener("load", () => { last = performance.now(); tick(); });
        """
    )
    chat.show(host, session)
    expect(chat.find(".foot")).to_contain_text("Done", timeout=30_000)
    assert chat.text().startswith("0\n1\n")
    assert "word2999" in chat.text()
    assert chat.page.evaluate("longest") < 400  # milliseconds without a paint, on a slow, shared machine
    assert chat.element("shadowRoot.querySelector('.output pre').childNodes.length") == 1


@pytest.mark.parametrize("width", [360, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen_in_both_colour_schemes(
    browser: Browser,
    host: Site,
    session: ScriptedSession,
    width: int,
    scheme: Literal["light", "dark"],
) -> None:
    session.start_task("x" * 300)
    session.say("long `" + "y" * 300 + "` https://example.com/" + "z" * 300)
    session.print("w" * 500)
    with chat_in(browser, width, scheme) as chat:
        chat.show(host, session)
        chat.wait_seq(5)
        assert chat.page.evaluate("document.documentElement.scrollWidth") <= width
        assert chat.element("shadowRoot.querySelector('.log').scrollWidth") <= width
        ground = chat.page.evaluate("getComputedStyle(document.querySelector('e2a-chat')).backgroundColor")
        assert ground == ("rgb(255, 254, 251)" if scheme == "light" else "rgb(23, 29, 26)")
        chat.element("setAttribute('theme', 'dark')")
        ground = chat.page.evaluate("getComputedStyle(document.querySelector('e2a-chat')).backgroundColor")
        assert ground == "rgb(23, 29, 26)"
        assert chat.complaints == []


def test_the_example_in_the_docs_embeds_the_chat_from_another_origin(
    chat: Chat, host: Site, session: ScriptedSession
) -> None:

    def list_files(task: str, prompt: str) -> None:
        session.print("a.txt\n", task)
        session.exit_task(0, task)

    session.run = list_files
    example = (ROOT / "docs" / "how-to" / "embed-example.html").read_text()
    host.pages["/embed"] = example.replace("http://127.0.0.1:8000", host.origin)
    host.policy = None  # the example has its script in the page, to be read in one piece
    chat.page.goto(host.origin + "/embed")
    chat.page.get_by_label("connect_url").fill(session.url)
    chat.page.get_by_label("jwt").fill("good")
    chat.page.get_by_role("button", name="Open the chat").click()
    chat.wait_connection("live")
    assert session.url.split("/")[2] != host.origin.split("/")[2]
    chat.page.get_by_role("textbox", name="Message to the agent").fill("List files in /workspace")
    chat.page.keyboard.press("Enter")
    expect(chat.find(".output pre")).to_have_text("a.txt\n")
    expect(chat.find(".foot")).to_contain_text("Done")

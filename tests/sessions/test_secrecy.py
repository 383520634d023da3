"""Nothing planted as a secret is found in container, logs, database file, Redis or frames (SECURITY 2.7, 4.7)."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import docker
import pytest
import redis
import websockets

from tests.live import LiveStack
from tests.model_server import call, say, then, together
from tests.sessions import sockets
from tests.sessions.sockets import hear_until, output_of, run_task

pytestmark = [pytest.mark.docker, pytest.mark.timeout(280)]

MODEL_KEY = f"sk-ant-planted/{secrets.token_hex(12)}+key"
TOKEN = f"ghp_planted {secrets.token_hex(12)}~t"
SLOWLY = r"""
printf %s "$GITHUB_TOKEN" | sed 's/./&\n/g' | while IFS= read -r c; do printf %s "$c"; sleep 0.01; done; echo
"""
ENCODED = r"""
printf %s "$GITHUB_TOKEN" | od -An -v -tx1 | tr -d ' \n'; echo; printf 'a%s' "$GITHUB_TOKEN" | base64 -w0
"""


def forms(value: str) -> list[bytes]:
    """The value itself, and as hex, URL-escaped, JSON-escaped, and inside base64 at each offset."""
    raw = value.encode()
    found = [raw, raw.hex().encode(), quote(value, safe="").encode(), json.dumps(value)[1:-1].encode()]
    for offset in range(3):
        digits = base64.b64encode(b"\0" * offset + raw).rstrip(b"=")
        inner = digits[(offset * 8 + 5) // 6 : (offset + len(raw)) * 8 // 6]
        found += [inner, inner.replace(b"+", b"-").replace(b"/", b"_")]
    return found


def assert_absent(data: bytes, values: dict[str, str], where: str) -> None:
    for name, value in values.items():
        for form in forms(value):
            assert form not in data, (
                f"{name} is in {where}: …{data[max(0, data.index(form) - 120) :][:120]!r}"
            )


class RedisWatch:
    """Everything that goes through the stack's Redis while entered, and what it holds at the end."""

    def __init__(self, live: LiveStack) -> None:
        self.client = redis.Redis(unix_socket_path=str(live.data_dir / "run" / "valkey.sock"))
        self.seen: list[str] = []
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        with self.client.monitor() as monitor:  # type: ignore[no-untyped-call]
            self._ready.set()
            for command in monitor.listen():
                self.seen.append(command["command"])
                if self._stop.is_set():
                    return

    def __enter__(self) -> RedisWatch:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self.client.ping()
        self._thread.join(10)

    def everything(self) -> bytes:
        """All commands, what Celery's messages hold inside their base64, and all keys with their values."""
        text = "\n".join(self.seen)
        parts = [text.encode(errors="surrogateescape"), *(_unpacked(text))]
        client: Any = self.client
        readers: dict[bytes, Callable[[bytes], Any]] = {
            b"string": client.get,
            b"list": lambda key: client.lrange(key, 0, -1),
            b"set": client.smembers,
            b"hash": client.hgetall,
            b"zset": lambda key: client.zrange(key, 0, -1),
        }
        for key in client.scan_iter(count=500):
            value = readers.get(client.type(key), client.dump)(key)
            parts += [key, repr(value).encode(), *_unpacked(repr(value))]
        return b"\n".join(parts)


def _unpacked(text: str) -> Iterator[bytes]:
    for packed in re.findall(r"[A-Za-z0-9+/]{24,}={0,2}", text):
        yield base64.b64decode(packed + "=" * (-len(packed) % 4))


@pytest.fixture(scope="module")
def journey(live: LiveStack, live_key: str) -> Iterator[dict[str, Any]]:
    """All that a person does with planted values, and everything that was answered and heard meanwhile."""
    email = "planted@example.com"
    account = live.sign_in(email)
    code = re.findall(r"^\s*(\d{6})\s*$", newest_mail(live, email), re.M)[0]
    answers: list[bytes] = []

    def asked(method: str, path: str, body: Any = None, token: str = "") -> Any:
        answer = live.request(method, path, body, token=token or account)
        answers.append(answer.body + repr(answer.headers).encode())
        assert answer.status < 300, answer.body
        return answer.json() if answer.body else None

    key = live.request("POST", "/v1/api-keys", {}, token=account).json()["key"]
    values = {"LLM_API_KEY": MODEL_KEY, "GITHUB_TOKEN": TOKEN, "LLM_MODEL": "claude-sonnet-4-5"}
    asked("POST", "/v1/tenants/me/secrets", {"name": "planted", "values": values}, token=key)
    with RedisWatch(live) as watch:
        session = sockets.model_session(live, key, "planted")
        live.model.requests.clear()
        live.model.play(
            then(
                together(
                    say(f"Your key is {MODEL_KEY}, I believe."), bash("env; echo; env | base64 -w0; echo")
                ),
                bash(
                    "cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n'; cat /proc/[0-9]*/cmdline | tr '\\0' ' '"
                ),
                bash(SLOWLY),
                bash(ENCODED),
                bash(
                    'printf \'%s\\n\' "$GITHUB_TOKEN" > note.txt; export COPY="$GITHUB_TOKEN"; echo "$GITHUB_TOKEN" >&2'
                ),
                call("str_replace_based_edit_tool", {"command": "view", "path": "/workspace/note.txt"}),
                bash(f"echo '{MODEL_KEY}' > key.txt; cat key.txt; echo '{TOKEN}' | wc -c"),
                call("launch", {"with": {TOKEN: [MODEL_KEY]}}),
                say(f"I saw {TOKEN} and {MODEL_KEY}."),
            )
        )
        heard = asyncio.run(run_task(session, "show me all you have"))
        live.model.assert_finished()
        shell = sockets.shell_session(live, key, secrets=["planted"])
        shell_heard = asyncio.run(run_task(shell, "env; echo $GITHUB_TOKEN | rev | rev; cat /proc/1/environ"))
        exec_body = {"command": "echo $GITHUB_TOKEN; env >&2"}
        exec_answer = asked("POST", f"/v1/sandboxes/{shell['sandbox_id']}/exec", exec_body, token=key)
        asyncio.run(header_and_message(session, shell))
        values = {"LLM_API_KEY": MODEL_KEY, "GITHUB_TOKEN": TOKEN}
        asked("PUT", "/v1/tenants/me/secrets/planted", {"values": values}, token=key)
        for made in (session, shell):
            path = f"/v1/sessions/{made['chat_session_id']}"
            for rest in ("", "/tasks", "/events"):
                asked("GET", path + rest, token=key)
            for rest in ("", "/logs"):
                asked("GET", f"/v1/sandboxes/{made['sandbox_id']}{rest}", token=key)
        for path in ("/v1/sessions", "/v1/sandboxes", "/v1/api-keys", "/v1/tenants/me/secrets", "/v1/me"):
            asked("GET", path, token=account if path in ("/v1/api-keys", "/v1/me") else key)
        for path in (f"/v1/sessions?token={session['jwt']}", f"/v1/sessions?api_key={key}"):
            assert live.request("GET", path).status == 401
    yield {
        "session": session, "shell": shell, "key": key, "account": account, "code": code,
        "answers": b"\n".join(answers), "heard": heard, "shell_heard": shell_heard,
        "exec": exec_answer, "redis": watch.everything(),
        "stored": sockets.stored(live, key, session) + sockets.stored(live, key, shell),
    }  # fmt: skip
    for made in (session, shell):
        live.request("DELETE", f"/v1/sessions/{made['chat_session_id']}", token=key)


def bash(command: str) -> Any:
    return call("bash", {"command": command})


def newest_mail(live: LiveStack, email: str) -> str:
    files = sorted((live.data_dir / "mail").glob("*.eml"), key=lambda path: path.stat().st_mtime)
    return next(text for text in (path.read_text() for path in reversed(files)) if f"To: {email}" in text)


async def header_and_message(session: dict[str, Any], shell: dict[str, Any]) -> None:
    """The other two ways in, and one that is refused: tokens pass the server in all of them."""
    headers = {"Authorization": f"Bearer {session['jwt']}"}
    async with websockets.connect(session["connect_url"], additional_headers=headers) as socket:
        await hear_until(socket, lambda f: f["type"] == "ready")
    async with websockets.connect(shell["connect_url"]) as socket:
        await sockets.say(socket, type="auth", token=shell["jwt"])
        await hear_until(socket, lambda f: f["type"] == "ready")
    async with websockets.connect(f"{shell['connect_url']}?token={session['jwt']}") as socket:
        assert (await sockets.close_code(socket))[0] == 4403


def planted() -> dict[str, str]:
    return {"LLM_API_KEY": MODEL_KEY, "GITHUB_TOKEN": TOKEN}


def credentials(journey: dict[str, Any]) -> dict[str, str]:
    return {
        "a session token": journey["session"]["jwt"], "another": journey["shell"]["jwt"],
        "an account token": journey["account"], "an API key": journey["key"],
    }  # fmt: skip


def test_the_values_were_there_to_be_found(live: LiveStack, journey: dict[str, Any]) -> None:
    """The model was called with the key, the commands had the token."""
    assert {request.key for request in live.model.requests} == {MODEL_KEY}
    assert f"{len(TOKEN) + 1}\n" in output_of(journey["heard"], source="tool")
    path = f"/v1/sandboxes/{journey['session']['sandbox_id']}/files?path=note.txt"
    assert live.request("GET", path, token=journey["key"]).body == f"{TOKEN}\n".encode()


def test_frames_show_names_in_place_of_values(journey: dict[str, Any]) -> None:
    for frames in (journey["heard"], journey["shell_heard"], journey["stored"]):
        assert_absent(json.dumps(frames, ensure_ascii=False).encode(), planted(), "frames")
        assert_absent("".join(f.get("data", "") for f in frames).encode(), planted(), "frames, joined")
    spoken = output_of(journey["heard"], source="assistant")
    assert spoken.startswith("Your key is [redacted:LLM_API_KEY], I believe.")
    assert spoken.endswith("I saw [redacted:GITHUB_TOKEN] and [redacted:LLM_API_KEY].")
    printed = output_of(journey["heard"], source="tool")
    assert "GITHUB_TOKEN=[redacted:GITHUB_TOKEN]\n" in printed
    assert printed.count("[redacted:GITHUB_TOKEN]") >= 5
    assert "LLM_API_KEY=" not in printed
    assert "[redacted:LLM_API_KEY]\n" in printed
    assert "GITHUB_TOKEN=[redacted:GITHUB_TOKEN]" in output_of(journey["shell_heard"])
    assert journey["exec"]["stdout"] == "[redacted:GITHUB_TOKEN]\n"
    calls = [f["input"] for f in journey["heard"] if f["type"] == "tool_use"]
    assert calls[-1] == {"with": {"[redacted:GITHUB_TOKEN]": ["[redacted:LLM_API_KEY]"]}}


def test_the_model_was_told_names_in_place_of_values(live: LiveStack, journey: dict[str, Any]) -> None:
    told = [block for request in live.model.requests for block in request.tool_results]
    assert_absent(json.dumps(told, ensure_ascii=False).encode(), planted(), "tool results")
    assert "     1\t[redacted:GITHUB_TOKEN]\n     2\t" in [block["content"] for block in told]


def test_no_answer_of_the_api_has_a_planted_value(journey: dict[str, Any]) -> None:
    assert_absent(journey["answers"], planted() | credentials(journey), "an API answer")


def test_the_log_has_neither_values_nor_credentials(live: LiveStack, journey: dict[str, Any]) -> None:
    text = live.log
    assert "e2a.access" in text
    assert_absent(text.encode(), planted() | credentials(journey), "up.log")
    outside_of_mails = re.sub(r"─{60}\n.*?─{60}\n", "", text, flags=re.S)  # Development prints them.
    assert not re.search(rf"(?<![\d.]){journey['code']}(?!\d)", outside_of_mails)


def test_redis_never_saw_any(journey: dict[str, Any]) -> None:
    seen = journey["redis"]
    assert b"turn_run" in seen
    assert_absent(seen, planted() | credentials(journey), "Redis")
    assert not re.search(rb"(?<![\d.])" + journey["code"].encode() + rb"(?!\d)", seen)


def test_no_file_of_the_installation_holds_any(live: LiveStack, journey: dict[str, Any]) -> None:
    """The database with its journal, Redis' files, the sockets' folder, the sandboxes' host side."""
    looked_at = []
    for path in live.data_dir.rglob("*"):
        if (
            path.is_symlink()
            or not path.is_file()
            or {"mail", "disk"} & set(path.parts)
            or path.suffix == ".img"
        ):
            continue
        data = path.read_bytes()
        looked_at.append(path.name)
        assert_absent(data, planted() | credentials(journey), str(path))
    assert {"db.sqlite3", "db.sqlite3-wal"} <= set(looked_at)
    rows = b"\n".join((live.data_dir / name).read_bytes() for name in ("db.sqlite3", "db.sqlite3-wal"))
    assert not re.search(rb'"' + journey["code"].encode() + rb'"', rows)


def test_no_process_of_the_product_was_given_any(live: LiveStack, journey: dict[str, Any]) -> None:
    for name, pid in live.children().items():
        for file in ("environ", "cmdline"):
            assert_absent(
                Path(f"/proc/{pid}/{file}").read_bytes(), planted() | credentials(journey), f"{name}'s {file}"
            )


def test_the_model_key_is_nowhere_in_the_container(journey: dict[str, Any]) -> None:
    """SECURITY 4.7: inspect, environments and arguments of every process, every file, shared memory."""
    engine = docker.from_env()
    values = {"LLM_API_KEY": MODEL_KEY} | credentials(journey)
    for made in (journey["session"], journey["shell"]):
        found = engine.containers.list(all=True, filters={"label": f"e2a.sandbox={made['sandbox_id']}"})
        assert len(found) == 1
        container: Any = found[0]
        assert_absent(json.dumps(container.attrs).encode(), values | planted(), "docker inspect")
        assert container.attrs["HostConfig"]["LogConfig"]["Type"] == "none"
        processes = look(container, "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null; true")
        assert b"/opt/e2a/guest" in processes
        assert_absent(processes, values, "/proc of the container")
        assert files_with(container, MODEL_KEY) == []
        assert files_with(container, TOKEN) == (["/workspace/note.txt"] if made is journey["session"] else [])


def look(container: Any, script: str) -> bytes:
    """What `script` prints as the guest's user and as the agent's: neither has a capability, so each sees its own."""
    agent = container.exec_run(["stat", "-c", "%u", "/workspace"], user="0").output.decode().strip()
    assert agent.isdigit()
    printed = b""
    for user in ("0", agent):
        ran = container.exec_run(["sh", "-c", script], user=user)
        assert ran.exit_code == 0, ran.output
        printed += ran.output
    return printed


def files_with(container: Any, value: str) -> list[str]:
    """Files that hold `value`, of the shell's own state none. It is put together inside, so that the search does not
    find itself."""
    half = len(value) // 2
    places = "/workspace /home /tmp /run /dev/shm /etc /var /opt /root"
    script = f"p='{value[:half]}''{value[half:]}'; grep -rlaF -- \"$p\" {places} 2>/dev/null; true"
    lines = look(container, script).decode().splitlines()
    return sorted({line for line in lines if "/.e2a-shell/" not in line})

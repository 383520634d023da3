"""`manage.py quickstart`: every step is shown, no credential is, and its exit code is the truth."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from e2a.quickstart import Screen, masked_secrets
from tests.live import ROOT, LiveStack, free_port
from tests.model_server import call, fail, say, then, together

KEY = "sk-ant-" + "k" * 40


@pytest.fixture
def email() -> str:
    """A new address: one gets five codes in a quarter of an hour."""
    return f"{secrets.token_hex(8)}@example.com"


def _quickstart(
    *arguments: str, data_dir: Path, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("E2A_", "DATABASE_", "REDIS_", "LLM_"))}
    return subprocess.run(
        [sys.executable, str(ROOT / "manage.py"), "quickstart", *arguments],
        cwd=ROOT,
        env=clean | {"E2A_DATA_DIR": str(data_dir), **environment},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=200,
    )


def _alive(stack: LiveStack, key: str) -> list[str]:
    sessions = stack.request("GET", "/v1/sessions?limit=100", token=key).json()["sessions"]
    return [session["chat_session_id"] for session in sessions if session["status"] != "ended"]


@pytest.mark.docker
def test_it_plays_six_steps_and_leaves_nothing_behind(live: LiveStack, email: str) -> None:
    key = live.api_key(email)
    done = _quickstart("--url", live.url, "--email", email, data_dir=live.data_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^(\d)\. ", done.stdout, re.MULTILINE) == ["1", "2", "3", "4", "5", "6"]
    assert "│ drwxr-xr-x" in done.stdout
    assert '← {"type": "exit", ' in done.stdout
    assert "The task's exit code is 0." in done.stdout
    assert _alive(live, key) == []
    assert live.request("GET", "/v1/tenants/me/secrets", token=key).json()["secrets"] == []
    keys = live.request("GET", "/v1/api-keys", token=live.sign_in(email)).json()["api_keys"]
    assert [row["revoked"] for row in keys if row["name"].startswith("quickstart-")] == [True]


@pytest.mark.docker
def test_it_shows_the_beginning_of_a_credential_only(live: LiveStack, email: str) -> None:
    done = _quickstart("--url", live.url, "--email", email, data_dir=live.data_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search(r"e2a_live_[0-9A-Za-z]{10}", done.stdout), "an API key"
    assert not re.search(r"eyJ[\w-]+\.", done.stdout), "a JWT"
    assert not re.search(r"\b[0-9]{6}\b", re.sub(r"\.\d{6}Z", "", done.stdout)), "a mailed code"


@pytest.mark.docker
def test_it_fails_with_the_task(live: LiveStack, email: str) -> None:
    key = live.api_key(email)
    done = _quickstart("--url", live.url, "--email", email, "--prompt", "exit 3", data_dir=live.data_dir)
    assert done.returncode == 1
    assert "The task ended with 3." in done.stderr
    assert _alive(live, key) == []


@pytest.mark.docker
def test_with_a_model_key_in_the_environment_it_uses_the_model(live: LiveStack, email: str) -> None:
    live.model.play(
        then(
            together(say("I will look."), call("bash", {"command": "ls -la /workspace"})),
            say("The folder is empty."),
        )
    )
    done = _quickstart("--url", live.url, "--email", email, data_dir=live.data_dir, LLM_API_KEY=KEY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "List files in /workspace" in done.stdout
    assert "│ I will look." in done.stdout
    assert "│ The folder is empty." in done.stdout
    assert live.model.requests[-1].key == KEY
    assert KEY not in done.stdout


@pytest.mark.docker
def test_a_model_that_refuses_the_key_is_told_and_fails(live: LiveStack, email: str) -> None:
    live.model.play(then(fail(401, "invalid x-api-key")))
    done = _quickstart("--url", live.url, "--email", email, data_dir=live.data_dir, LLM_API_KEY=KEY)
    assert done.returncode == 1
    assert '"code": "llm_auth"' in done.stdout
    assert "The task ended with 1." in done.stderr


@pytest.mark.docker
def test_in_production_it_asks_for_the_code(live: LiveStack, email: str) -> None:
    began = time.time()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "manage.py"), "quickstart", "--url", live.url, "--email", email],
        cwd=ROOT,
        env=os.environ | {"E2A_DATA_DIR": str(live.data_dir), "E2A_ENV": "production", "E2A_ROLE": "gateway"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    code = live.mailed_code(email, after=began)
    said, _ = process.communicate(f"{code}\n", timeout=120)
    assert process.returncode == 0, said
    assert f"The code mailed to {email}: " in said
    assert code not in said


def test_without_a_server_it_says_which_one_it_looked_for(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    done = _quickstart("--url", url, data_dir=tmp_path)
    assert done.returncode == 1
    assert f"no server answers at {url}" in done.stderr


def test_a_server_that_is_not_e2a_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "manage.py"), "quickstart", "--url", url],
            cwd=ROOT,
            env=os.environ | {"E2A_DATA_DIR": str(tmp_path)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        connection, _ = server.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 5\r\n\r\nhello"
            )
            _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert f"{url} is no e2a server" in said


def test_elsewhere_it_asks_who_signs_in(tmp_path: Path) -> None:
    done = _quickstart("--url", "https://e2a.invalid", data_dir=tmp_path)
    assert done.returncode == 1
    assert "--email" in done.stderr


def test_deictic_without_a_key_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    done = _quickstart("--agent", "deictic", data_dir=tmp_path)
    assert done.returncode == 1
    assert "LLM_API_KEY" in done.stderr
    assert done.stdout == ""


def test_a_code_is_masked_and_an_error_code_is_not() -> None:
    assert masked_secrets({"email": "a@example.com", "code": "123456"})["code"] == "…"
    assert masked_secrets({"type": "error", "code": "llm_auth"})["code"] == "llm_auth"
    assert masked_secrets({"values": {"LLM_API_KEY": KEY}}) == {"values": {"LLM_API_KEY": f"{KEY[:12]}…"}}


def test_output_of_a_sandbox_cannot_steer_the_terminal() -> None:
    shown: list[str] = []
    screen = Screen(shown.append)
    screen.output("\x1b[2Jred\x07\r\nhalf ")
    screen.output("line\n")
    screen.frame("←", {"type": "exit", "exit_code": 0, "ts": "…"})
    assert "".join(shown) == '  │ red\n  │ half line\n  ← {"type": "exit", "exit_code": 0}\n'
    assert json.loads("".join(shown).splitlines()[-1].partition("← ")[2])["exit_code"] == 0

"""The whole product in processes of its own, on a port of its own: for journeys, kills, browsers and the README."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Any, *, what: str, seconds: float = 30.0, every: float = 0.05) -> Any:
    """What `condition()` answers once it is true; fails with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds:g} s")
        time.sleep(every)


@dataclass
class Answer:
    """One HTTP answer."""

    status: int
    headers: Message
    """Blind to case."""
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class LiveStack:
    """`manage.py up`, with a data folder below `folder`. Use as a context manager."""

    folder: Path
    engine: str = "docker"
    environment: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    model: Any = None
    """The scripted model server that stands for the vendor, where there is one."""

    @classmethod
    def with_model(cls, folder: Path, **kwargs: Any) -> LiveStack:
        """A stack whose vendors `anthropic` and `openai` are a scripted model server."""
        from tests.model_server import ModelServer, say

        model = ModelServer(lambda body, headers: say("ok")).__enter__()
        environment = {
            "E2A_ANTHROPIC_URL": model.url,
            "E2A_OPENAI_URL": model.url,
            "E2A_LLM_ALLOW_PRIVATE": model.authority,
        }
        stack = cls(folder, environment=environment | kwargs.pop("environment", {}), **kwargs)
        stack.model = model
        return stack

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def data_dir(self) -> Path:
        return self.folder / "var"

    @property
    def log(self) -> str:
        return (self.folder / "up.log").read_text(errors="replace")

    def __enter__(self) -> LiveStack:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self, *, seconds: float = 240.0) -> None:
        """Start everything and wait until `/readyz` says so."""
        clean = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith("E2A_") and k not in ("REDIS_URL", "DATABASE_URL")
        }
        environment = clean | {
            "E2A_DATA_DIR": str(self.data_dir),
            "E2A_BIND": f"127.0.0.1:{self.port}",
            "E2A_ENGINE": self.engine,
            "E2A_POOL": "standard=2",
            **self.environment,
        }
        with (self.folder / "up.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "manage.py"), "up"],
                env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT,
            )  # fmt: skip
        try:
            wait_for(
                self._is_ready, what=f"e2a ready at {self.url}; see {self.folder}/up.log", seconds=seconds
            )
        except AssertionError:
            print(self.log[-6000:])
            self.stop()
            raise

    def _is_ready(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"manage.py up ended with {self.process.returncode}:\n{self.log[-4000:]}")
        try:
            return self.request("GET", "/readyz").status == 200
        except OSError:
            return False

    def stop(self) -> None:
        """TERM and wait; then everything that it labelled in Docker is removed."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.remove_sandboxes()
        if self.model is not None:
            self.model.__exit__(None, None, None)

    def remove_sandboxes(self) -> None:
        """What this installation left in the engine: containers, volumes, loops, mounts."""
        instance = self.data_dir / "instance"
        if instance.exists():
            subprocess.run(
                [sys.executable, str(ROOT / "manage.py"), "sandboxes_remove_all", "--yes"],
                env=os.environ | {"E2A_DATA_DIR": str(self.data_dir), "E2A_ENGINE": self.engine, "E2A_ROLE": "node"},
                cwd=ROOT, check=True, timeout=120, capture_output=True,
            )  # fmt: skip

    def children(self) -> dict[str, int]:
        """Process ids of the running children, by name, from the system itself."""
        assert self.process is not None
        listing = subprocess.run(
            ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(self.process.pid)], capture_output=True, text=True
        )
        found: dict[str, int] = {}
        for line in listing.stdout.splitlines():
            pid, _, args = line.strip().partition(" ")
            for name, mark in _MARKS.items():
                if mark in args:
                    found[name] = int(pid)
        return found

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        """Kill one child by its name; the supervisor starts it again. Returns the old process id."""
        pid = self.children()[name]
        os.kill(pid, number)
        return pid

    def request(
        self, method: str, path: str, body: Any = None, *, token: str | None = None,
        headers: dict[str, str] | None = None, timeout: float = 60.0,
    ) -> Answer:  # fmt: skip
        """One call of the API over real HTTP."""
        sent = {"Content-Type": "application/json", **(headers or {})}
        if token is not None:
            sent["Authorization"] = f"Bearer {token}"
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, method=method, data=data, headers=sent)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return Answer(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.headers, error.read())

    def mailed_code(self, email: str, *, after: float) -> str:
        """The newest code that was mailed to `email` since `after` (seconds since the epoch)."""

        def look() -> str | None:
            files = sorted(
                (self.data_dir / "mail").glob("[!.]*"), key=lambda path: path.stat().st_mtime, reverse=True
            )
            for path in files:
                text = path.read_text()
                if path.stat().st_mtime >= after - 0.02 and f"To: {email}" in text:
                    found = re.search(r"^\s*(\d{6})\s*$", text, re.M) or re.search(
                        r"\b(\d{6})\b", text.split("\n\n", 1)[1]
                    )
                    if found:
                        return found.group(1)
            return None

        return str(wait_for(look, what=f"a mail to {email}"))

    def sign_in(self, email: str) -> str:
        """An account token, by way of the mailed code."""
        started = time.time()
        login = self.request("POST", "/v1/auth/login", {"email": email}).json()
        code = self.mailed_code(email, after=started)
        answer = self.request(
            "POST", "/v1/auth/verify-otp", {"email": email, "code": code, "login_id": login["login_id"]}
        )
        assert answer.status == 200, answer.body
        return str(answer.json()["token"])

    def api_key(self, email: str = "alice@example.com") -> str:
        """A fresh API key of that address's account."""
        return str(self.request("POST", "/v1/api-keys", {}, token=self.sign_in(email)).json()["key"])


_MARKS = {
    "gateway": "manage.py gateway",
    "broker": "manage.py broker",
    "node": "-n node@",
    "worker": "-n worker@",
    "turns": "-n turns@",
    "archives": "-n archives@",
    "beat": "beat --schedule",
    "web": "manage.py web",
    "valkey": "unixsocket:",
}

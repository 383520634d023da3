"""Snapshots of real containers, by the whole product: exact, many at once, and whole whatever is killed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.live import LiveStack, wait_for
from tests.sandboxes.object_store import object_store

pytestmark = pytest.mark.docker


def wait_until(condition: Callable[[], Any], *, what: str, seconds: float = 60) -> Any:
    """Slowly: an API key may ask 600 times a minute."""
    return wait_for(condition, what=what, seconds=seconds, every=0.4)


FILES = r"""
set -e
mkdir -p big deep/a/b/c 'odd names' /home/agent/.config empty/er
for n in 1 2 3 4; do head -c 25000000 /dev/urandom > big/$n; done
for n in 5 6 7 8; do yes "line $n" | head -c 25000000 > big/$n; done
for n in $(seq 300); do echo $n > deep/a/b/c/$n; done
echo x > 'odd names/new
line'; echo y > $'odd names/bad-\xff'; echo z > 'odd names/ünï'; echo home > /home/agent/.config/x
ln -s /etc/passwd deep/abs; ln -s ../big/1 deep/rel; ln -s nowhere deep/dangling; ln big/1 deep/hard
chmod 640 big/2; chmod 4711 big/3; chmod 1777 empty; chmod 500 deep/a; chmod 0 big/4 empty/er
touch -d '2001-02-03 04:05:06.123456789' big/5; touch -hd '2002-02-03 04:05:06.5' deep/dangling
mkfifo fifo; python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("sock")'
"""
TREE = r"""
cat > /tmp/tree.py <<'PY'
import hashlib, os, stat
def show(root):
    rows = []
    for at, folders, files in os.walk(root):
        for name in sorted(folders + files):
            path = os.path.join(at, name)
            s = os.lstat(path)
            if stat.S_ISFIFO(s.st_mode) or stat.S_ISSOCK(s.st_mode):
                continue
            if s.st_nlink > 1 and stat.S_ISREG(s.st_mode):
                rows.append(("links", s.st_nlink))
            what = ""
            if stat.S_ISLNK(s.st_mode):
                what = os.readlink(path)
            elif stat.S_ISREG(s.st_mode):
                if not s.st_mode & 0o400:
                    os.chmod(path, 0o600)
                what = hashlib.sha256(open(path, "rb").read()).hexdigest()
                os.chmod(path, stat.S_IMODE(s.st_mode))
            # A root changes whenever something is made in it.
            place = os.fsencode(os.path.relpath(path, root))
            rows.append((place, oct(s.st_mode), s.st_mtime_ns, s.st_uid == os.getuid(), what))
    return sorted(map(repr, rows))
rows = show("/workspace") + show("/home/agent")
print(len(rows), hashlib.sha256("\n".join(rows).encode()).hexdigest())
PY
python3 /tmp/tree.py
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStack]:
    with object_store() as place:
        environment = {
            "E2A_STORAGE_URL": f"s3://{place.bucket}/{place.prefix}?endpoint={place.endpoint}&region={place.region}",
            "E2A_STORAGE_ACCESS_KEY": place.access_key,
            "E2A_STORAGE_SECRET_KEY": place.secret_key,
        }
        with LiveStack(tmp_path_factory.mktemp("live"), environment=environment) as running:
            yield running


@pytest.fixture(scope="module")
def key(stack: LiveStack) -> str:
    return stack.api_key()


def call(stack: LiveStack, key: str, method: str, path: str, body: Any = None, *, status: int = 200) -> Any:
    answer = stack.request(method, path, body, token=key, timeout=300)
    assert answer.status == status, (answer.status, answer.body)
    return answer.json() if answer.body else None


def made(stack: LiveStack, key: str, **body: Any) -> str:
    return str(call(stack, key, "POST", "/v1/sandboxes", body, status=201)["vm_id"])


def running(stack: LiveStack, key: str, sandbox: str) -> str:
    def state() -> bool:
        shown = call(stack, key, "GET", f"/v1/sandboxes/{sandbox}")
        assert shown["death"] is None, shown
        return bool(shown["state"] == "running")

    wait_until(state, what=f"{sandbox} runs", seconds=240)
    return sandbox


def run(stack: LiveStack, key: str, sandbox: str, command: str) -> str:
    body = {"command": command, "timeout_seconds": 280}
    done = call(stack, key, "POST", f"/v1/sandboxes/{sandbox}/exec", body)
    assert done["exit_code"] == 0, done
    return str(done["stdout"])


def ready(stack: LiveStack, key: str, snapshot: str) -> dict[str, Any]:
    def shown() -> Any:
        found = call(stack, key, "GET", f"/v1/snapshots/{snapshot}")
        assert found["state"] in ("saving", "ready"), found
        return found if found["state"] == "ready" else None

    return dict(wait_until(shown, what=f"{snapshot} is ready", seconds=280))


@pytest.fixture(scope="module")
def saved(stack: LiveStack, key: str) -> dict[str, Any]:
    """A snapshot of 200 MiB of all kinds of files, and their tree's digest."""
    sandbox = running(stack, key, made(stack, key))
    run(stack, key, sandbox, FILES)
    began = time.monotonic()
    snapshot = call(stack, key, "POST", f"/v1/sandboxes/{sandbox}/snapshot", {"name": "all"}, status=201)
    found = ready(stack, key, snapshot["snapshot_id"])
    print(f"saved {found['files_bytes']} bytes as {found['size_bytes']} in {time.monotonic() - began:.1f} s")
    tree = run(stack, key, sandbox, TREE)
    call(stack, key, "DELETE", f"/v1/sandboxes/{sandbox}")
    return found | {"tree": tree}


def test_two_hundred_mebibytes_come_back_exactly(stack: LiveStack, key: str, saved: dict[str, Any]) -> None:
    assert saved["files_bytes"] > 200_000_000
    assert saved["size_bytes"] < 120_000_000
    assert saved["skipped"] == 2
    began = time.monotonic()
    sandbox = running(stack, key, made(stack, key, snapshot=saved["snapshot_id"]))
    print(f"restored in {time.monotonic() - began:.1f} s")
    assert run(stack, key, sandbox, TREE) == saved["tree"]
    assert run(stack, key, sandbox, "stat -c %U:%G big/1 /home/agent/.config | sort -u | wc -l") == "1\n"
    call(stack, key, "DELETE", f"/v1/sandboxes/{sandbox}")


def test_ten_start_from_one_at_once(stack: LiveStack, key: str) -> None:
    first = running(stack, key, made(stack, key))
    wanted = run(stack, key, first, "head -c 3000000 /dev/urandom > x; sha256sum x")
    snapshot = call(stack, key, "POST", f"/v1/sandboxes/{first}/snapshot", {}, status=201)["snapshot_id"]
    ready(stack, key, snapshot)
    with ThreadPoolExecutor(10) as pool:
        ids = list(pool.map(lambda n: made(stack, key, snapshot=snapshot), range(10)))
        list(pool.map(lambda one: running(stack, key, one), ids))
        digests = set(pool.map(lambda one: run(stack, key, one, "sha256sum x"), ids))
    assert digests == {wanted}
    for one in [first, *ids]:
        call(stack, key, "DELETE", f"/v1/sandboxes/{one}")


def test_the_worker_is_killed_while_it_saves_and_while_it_restores(
    stack: LiveStack, key: str, saved: dict[str, Any]
) -> None:
    """One kill for both, since what was cut goes on when its lease has run out, half a minute later."""
    sandbox = running(stack, key, made(stack, key, snapshot=saved["snapshot_id"]))
    second = made(stack, key, snapshot=saved["snapshot_id"])
    wait_until(
        lambda: call(stack, key, "GET", f"/v1/sandboxes/{second}")["state"] == "booting", what="booting"
    )
    snapshot = call_later(stack, key, sandbox)
    # In the middle of both, mostly; when one had not begun or was done, the end is the same.
    stack.kill("archives")
    listed = call(stack, key, "GET", "/v1/snapshots?state=saving")["snapshots"]
    (half,) = [row for row in listed if row["name"] == "killed"]
    refused = stack.request("POST", "/v1/sandboxes", {"snapshot": half["snapshot_id"]}, token=key)
    assert (refused.status, refused.json()["code"]) == (409, "snapshot_not_ready")
    assert ready(stack, key, snapshot())["files"] == saved["files"]
    third = running(stack, key, made(stack, key, snapshot=half["snapshot_id"]))
    for one in (running(stack, key, second), third):
        assert run(stack, key, one, TREE) == saved["tree"]
    for one in (sandbox, second, third):
        call(stack, key, "DELETE", f"/v1/sandboxes/{one}")


def call_later(stack: LiveStack, key: str, sandbox: str) -> Any:
    """Ask for a snapshot in a thread; the answer is its id."""
    pool = ThreadPoolExecutor(1)
    before = {row["snapshot_id"] for row in call(stack, key, "GET", "/v1/snapshots")["snapshots"]}
    coming = pool.submit(
        call, stack, key, "POST", f"/v1/sandboxes/{sandbox}/snapshot", {"name": "killed"}, status=201
    )

    def seen() -> bool:
        rows = call(stack, key, "GET", "/v1/snapshots?state=saving")["snapshots"]
        return any(row["snapshot_id"] not in before for row in rows)

    wait_until(seen, what="it is being saved")
    return lambda: coming.result(60)["snapshot_id"]


def test_a_workspace_outlives_its_sandbox_and_its_worker(stack: LiveStack, key: str) -> None:
    first = running(stack, key, made(stack, key, workspace="work"))
    wanted = run(stack, key, first, "head -c 60000000 /dev/urandom > x; echo hi > /home/agent/y; sha256sum x")
    call(stack, key, "DELETE", f"/v1/sandboxes/{first}")
    stack.kill("archives")
    refused = stack.request("POST", "/v1/sandboxes", {"workspace": "work"}, token=key)
    assert refused.json()["code"] == "workspace_in_use"
    wait_until(
        lambda: call(stack, key, "GET", f"/v1/sandboxes/{first}")["state"] == "destroyed",
        what="saved and gone",
        seconds=240,
    )
    shown = call(stack, key, "GET", f"/v1/sandboxes/{first}")
    assert "could not" not in shown["death"]["detail"], shown
    second = running(stack, key, made(stack, key, workspace="work"))
    assert run(stack, key, second, "sha256sum x; cat /home/agent/y") == wanted + "hi\n"
    call(stack, key, "DELETE", f"/v1/sandboxes/{second}")


def test_no_key_of_the_storage_is_in_a_log(stack: LiveStack, saved: dict[str, Any]) -> None:
    assert "planted-secret" not in stack.log
    logs = "".join(path.read_text(errors="replace") for path in Path(stack.data_dir, "log").glob("*"))
    assert "planted-secret" not in logs

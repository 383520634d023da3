"""A folder of a sandbox as a tar, out and in."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import async_to_sync

from accounts.models import User
from accounts.principal import Principal
from sandboxes.models import Sandbox
from sandboxes.upload import file_put
from tests.fixtures import Api
from tests.guest.test_archives import packed, unpacked
from tests.sandboxes.running import RunningNode, streamed
from tests.sandboxes.test_warm_and_cold import exec_in, made


@pytest.fixture
def sandbox(make_node: Callable[..., RunningNode], as_alice: Api) -> str:
    make_node(pool=1).wait_parked(1)
    return str(made(as_alice)["vm_id"])


def test_a_folder_goes_out_and_into_another(as_alice: Api, sandbox: str) -> None:
    url = f"/v1/sandboxes/{sandbox}/archive"
    exec_in(as_alice, sandbox, "mkdir -p a/b; head -c 3000000 /dev/urandom > a/b/big; ln -s b/big a/l")
    out = as_alice.get(f"{url}?path=a", headers={"Accept": "image/png"})
    assert (out.status_code, out["Content-Type"]) == (200, "application/x-tar")
    assert out["Content-Disposition"] == "attachment; filename*=UTF-8''a.tar"
    body = streamed(out)
    assert unpacked(body)["b/big"].size == 3_000_000
    written = as_alice.put(f"{url}?path=c", body)
    assert (written.status_code, written.json()["files"], written.json()["size"]) == (200, 1, 3_000_000)
    assert exec_in(as_alice, sandbox, "cmp a/b/big c/l && readlink c/l")["stdout"] == "b/big\n"


def test_secrets_in_files_are_the_tenants_own(make_node: Callable[..., RunningNode], as_alice: Api) -> None:
    make_node(pool=1).wait_parked(1)
    values = {"GITHUB_TOKEN": "ghp_planted_value_1"}
    as_alice.post("/v1/tenants/me/secrets", {"name": "work", "values": values})
    sandbox = made(as_alice, secrets=["work"])["vm_id"]
    exec_in(as_alice, sandbox, "mkdir d; printf %s $GITHUB_TOKEN > d/x")
    body = streamed(as_alice.get(f"/v1/sandboxes/{sandbox}/archive?path=d"))
    with tarfile.open(fileobj=io.BytesIO(body)) as tar:
        found = tar.extractfile("x")
        assert found is not None
        assert found.read() == b"ghp_planted_value_1"


def test_a_hostile_one_is_refused(as_alice: Api, sandbox: str) -> None:
    answer = as_alice.put(f"/v1/sandboxes/{sandbox}/archive?path=d", packed(("../x", b"x", {})))
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_archive")
    assert as_alice.get(f"/v1/sandboxes/{sandbox}/archive?path=missing").json()["code"] == "not_found"


def test_an_upload_is_streamed_past_django(alice: User, as_alice: Api, sandbox: str) -> None:
    body = packed(("x", b"y" * 200_000, {}))
    pieces = [body[at : at + 70_000] for at in range(0, len(body), 70_000)]
    scope = {
        "type": "http", "method": "PUT", "path": f"/v1/sandboxes/{sandbox}/archive", "query_string": b"path=e",
        "headers": [(b"content-length", str(len(body)).encode())],
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    principal = Principal(
        kind="account", tenant=alice.tenant, user=alice, key_id=None, key_pk=None, scopes=frozenset()
    )
    answer = async_to_sync(file_put)(scope, receive, principal)
    assert (answer["files"], answer["size"]) == (1, 200_000)
    assert exec_in(as_alice, sandbox, "wc -c < e/x")["stdout"].strip() == "200000"


@pytest.mark.docker
def test_on_docker_what_is_unpacked_is_the_sandbox_users(
    make_node: Callable[..., RunningNode], as_alice: Api
) -> None:
    make_node(pool=1, engine="docker").wait_parked(1)
    sandbox = made(as_alice)["vm_id"]
    body = packed(("a", b"x", {"uid": 0, "gid": 0, "uname": "root", "mode": 0o4755}))
    assert as_alice.put(f"/v1/sandboxes/{sandbox}/archive?path=d", body).status_code == 200
    slot = Sandbox.objects.get(public_id=sandbox).slot
    assert slot is not None
    shown = exec_in(as_alice, sandbox, "stat -c '%u %g %a' d/a")["stdout"]
    assert shown == f"{10000 + slot} {10000 + slot} 755\n"
    assert unpacked(streamed(as_alice.get(f"/v1/sandboxes/{sandbox}/archive?path=d")))["a"].uid == 0
    refused = as_alice.put(f"/v1/sandboxes/{sandbox}/archive?path=/etc/d", body)
    assert refused.status_code == 403

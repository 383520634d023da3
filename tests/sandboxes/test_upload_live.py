"""Uploads over a real server."""

from __future__ import annotations

import pytest

from tests.live import LiveStack

pytestmark = pytest.mark.docker


def test_a_file_can_be_put_at_once_whether_its_sandbox_came_warm_or_is_still_made(live: LiveStack) -> None:
    key = live.api_key("uploader@example.com")
    made = [live.request("POST", "/v1/sandboxes", {}, token=key).json() for _ in range(5)]
    assert "creating" in {sandbox["state"] for sandbox in made}, "five are more than the pool has"
    for number, sandbox in enumerate(made):
        path = f"/v1/sandboxes/{sandbox['sandbox_id']}/files?path=note"
        put = live.request("PUT", path, f"note {number}".encode(), token=key)
        assert put.status == 200, put.body
        assert live.request("GET", path, token=key).body == f"note {number}".encode()
    for sandbox in made:
        live.request("DELETE", f"/v1/sandboxes/{sandbox['sandbox_id']}", token=key)

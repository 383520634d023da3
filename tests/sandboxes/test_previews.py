"""Previews over real uvicorn and Docker: HTTP and WebSocket of servers inside, who may see them, and what may not
pass from one side to the other."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.live import LiveStack, wait_for
from tests.sandboxes.preview_server import PORT, SOURCE

pytestmark = pytest.mark.docker


@dataclass
class Got:
    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for found, value in self.headers if found.lower() == name), None)

    def all(self, name: str) -> list[str]:
        return [value for found, value in self.headers if found.lower() == name]

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Visitor:
    """A browser's worth of HTTP: one host, its cookies, no redirects followed."""

    live: LiveStack
    host: str
    cookies: dict[str, str] = field(default_factory=dict)

    def ask(
        self, path: str = "/", *, method: str = "GET", body: Any = None, headers: dict[str, str] | None = None,
        chunked: bool = False,
    ) -> Got:  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", self.live.port, timeout=60)
        sent = {"Host": self.host, **self.cookie(), **(headers or {})}
        connection.request(method, path, body=body, headers=sent, encode_chunked=chunked)
        answer = connection.getresponse()
        got = Got(answer.status, answer.getheaders(), answer.read())
        connection.close()
        for line in got.all("set-cookie"):
            name, _, rest = line.partition("=")
            self.cookies[name] = rest.partition(";")[0]
        return got

    def cookie(self) -> dict[str, str]:
        pairs = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        return {"Cookie": pairs} if pairs else {}

    @property
    def origin(self) -> str:
        return f"http://{self.host}"

    def enter(self, token: str) -> Visitor:
        got = self.ask(f"/?e2a_token={token}")
        assert got.status == 303, got.body
        return self


@pytest.fixture(scope="module")
def key(live: LiveStack) -> str:
    return live.api_key("previewer@example.com")


def made(live: LiveStack, key: str) -> str:
    answer = live.request("POST", "/v1/sandboxes", {"idle_timeout_seconds": 600}, token=key)
    assert answer.status == 201, answer.body
    return str(answer.json()["sandbox_id"])


@pytest.fixture(scope="module")
def sandbox(live: LiveStack, key: str) -> Iterator[str]:
    """One in which the server of `preview_server` runs."""
    sandbox_id = made(live, key)
    put = live.request("PUT", f"/v1/sandboxes/{sandbox_id}/files?path=server.py", SOURCE.encode(), token=key)
    assert put.status == 200, put.body
    job = live.request(
        "POST", f"/v1/sandboxes/{sandbox_id}/jobs", {"command": "python3 server.py"}, token=key
    )
    assert job.status == 201, job.body
    visitor = Visitor(live, host_of(live, sandbox_id)).enter(token_for(live, key, sandbox_id))
    wait_for(lambda: visitor.ask("/hello").status == 200, what="the server inside")
    yield sandbox_id
    live.request("DELETE", f"/v1/sandboxes/{sandbox_id}", token=key)


def host_of(live: LiveStack, sandbox_id: str, port: int = PORT) -> str:
    return f"{port}-{sandbox_id.removeprefix('sbx_')}.localhost:{live.port}"


def token_for(live: LiveStack, key: str, sandbox_id: str) -> str:
    answer = live.request("POST", f"/v1/sandboxes/{sandbox_id}/token", {}, token=key)
    assert answer.status == 201, answer.body
    return str(answer.json()["token"])


@pytest.fixture
def visitor(live: LiveStack, key: str, sandbox: str) -> Visitor:
    """One who came in by a token."""
    return Visitor(live, host_of(live, sandbox)).enter(token_for(live, key, sandbox))


@pytest.fixture
def stranger(live: LiveStack, sandbox: str) -> Visitor:
    return Visitor(live, host_of(live, sandbox))


# Going in.


def test_a_token_becomes_a_cookie_of_that_host_and_leaves_the_address(
    live: LiveStack, key: str, sandbox: str, stranger: Visitor
) -> None:
    token = token_for(live, key, sandbox)
    got = stranger.ask(f"/hello?a=1&e2a_token={token}&b=%20x")
    assert got.status == 303
    assert got.header("location") == f"{stranger.origin}/hello?a=1&b=%20x"
    assert got.header("cache-control") == "no-store"
    assert len(got.all("set-cookie")) == 2
    for cookie in got.all("set-cookie"):
        assert "HttpOnly" in cookie and "Path=/" in cookie and "omain=" not in cookie
        assert token not in cookie
    assert stranger.ask("/hello?a=1&b=%20x").json()["path"] == "/hello?a=1&b=%20x"


def test_a_redirect_that_begins_with_two_slashes_stays_here(
    live: LiveStack, key: str, sandbox: str, stranger: Visitor
) -> None:
    got = stranger.ask(f"//evil.example/?e2a_token={token_for(live, key, sandbox)}")
    assert got.header("location") == f"{stranger.origin}//evil.example/"


@pytest.mark.parametrize("token", ["", "nonsense", "e2a_share_nonsense", "a.b.c"])
def test_without_a_good_token_there_is_a_page_that_says_so(stranger: Visitor, token: str) -> None:
    for path in ("/hello", f"/hello?e2a_token={token}"):
        page = stranger.ask(path, headers={"Accept": "text/html,*/*"})
        assert page.status == 401
        assert b"Authentication needed" in page.body
        assert page.header("x-e2a-answered-by") == "preview"
        assert "default-src 'none'" in (page.header("content-security-policy") or "")
    assert stranger.ask("/hello").json()["code"] == "invalid_token"


def test_a_missing_sandbox_and_a_strangers_answer_alike(live: LiveStack, key: str, sandbox: str) -> None:
    mallory = live.api_key("preview-mallory@example.com")
    theirs = made(live, mallory)
    token = token_for(live, mallory, theirs)
    answers = []
    for sandbox_id in (sandbox, "sbx_" + "a" * 26):
        got = Visitor(live, host_of(live, sandbox_id)).ask(f"/hello?e2a_token={token}")
        answers.append((got.status, {k: v for k, v in got.json().items() if k != "request_id"}))
    assert answers[0] == answers[1]
    assert answers[0][0] == 401
    live.request("DELETE", f"/v1/sandboxes/{theirs}", token=mallory)


def test_account_key_and_cookie_of_another_port_open_nothing(
    live: LiveStack, key: str, sandbox: str, visitor: Visitor, stranger: Visitor
) -> None:
    assert stranger.ask(f"/hello?e2a_token={key}").status == 401
    assert stranger.ask("/hello", headers={"Authorization": f"Bearer {key}"}).status == 401
    other = Visitor(live, host_of(live, sandbox, PORT + 1), dict(visitor.cookies))
    assert other.ask("/hello").status == 401
    # And what a preview's cookie holds is no token of the API.
    for value in visitor.cookies.values():
        assert live.request("GET", "/v1/me", token=value).status == 401


def test_a_program_shows_its_token_in_a_header(
    live: LiveStack, key: str, sandbox: str, stranger: Visitor
) -> None:
    got = stranger.ask("/hello", headers={"X-E2A-Token": token_for(live, key, sandbox)})
    assert got.status == 200
    assert "x-e2a-token" not in got.json()["headers"]


# What reaches the server inside, and what comes back.


def test_the_server_sees_a_local_request_and_where_it_came_from(visitor: Visitor) -> None:
    seen = visitor.ask(
        "/hello",
        headers={
            "Cookie": visitor.cookie()["Cookie"] + "; theirs=1; e2a-session=x; __Host-e2a-csrf=y",
            "Origin": visitor.origin,
            "Referer": f"{visitor.origin}/page?e2a_token=x&q=1",
            "X-Forwarded-For": "6.6.6.6",
            "X-Forwarded-Host": "evil.example",
            "Forwarded": "for=6.6.6.6",
            "Connection": "close, X-Secret-Hop",
            "X-Secret-Hop": "1",
            "Authorization": "Basic dGhlaXI6b3du",
        },
    ).json()["headers"]
    assert seen["host"] == f"localhost:{PORT}"
    assert seen["origin"] == f"http://localhost:{PORT}"
    assert seen["referer"] == f"http://localhost:{PORT}/page?q=1"
    assert seen["cookie"] == "theirs=1"
    assert seen["x-forwarded-host"] == visitor.host
    assert seen["x-forwarded-proto"] == "http"
    assert seen["x-forwarded-for"] == "127.0.0.1"
    assert seen["authorization"] == "Basic dGhlaXI6b3du"
    assert "x-secret-hop" not in seen and "forwarded" not in seen


def test_cookies_stay_on_this_host_and_none_of_ours_is_replaced(visitor: Visitor) -> None:
    got = visitor.ask("/cookies")
    assert got.all("set-cookie") == ["a=1; Path=/", "b=2; HttpOnly"]


def test_what_acts_beyond_the_origin_is_taken_out(visitor: Visitor) -> None:
    got = visitor.ask("/bad-headers")
    names = {name.lower() for name, _ in got.headers}
    assert not names & {"clear-site-data", "alt-svc", "x-accel-redirect", "x-sendfile", "keep-alive"}
    assert got.header("content-security-policy") == "default-src 'none'"
    assert len(got.all("x-request-id")) == 1


def test_a_redirect_to_the_servers_own_address_comes_back_here(visitor: Visitor) -> None:
    assert visitor.ask("/redirect").header("location") == f"{visitor.origin}/hello?x=1"
    assert visitor.ask("/redirect-away").header("location") == "https://example.org/"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_upload_arrives_whole(visitor: Visitor, chunked: bool) -> None:
    piece = hashlib.sha256(b"seed").digest() * 2048
    body = (piece for _ in range(256))  # 16 MiB
    headers = {} if chunked else {"Content-Length": str(len(piece) * 256)}
    got = visitor.ask("/upload", method="POST", body=body, headers=headers, chunked=chunked)
    assert got.json() == {"size": len(piece) * 256, "sha256": hashlib.sha256(piece * 256).hexdigest()}


def test_a_large_download_arrives_whole_and_one_that_breaks_off_is_seen_to(visitor: Visitor) -> None:
    got = visitor.ask("/download?16777216")
    assert len(got.body) == 16777216
    with pytest.raises(http.client.IncompleteRead):
        visitor.ask("/broken")


def test_an_early_refusal_of_an_upload_is_seen(visitor: Visitor) -> None:
    got = visitor.ask("/refuse-early", method="POST", body=b"x" * 300_000)
    assert got.status == 413


def test_methods_and_empty_answers(visitor: Visitor) -> None:
    head = visitor.ask("/hello", method="HEAD")
    assert (head.status, head.body) == (200, b"")
    assert visitor.ask("/empty").status == 204
    assert visitor.ask("/not-modified").status == 304
    assert visitor.ask("/hello", method="PROPFIND").json()["method"] == "PROPFIND"


def test_events_come_as_they_are_sent(live: LiveStack, visitor: Visitor) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=30)
    connection.request("GET", "/events", headers={"Host": visitor.host, **visitor.cookie()})
    answer = connection.getresponse()
    assert answer.getheader("content-type") == "text/event-stream"
    assert answer.readline() == b"data: 0\n"  # The server sends the next one only when it is asked to.
    assert visitor.ask("/next-event").status == 200
    assert answer.readline() == b"\n"
    assert answer.readline() == b"data: 1\n"
    connection.close()
    wait_for(lambda: visitor.ask("/event-readers").json() == 0, what="the server hears that the reader left")


def test_where_nothing_listens_the_page_says_how_to_start_a_server(
    live: LiveStack, key: str, sandbox: str
) -> None:
    visitor = Visitor(live, host_of(live, sandbox, 9)).enter(token_for(live, key, sandbox))
    got = visitor.ask("/", headers={"Accept": "text/html"})
    assert got.status == 502
    assert b"python3 -m http.server 9" in got.body
    assert visitor.ask("/").json()["code"] == "port_closed"


def test_what_is_not_http_is_a_bad_gateway(visitor: Visitor) -> None:
    got = visitor.ask("/not-http")
    assert (got.status, got.json()["code"]) == (502, "bad_answer")


# Two worlds by host.


@pytest.mark.parametrize("path", ["/v1/me", "/admin/", "/", "/healthz", "/static/e2a/app.css", "/sign-in"])
def test_a_previews_host_never_reaches_our_pages(live: LiveStack, visitor: Visitor, path: str) -> None:
    assert visitor.ask(path).json()["path"] == path, "the server inside answers"
    stranger = Visitor(live, visitor.host)
    assert stranger.ask(path).status == 401
    assert stranger.ask(path).header("x-e2a-answered-by") == "preview"


def test_our_host_reaches_no_sandbox(live: LiveStack, key: str, sandbox: str, visitor: Visitor) -> None:
    ours = Visitor(live, f"127.0.0.1:{live.port}", dict(visitor.cookies))
    assert ours.ask("/hello").status == 404
    token = token_for(live, key, sandbox)
    assert ours.ask(f"/hello?e2a_token={token}", headers={"X-Forwarded-Host": visitor.host}).status == 404
    # Neither by two hosts, nor by the spellings that a host may have.
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=30)
    connection.putrequest("GET", "/v1/me", skip_host=True)
    for host in (f"127.0.0.1:{live.port}", visitor.host):
        connection.putheader("Host", host)
    connection.endheaders()
    assert connection.getresponse().status in (400, 404)
    upper = Visitor(live, visitor.host.upper(), dict(visitor.cookies))
    assert upper.ask("/v1/me").json()["path"] == "/v1/me"
    dotted = visitor.host.replace(".localhost", ".localhost.")
    assert Visitor(live, dotted, dict(visitor.cookies)).ask("/v1/me").json()["path"] == "/v1/me"
    for odd in ("0-" + "a" * 26, "99999-" + "a" * 26, "80-sbx_" + "a" * 26, "80-short", "080-" + "a" * 26):
        got = Visitor(live, f"{odd}.localhost:{live.port}").ask("/v1/me")
        assert got.status in (400, 404), odd


def test_another_sites_page_cannot_act_with_the_cookie(visitor: Visitor) -> None:
    for origin in ("https://evil.example", "null", visitor.origin.replace(str(PORT), "3000", 1)):
        got = visitor.ask("/upload", method="POST", body=b"x", headers={"Origin": origin})
        assert (got.status, got.json()["code"]) == (403, "forbidden_origin")
    assert visitor.ask("/upload", method="POST", body=b"x", headers={"Origin": visitor.origin}).status == 200


# WebSockets.


def socket_of(visitor: Visitor, path: str, **options: Any) -> ClientConnection:
    options.setdefault("origin", visitor.origin)
    opened: ClientConnection = connect(
        f"ws://{visitor.host}{path}",
        sock=socket.create_connection(("127.0.0.1", visitor.live.port), timeout=30),
        additional_headers=visitor.cookie(),
        max_size=4 * 1024 * 1024,
        **options,
    )
    return opened


def test_messages_of_both_kinds_go_both_ways(visitor: Visitor) -> None:
    with socket_of(visitor, "/socket", subprotocols=["chat"]) as inside:
        assert inside.subprotocol == "chat"
        for message in ("hello", b"\x00\xff", "", "ü" * 70_000, b"x" * 1_000_000):
            inside.send(message)
            assert inside.recv(timeout=30) == message


def test_a_sockets_handshake_is_told_as_a_requests_is(visitor: Visitor) -> None:
    with socket_of(visitor, "/socket?tell") as inside:
        seen = json.loads(inside.recv(timeout=30))
    assert seen["host"] == f"localhost:{PORT}"
    assert seen["origin"] == f"http://localhost:{PORT}"
    assert seen["x-forwarded-host"] == visitor.host
    assert "cookie" not in seen


def test_close_codes_and_refusals_of_the_server_reach_the_client(visitor: Visitor) -> None:
    with socket_of(visitor, "/socket?close=4321") as inside, pytest.raises(ConnectionClosed) as closed:
        inside.recv(timeout=30)
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4321, "over")
    with pytest.raises(InvalidStatus) as refused:
        socket_of(visitor, "/socket?refuse")
    assert refused.value.response.status_code == 403


def test_a_socket_needs_the_token_and_the_previews_own_origin(
    live: LiveStack, key: str, sandbox: str, visitor: Visitor, stranger: Visitor
) -> None:
    with pytest.raises(InvalidStatus) as refused:
        socket_of(stranger, "/socket")
    assert refused.value.response.status_code == 401
    for origin in ("https://evil.example", visitor.origin.replace(str(PORT), "3000", 1)):
        with pytest.raises(InvalidStatus) as refused:
            socket_of(visitor, "/socket", origin=origin)
        assert refused.value.response.status_code == 403
    with socket_of(stranger, f"/socket?e2a_token={token_for(live, key, sandbox)}", origin=None) as inside:
        inside.send("by token")
        assert inside.recv(timeout=30) == "by token"


def test_our_own_sockets_are_not_on_a_previews_host(visitor: Visitor, sandbox: str) -> None:
    with pytest.raises(InvalidStatus) as refused:
        socket_of(visitor, f"/v1/sandboxes/{sandbox}/terminal")
    assert refused.value.response.status_code != 101


# Share links.


def link(live: LiveStack, key: str, sandbox: str, **body: Any) -> dict[str, Any]:
    answer = live.request("POST", f"/v1/sandboxes/{sandbox}/previews", {"port": PORT, **body}, token=key)
    assert answer.status == 201, answer.body
    return dict(answer.json())


def share_token(shared: dict[str, Any]) -> str:
    return str(urlsplit(shared["url"]).query.removeprefix("e2a_token="))


def test_a_share_link_works_without_an_account_until_it_is_revoked(
    live: LiveStack, key: str, sandbox: str, stranger: Visitor
) -> None:
    shared = link(live, key, sandbox, expires_in_seconds=600)
    assert shared["url"].startswith(f"{stranger.origin}/?e2a_token=e2a_share_")
    stranger.enter(share_token(shared))
    assert stranger.ask("/hello").status == 200
    listed = live.request("GET", f"/v1/sandboxes/{sandbox}/previews", token=key).json()["previews"]
    assert [row["preview_id"] for row in listed] == [shared["preview_id"]]
    assert "url" not in listed[0]
    other = Visitor(live, host_of(live, sandbox, PORT + 1))
    assert other.ask(f"/?e2a_token={share_token(shared)}").status == 401, "it is for one port"
    path = f"/v1/sandboxes/{sandbox}/previews/{shared['preview_id']}"
    for _ in range(2):
        assert live.request("DELETE", path, token=key).json()["status"] == "revoked"
    assert stranger.ask("/hello").status == 401
    assert stranger.ask(f"/?e2a_token={share_token(shared)}").status == 401
    assert live.request("GET", f"/v1/sandboxes/{sandbox}/previews", token=key).json()["previews"] == []


def test_revoking_a_link_cuts_who_is_looking(
    live: LiveStack, key: str, sandbox: str, stranger: Visitor
) -> None:
    shared = link(live, key, sandbox)
    stranger.enter(share_token(shared))
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=30)
    connection.request("GET", "/events", headers={"Host": stranger.host, **stranger.cookie()})
    answer = connection.getresponse()
    with socket_of(stranger, "/socket") as inside:
        inside.send("still here")
        assert inside.recv(timeout=30) == "still here"
        live.request("DELETE", f"/v1/sandboxes/{sandbox}/previews/{shared['preview_id']}", token=key)
        with pytest.raises(ConnectionClosed):
            inside.recv(timeout=30)
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        answer.read()


def test_a_link_ends_with_the_key_that_made_it(live: LiveStack, sandbox: str, stranger: Visitor) -> None:
    token = live.sign_in("previewer@example.com")
    maker = live.request("POST", "/v1/api-keys", {}, token=token).json()
    shared = link(live, maker["key"], sandbox)
    stranger.enter(share_token(shared))
    assert stranger.ask("/hello").status == 200
    live.request("DELETE", f"/v1/api-keys/{maker['key_id']}", token=token)
    assert stranger.ask("/hello").status == 401


@pytest.mark.parametrize(
    "body", [{}, {"port": 0}, {"port": 65536}, {"port": 1, "expires_in_seconds": 7201}, {"port": 1, "x": 1}]
)
def test_a_link_that_makes_no_sense_is_refused(live: LiveStack, key: str, sandbox: str, body: Any) -> None:
    assert live.request("POST", f"/v1/sandboxes/{sandbox}/previews", body, token=key).status == 400


# The sandbox's life.


def test_a_preview_resumes_a_paused_sandbox(
    live: LiveStack, key: str, sandbox: str, visitor: Visitor
) -> None:
    assert live.request("POST", f"/v1/sandboxes/{sandbox}/pause", token=key).json()["state"] == "paused"
    assert visitor.ask("/hello").status == 200
    assert live.request("GET", f"/v1/sandboxes/{sandbox}", token=key).json()["state"] == "running"


def test_a_preview_of_an_ended_sandbox_says_that_it_ended(live: LiveStack, key: str) -> None:
    sandbox_id = made(live, key)
    visitor = Visitor(live, host_of(live, sandbox_id)).enter(token_for(live, key, sandbox_id))
    live.request("DELETE", f"/v1/sandboxes/{sandbox_id}", token=key)
    got = visitor.ask("/")
    assert (got.status, got.json()["code"]) == (410, "not_running")


def test_no_token_is_in_the_log(live: LiveStack, key: str, sandbox: str, stranger: Visitor) -> None:
    token, shared = token_for(live, key, sandbox), share_token(link(live, key, sandbox))
    for each in (token, shared):
        Visitor(live, stranger.host).enter(each).ask(f"/hello?e2a_token={each}x", method="POST")
    assert token not in live.log and shared not in live.log
    assert f"port={PORT}" in live.log

"""Account and session tokens, and refreshing them (CONTRACT 2, SECURITY 2)."""

from __future__ import annotations

import base64
import dataclasses
import datetime as dt
import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any

import jwt
import pytest
import time_machine
from django.conf import settings
from django.db import connection

from accounts.models import RefreshToken, SignIn, User
from accounts.services import tenant_resume, tenant_suspend, user_disable, user_enable
from accounts.tokens import account_token_issue, session_token_check, session_token_issue
from e2a.core.errors import Unauthenticated
from e2a.core.ids import new_id
from e2a.core.keyring import Key, KeyRing
from e2a.core.models import AuditEvent
from tests.accounts.at_once import at_once
from tests.fixtures import Api

pytestmark = pytest.mark.django_db

SignedIn = Callable[[str], dict[str, Any]]
NOON = dt.datetime(2026, 11, 24, 12, 0, tzinfo=dt.UTC)


def status(token: str) -> int:
    return int(Api(token).get("/v1/me").status_code)


def segment(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def parts(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    claims = jwt.decode(token, options={"verify_signature": False})
    return jwt.get_unverified_header(token), claims


def account_key() -> bytes:
    return bytes(settings.E2A.signing_keys.newest.derive("jwt-account"))


def signed(header: Any, claims: Any, key: bytes | None = None) -> str:
    """A token whose two parts are exactly as given, signed with the true key."""
    texts = [json.dumps(part) if not isinstance(part, str) else part for part in (header, claims)]
    text = ".".join(segment(part.encode()) for part in texts)
    signature = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256).sign(
        text.encode(), key or account_key()
    )
    return f"{text}.{segment(signature)}"


@pytest.fixture
def token(alice: User) -> str:
    return account_token_issue(alice)[0]


def session_token(**changes: Any) -> str:
    values: dict[str, Any] = {
        "session_public_id": new_id("ses"),
        "tenant_public_id": new_id("ten"),
        "version": 1,
        "expires_at": dt.datetime.now(dt.UTC) + dt.timedelta(minutes=15),
    }
    return session_token_issue(**(values | changes))


def test_2_1_the_classes_of_tokens_never_pass_for_one_another(token: str, alice_key: str) -> None:
    assert status(token) == 200
    assert status(session_token()) == 401
    for other in (token, alice_key):
        with pytest.raises(Unauthenticated):
            session_token_check(other)
    assert Api(alice_key).post("/v1/auth/logout").status_code == 401
    assert Api(alice_key).get("/v1/api-keys").status_code == 401


def test_2_1_a_class_has_its_own_key_so_swapped_names_do_not_help(token: str) -> None:
    session_key = settings.E2A.signing_keys.newest.derive("jwt-session")
    header, claims = parts(token)
    assert status(signed(header, claims)) == 200, "the harness makes true tokens"
    assert status(signed(header, claims, session_key)) == 401


def test_a_session_token_says_what_it_was_issued_for() -> None:
    expires_at = dt.datetime.now(dt.UTC).replace(microsecond=0) + dt.timedelta(minutes=5)
    claims = session_token_check(
        session_token(session_public_id="ses_a", tenant_public_id="ten_b", version=7, expires_at=expires_at)
    )
    assert (claims.sid, claims.tid, claims.version, claims.expires_at) == ("ses_a", "ten_b", 7, expires_at)
    assert claims.jti.startswith("jti_")


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "alg none": lambda header: header | {"alg": "none"},
    "alg None": lambda header: header | {"alg": "None"},
    "alg nOnE": lambda header: header | {"alg": "nOnE"},
    "alg HS512": lambda header: header | {"alg": "HS512"},
    "alg RS256": lambda header: header | {"alg": "RS256"},
    "alg list": lambda header: header | {"alg": ["HS256"]},
    "jku": lambda header: header | {"jku": "https://evil.example/keys"},
    "jwk": lambda header: header | {"jwk": {"kty": "oct", "k": "AAAA"}},
    "x5u": lambda header: header | {"x5u": "https://evil.example/cert"},
    "x5c": lambda header: header | {"x5c": []},
    "crit": lambda header: header | {"crit": ["exp"]},
    "b64": lambda header: header | {"b64": False},
    "kid path": lambda header: header | {"kid": "../../dev/null"},
    "kid sql": lambda header: header | {"kid": "' OR 1"},
    "kid unknown": lambda header: header | {"kid": "other"},
    "kid number": lambda header: header | {"kid": 1},
    "kid list": lambda header: header | {"kid": ["dev"]},
    "no kid": lambda header: {"alg": header["alg"], "typ": header["typ"]},
    "no typ": lambda header: {"alg": header["alg"], "kid": header["kid"]},
    "typ JWT": lambda header: header | {"typ": "JWT"},
    "typ session": lambda header: header | {"typ": "e2a-session+jwt"},
    "10 KB": lambda header: header | {"pad": "x" * 10_000},
    "duplicate": lambda header: json.dumps(header)[:-1] + ', "alg": "HS256"}',
    "no object": lambda header: "[]",
    "no JSON": lambda header: "{",
    "deep": lambda header: "[" * 500 + "]" * 500,
}


@pytest.mark.parametrize("name", HEADERS)
def test_2_2_a_header_that_is_not_ours_is_refused(token: str, name: str) -> None:
    header, claims = parts(token)
    assert status(signed(HEADERS[name](header), claims)) == 401


def without(name: str, claims: dict[str, Any]) -> dict[str, Any]:
    return {key: claims[key] for key in claims if key != name}


CLAIMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    **{
        f"no {name}": functools.partial(without, name)
        for name in ("exp", "iat", "aud", "iss", "jti", "sub", "fam")
    },
    "aud array": lambda claims: claims | {"aud": ["evil", "account"]},
    "aud array of ours": lambda claims: claims | {"aud": ["account"]},
    "aud session": lambda claims: claims | {"aud": "session"},
    "aud prefix": lambda claims: claims | {"aud": "accounts"},
    "iss suffix": lambda claims: claims | {"iss": claims["iss"] + ".evil.example"},
    "iss prefix": lambda claims: claims | {"iss": "evil:" + claims["iss"]},
    "iss array": lambda claims: claims | {"iss": [claims["iss"]]},
    "exp text": lambda claims: claims | {"exp": str(claims["exp"])},
    "exp float": lambda claims: claims | {"exp": claims["exp"] + 0.5},
    "exp true": lambda claims: claims | {"exp": True},
    "exp huge": lambda claims: json.dumps(claims | {"exp": 0}).replace('"exp": 0', '"exp": 1e999'),
    "exp null": lambda claims: claims | {"exp": None},
    "iat ahead": lambda claims: claims | {"iat": claims["exp"]},
    "sub number": lambda claims: claims | {"sub": 1},
    "sub of another": lambda claims: claims | {"sub": "usr_" + "a" * 26},
    "fam unknown": lambda claims: claims | {"fam": "fam_" + "a" * 26},
    "extra": lambda claims: claims | {"is_staff": True},
    "duplicate": lambda claims: json.dumps(claims)[:-1] + f', "sub": "{claims["sub"]}"}}',
    "NaN": lambda claims: json.dumps(claims)[:-1] + ', "nbf": NaN}',
    "no object": lambda claims: '"account"',
}


@pytest.mark.parametrize("name", CLAIMS)
def test_2_2_claims_that_are_not_ours_are_refused(token: str, name: str) -> None:
    header, claims = parts(token)
    assert status(signed(header, CLAIMS[name](claims))) == 401


def test_2_2_a_token_has_one_spelling(token: str) -> None:
    head, body, signature = token.split(".")
    last = signature[-1]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    stray = alphabet[alphabet.index(last) ^ 1]
    assert base64.urlsafe_b64decode(signature[:-1] + stray + "=") == base64.urlsafe_b64decode(signature + "=")
    spellings = [
        f"{token}.", f".{token}", f"{token}=", f"{head}..{signature}", f"{head}.{body}.", f"{head}.{body}",
        f"{head}={'='}.{body}.{signature}", f"{head}.{body}.{signature[:-1]}{stray}",
        f"{head}.{body}.{signature}A",
        f"{head}.{body}.{signature[:-2]}", f"{token} ", f"{token}\t", token.upper(),
        f"{head}.{body}.{signature}.x",
    ]  # fmt: skip
    assert [status(spelling) for spelling in spellings] == [401] * len(spellings)
    assert status(token) == 200


def test_2_2_one_body_for_every_cause(token: str) -> None:
    bodies = []
    for bad in ("x", token[:-4], session_token(), "a.b.c", "e2a_live_" + "0" * 36):
        answer = Api(bad).get("/v1/me")
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        bodies.append(answer.json() | {"request_id": ""})
    assert bodies == [bodies[0]] * len(bodies)
    assert bodies[0]["code"] == "invalid_token"


def test_2_3_a_token_is_checked_by_its_key_until_that_leaves_the_ring(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = settings.E2A.signing_keys.newest
    new = Key("next", hashlib.sha256(b"next").digest())

    def ring(*keys: Key) -> None:
        monkeypatch.setattr(settings, "E2A", dataclasses.replace(settings.E2A, signing_keys=KeyRing(keys)))

    ring(new, old)
    assert status(token) == 200
    fresh = account_token_issue(User.objects.get())[0]
    assert jwt.get_unverified_header(fresh)["kid"] == "next"
    ring(new)
    assert (status(token), status(fresh)) == (401, 200)


def test_2_4_an_account_token_lives_for_fifteen_minutes(alice: User) -> None:
    with time_machine.travel(NOON, tick=False) as clock:
        token, expires_at = account_token_issue(alice)
        assert expires_at == NOON + dt.timedelta(minutes=15)
        clock.move_to(expires_at - dt.timedelta(seconds=1))
        assert status(token) == 200
        clock.move_to(expires_at + dt.timedelta(seconds=31))
        assert status(token) == 401


def test_2_4_a_refresh_token_gives_a_new_pair_once(signed_in: SignedIn, anyone: Api) -> None:
    with time_machine.travel(NOON, tick=False) as clock:
        first = signed_in("a@example.com")
        clock.shift(3600)
        assert status(first["token"]) == 401
        answer = anyone.post("/v1/auth/refresh", {"refresh_token": first["refresh_token"]})
        second = answer.json()
        assert answer.status_code == 200
        assert answer.headers["Cache-Control"] == "no-store"
        assert set(second) == set(first)
        assert second["user_id"] == first["user_id"]
        assert second["expires_at"] == "2026-11-24T13:15:00Z"
        assert status(second["token"]) == 200
        clock.shift(30 * 24 * 3600)
        assert anyone.post("/v1/auth/refresh", {"refresh_token": second["refresh_token"]}).status_code == 401


def test_2_4_reuse_of_a_spent_refresh_token_ends_the_whole_family(signed_in: SignedIn, anyone: Api) -> None:
    first, elsewhere = signed_in("a@example.com"), signed_in("a@example.com")
    second = anyone.post("/v1/auth/refresh", {"refresh_token": first["refresh_token"]}).json()
    assert anyone.post("/v1/auth/refresh", {"refresh_token": first["refresh_token"]}).status_code == 401
    assert anyone.post("/v1/auth/refresh", {"refresh_token": second["refresh_token"]}).status_code == 401
    assert (status(first["token"]), status(second["token"])) == (401, 401)
    assert status(elsewhere["token"]) == 200, "another sign-in of the same person goes on"
    assert AuditEvent.objects.filter(action="refresh.reused").count() == 1


@pytest.mark.django_db(transaction=True)
def test_2_4_a_refresh_token_spent_ten_times_at_once_gives_at_most_one_pair(signed_in: SignedIn) -> None:
    first = signed_in("a@example.com")
    body = {"refresh_token": first["refresh_token"]}
    answers = at_once(10, lambda number: Api().post("/v1/auth/refresh", body))
    assert sorted(answer.status_code for answer in answers) == [200] + [401] * 9
    assert RefreshToken.objects.count() == 2
    assert SignIn.objects.get().end_reason == "reuse"


@pytest.mark.parametrize("raw", ["x", "e2a_refresh_" + "A" * 43, "ünicode"])
def test_an_unknown_refresh_token_is_a_401(anyone: Api, db: None, raw: str) -> None:
    answer = anyone.post("/v1/auth/refresh", {"refresh_token": raw})
    assert (answer.status_code, answer.json()["code"]) == (401, "invalid_token")


def test_2_5_logout_ends_the_tokens_of_this_sign_in_only(signed_in: SignedIn, anyone: Api) -> None:
    here, there = signed_in("a@example.com"), signed_in("a@example.com")
    answer = Api(here["token"]).post("/v1/auth/logout")
    assert (answer.status_code, answer.content) == (204, b"")
    assert status(here["token"]) == 401
    assert anyone.post("/v1/auth/refresh", {"refresh_token": here["refresh_token"]}).status_code == 401
    assert status(there["token"]) == 200
    assert Api(here["token"]).post("/v1/auth/logout").status_code == 401


def test_2_5_a_disabled_person_is_out_at_once_and_old_tokens_stay_dead(
    alice: User, bob: User, signed_in: SignedIn, anyone: Api, alice_key: str
) -> None:
    tokens, bobs = signed_in("alice@example.com"), signed_in("bob@example.com")
    user_disable(user=alice, actor="test")
    assert (status(tokens["token"]), status(alice_key)) == (401, 401)
    assert anyone.post("/v1/auth/refresh", {"refresh_token": tokens["refresh_token"]}).status_code == 401
    assert status(bobs["token"]) == 200
    user_enable(user=alice, actor="test")
    assert (status(tokens["token"]), status(alice_key)) == (401, 200)


def test_2_5_a_suspended_tenant_is_out_at_once(
    alice: User, bob: User, mallory: User, signed_in: SignedIn, alice_key: str, mallory_key: str
) -> None:
    tokens = [signed_in(user.email)["token"] for user in (alice, bob)]
    tenant_suspend(tenant=alice.tenant, actor="test")
    assert [status(token) for token in (*tokens, alice_key)] == [401] * 3
    assert status(mallory_key) == 200
    tenant_resume(tenant=alice.tenant, actor="test")
    assert [status(token) for token in (*tokens, alice_key)] == [401, 401, 200]


def test_2_6_a_token_in_the_query_body_or_cookie_counts_for_nothing(token: str, alice_key: str) -> None:
    for credential in (token, alice_key):
        anyone = Api()
        assert anyone.get(f"/v1/me?token={credential}&access_token={credential}").status_code == 401
        assert anyone.request("GET", "/v1/me", {"token": credential}).status_code == 401
        anyone.client.cookies["token"] = credential
        anyone.client.cookies["Authorization"] = credential
        assert anyone.get("/v1/me").status_code == 401


def test_9_3_a_login_cookie_never_authenticates_the_api(alice: User) -> None:
    anyone = Api()
    anyone.client.force_login(alice)
    assert anyone.get("/v1/me").status_code == 401
    assert anyone.post("/v1/api-keys").status_code == 401


def test_a_dump_of_the_database_holds_no_refresh_token(signed_in: SignedIn) -> None:
    tokens = signed_in("a@example.com")
    with connection.cursor() as cursor:
        for table in connection.introspection.table_names(cursor):
            cursor.execute(f'SELECT * FROM "{table}"')
            dump = repr(cursor.fetchall())
            assert tokens["refresh_token"] not in dump
            assert tokens["token"] not in dump

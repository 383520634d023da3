"""Only who holds the node key, now and once, is let through to guests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from sandboxes.gateway.signing import (
    NonceCache,
    NonceCacheFull,
    SignatureCheck,
    SignatureRefused,
    signature,
)
from tests.gateway.doubles import NODE_KEY

NOW = 1_800_000_000


def _request(*, key: bytes = NODE_KEY, sent_at: int = NOW, nonce: str = "0" * 32) -> dict[str, Any]:
    parts: dict[str, Any] = {"method": "POST", "target": "/sandboxes/s/processes?follow=1", "length": "12"}
    value = signature(node_key=key, sent_at=str(sent_at), nonce=nonce, **parts)
    return {
        **parts,
        "headers": {"x-e2a-time": str(sent_at), "x-e2a-nonce": nonce, "x-e2a-signature": value},
    }


def _check(**options: Any) -> SignatureCheck:
    return SignatureCheck(NODE_KEY, wall_clock=lambda: NOW, **options)


def test_the_signature_is_what_the_plan_says() -> None:
    # HMAC-SHA256 of "GET\n/p?q=1\n1800000000\nabc\n0" with 32 bytes "k", by `openssl dgst`.
    value = signature(
        node_key=NODE_KEY, method="GET", target="/p?q=1", sent_at="1800000000", nonce="abc", length="0"
    )
    assert value == "c4425b7268af48461569e25250e198d26c3645edcb021077a7d792bc39a57161"


def test_a_signed_request_passes_once() -> None:
    check, request = _check(), _request()
    check.verify(**request)
    with pytest.raises(SignatureRefused, match="nonce"):
        check.verify(**request)


@pytest.mark.parametrize("seconds", [-30, 0, 30])
def test_half_a_minute_of_difference_is_allowed(seconds: int) -> None:
    _check().verify(**_request(sent_at=NOW + seconds))


@pytest.mark.parametrize("seconds", [-31, 31, -NOW, 10**11])
def test_more_is_not(seconds: int) -> None:
    with pytest.raises(SignatureRefused, match="old"):
        _check().verify(**_request(sent_at=NOW + seconds))


def _header(name: str, value: str) -> Callable[[dict[str, Any]], None]:
    return lambda request: request["headers"].update({name: value})


def _part(name: str, value: str) -> Callable[[dict[str, Any]], None]:
    return lambda request: request.update({name: value})


@pytest.mark.parametrize(
    "change",
    [
        _part("method", "PUT"),
        _part("target", "/sandboxes/s/processes?follow=0"),
        _part("target", "/sandboxes/t/processes?follow=1"),
        _part("length", "13"),
        _part("length", "chunked"),
        _header("x-e2a-time", str(NOW + 1)),
        _header("x-e2a-time", f"+{NOW}"),
        _header("x-e2a-time", "٣"),
        _header("x-e2a-nonce", "1" * 32),
        _header("x-e2a-nonce", ""),
        _header("x-e2a-nonce", "0" * 31),
        _header("x-e2a-signature", "0" * 64),
        _header("x-e2a-signature", ""),
        _header("x-e2a-signature", "é" * 64),
    ],
)
def test_any_change_is_refused(change: Callable[[dict[str, Any]], None]) -> None:
    request = _request()
    change(request)
    with pytest.raises(SignatureRefused):
        _check().verify(**request)


def test_another_key_is_refused_and_leaves_no_trace() -> None:
    nonces = NonceCache()
    with pytest.raises(SignatureRefused):
        _check(nonces=nonces).verify(**_request(key=b"j" * 32))
    assert len(nonces) == 0


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        SignatureCheck(b"short")


def test_a_nonce_is_remembered_as_long_as_its_request_is_good_and_no_longer() -> None:
    nonces = NonceCache()
    assert nonces.add("a", now=100.0)
    assert not nonces.add("a", now=160.9)
    assert nonces.add("a", now=161.0)
    assert len(nonces) == 1


def test_a_full_cache_expires_without_a_stall() -> None:
    nonces = NonceCache()
    for number in range(100_000):
        nonces.add(f"{number:032x}", now=0.0)
    began_at = time.perf_counter()
    assert nonces.add("a", now=61.0)
    assert time.perf_counter() - began_at < 1
    assert len(nonces) == 1


def test_the_cache_refuses_instead_of_growing_or_forgetting() -> None:
    nonces = NonceCache(capacity=2)
    assert nonces.add("a", now=0.0)
    assert nonces.add("b", now=30.0)
    with pytest.raises(NonceCacheFull):
        nonces.add("c", now=60.0)
    assert not nonces.add("a", now=60.0)
    assert nonces.add("c", now=61.0)
    assert len(nonces) == 2

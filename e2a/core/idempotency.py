"""`Idempotency-Key`: a POST fired again gives the first one's answer and makes nothing new (CONTRACT 1)."""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import structlog
from django.conf import settings
from django.db import IntegrityError, transaction
from rest_framework.request import Request
from rest_framework.response import Response

from e2a.core.clock import now, seconds
from e2a.core.errors import Conflict, ValidationFailed
from e2a.core.models import IdempotencyRecord

log = structlog.get_logger(__name__)

KEPT_SECONDS = 24 * 3600
ABANDONED_SECONDS = 120
"""A first request that has not answered by then died with its process; the key may be used again."""

View = TypeVar("View", bound=Callable[..., Response])


class Sealer(Protocol):
    """Encrypts an answer under a passphrase. `secrets_vault` provides it, since only it may use cryptography."""

    def seal(self, passphrase: str, data: bytes) -> bytes: ...

    def unseal(self, passphrase: str, sealed: bytes) -> bytes: ...


_sealers: list[Sealer] = []


def register_sealer(sealer: Sealer) -> None:
    """Called once by the vault when it is ready."""
    _sealers[:] = [sealer]


def idempotent(*, sealed: bool = False) -> Callable[[View], View]:
    """Decorate a DRF `post`: same key and body give the stored answer, another body 409, a running first one 409.

    Only successful answers are kept: after an error the same key may be tried again. `sealed` is for answers that show
    a credential: they are stored encrypted under the raw key, which is not stored itself. Costs two small writes.
    """

    def decorate(view: View) -> View:
        @functools.wraps(view)
        def guarded(self: Any, request: Request, *args: Any, **kwargs: Any) -> Response:
            key = request.headers.get("Idempotency-Key")
            if key is None or request.auth is None:
                return view(self, request, *args, **kwargs)
            if not 1 <= len(key) <= 255 or not key.isprintable():
                raise ValidationFailed.of(
                    "Idempotency-Key",
                    "invalid_idempotency_key",
                    "Idempotency-Key has 1 to 255 printable characters.",
                )
            record, replay = _begin(request, key)
            if replay is not None:
                return replay
            try:
                response = view(self, request, *args, **kwargs)
            except BaseException:
                record.delete()
                raise
            _finish(record, response, key if sealed else None)
            return response

        return guarded  # type: ignore[return-value]  # functools.wraps keeps the signature

    return decorate


def _begin(request: Request, key: str) -> tuple[IdempotencyRecord, Response | None]:
    principal: Any = request.auth
    rows = IdempotencyRecord.objects.filter(
        tenant_id=principal.tenant.pk, scope=f"{request.method} {request.path}"
    )
    keys, bodies = _digests("key", key.encode()), _digests("body", request._request.body)
    for _ in range(3):
        first = rows.filter(key_digest__in=keys).first()
        if first is None:
            try:
                with transaction.atomic():
                    return IdempotencyRecord.objects.create(
                        tenant_id=principal.tenant.pk,
                        scope=f"{request.method} {request.path}",
                        key_digest=keys[0],
                        body_digest=bodies[0],
                    ), None
            except IntegrityError:
                continue  # Another one was first between our look and our insert: look again.
        age = now() - first.created_at
        if age > seconds(KEPT_SECONDS) or (first.status is None and age > seconds(ABANDONED_SECONDS)):
            IdempotencyRecord.objects.filter(pk=first.pk, status=first.status).delete()
            continue
        if first.body_digest not in bodies:
            raise Conflict("This Idempotency-Key was used with another body.", code="idempotency_mismatch")
        if first.status is None:
            raise Conflict("The first request with this key still runs.", code="idempotency_in_progress")
        return first, _replay(first, key)
    raise Conflict("The first request with this key still runs.", code="idempotency_in_progress")


def _digests(what: str, data: bytes) -> list[str]:
    """Keyed digests of `data`, under each key of the ring, newest first: bodies and keys may be easy to guess."""
    return [
        hmac.new(key.derive(f"idempotency-{what}"), data, hashlib.sha256).hexdigest()
        for key in settings.E2A.signing_keys.keys
    ]


def _replay(record: IdempotencyRecord, key: str) -> Response:
    stored = bytes(record.answer)
    if record.is_sealed:
        stored = _sealers[0].unseal(key, stored)
    response = Response(json.loads(stored) if stored else None, status=record.status)
    response["Idempotent-Replayed"] = "true"
    return response


def _finish(record: IdempotencyRecord, response: Response, passphrase: str | None) -> None:
    if not 200 <= response.status_code < 300:
        record.delete()
        return
    answer = b"" if response.data is None else json.dumps(response.data).encode()
    if passphrase is not None:
        answer = _sealers[0].seal(passphrase, answer)
    IdempotencyRecord.objects.filter(pk=record.pk).update(
        status=response.status_code, answer=answer, is_sealed=passphrase is not None
    )


def records_purge() -> int:
    """Delete answers older than 24 h; returns how many."""
    count, _ = IdempotencyRecord.objects.filter(created_at__lt=now() - seconds(KEPT_SECONDS)).delete()
    return count

"""Bodies of `/v1/api-keys`."""

from __future__ import annotations

import datetime as dt
import re
from typing import Any

from rest_framework import serializers

from e2a.core.api import ClosedSerializer, StrictCharField, StrictIntegerField, time_text
from keys.models import ApiKey
from keys.services import MAX_GRACE_SECONDS, SCOPES, IssuedKey

_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)


class Rfc3339Field(serializers.DateTimeField):
    """A moment with its offset; DRF's own takes dates and times of no zone too."""

    def to_internal_value(self, value: Any) -> dt.datetime:
        if not isinstance(value, str) or not _RFC3339.fullmatch(value):
            self.fail("invalid", format="YYYY-MM-DDThh:mm:ssZ")
        return super().to_internal_value(value.upper())


class ScopeField(serializers.ChoiceField):
    """One scope, as text: DRF's own turns other types into text first."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(choices=SCOPES, **kwargs)

    def to_internal_value(self, data: Any) -> str:
        if not isinstance(data, str):
            self.fail("invalid_choice", input=data)
        return str(super().to_internal_value(data))


class KeyCreateBody(ClosedSerializer):
    name = StrictCharField(max_length=100, required=False, allow_blank=True, allow_null=True)
    expires_at = Rfc3339Field(required=False, allow_null=True)
    scopes = serializers.ListField(
        child=ScopeField(),
        required=False,
        allow_null=True,
        min_length=1,
        max_length=20,
        help_text="Default: all.",
    )


class KeyRotateBody(ClosedSerializer):
    grace_seconds = StrictIntegerField(
        min_value=0, max_value=MAX_GRACE_SECONDS, default=0, help_text="How long the old key works on."
    )


class KeyAnswer(serializers.Serializer[Any]):
    key_id = serializers.CharField()
    key = serializers.CharField(help_text="The key itself, shown this once.")
    prefix = serializers.CharField()
    name = serializers.CharField()
    scopes = serializers.ListField(child=serializers.CharField())
    created_at = serializers.DateTimeField()
    expires_at = serializers.DateTimeField(allow_null=True)


class KeyListed(serializers.Serializer[Any]):
    key_id = serializers.CharField()
    prefix = serializers.CharField()
    last_four = serializers.CharField()
    name = serializers.CharField()
    scopes = serializers.ListField(child=serializers.CharField())
    revoked = serializers.BooleanField()
    created_at = serializers.DateTimeField()
    last_used_at = serializers.DateTimeField(allow_null=True)
    expires_at = serializers.DateTimeField(allow_null=True)
    plan_tier = serializers.CharField()


class KeyListAnswer(serializers.Serializer[Any]):
    api_keys = KeyListed(many=True)


class KeyRevokedAnswer(serializers.Serializer[Any]):
    key_id = serializers.CharField()
    status = serializers.ChoiceField(choices=["revoked"])


def issued_shown(issued: IssuedKey) -> dict[str, Any]:
    """A `KeyAnswer`: the one place where the key leaves."""
    row = issued.row
    return {
        "key_id": row.public_id,
        "key": issued.key,
        "prefix": row.prefix,
        "name": row.name,
        "scopes": row.scopes,
        "created_at": time_text(row.created_at),
        "expires_at": time_text(row.expires_at),
    }


def key_shown(row: ApiKey) -> dict[str, Any]:
    """A `KeyListed`."""
    return {
        "key_id": row.public_id,
        "prefix": row.prefix,
        "last_four": row.last_four,
        "name": row.name,
        "scopes": row.scopes,
        "revoked": row.is_revoked,
        "created_at": time_text(row.created_at),
        "last_used_at": time_text(row.last_used_at),
        "expires_at": time_text(_end(row)),
        "plan_tier": row.tenant.plan_tier,
    }


def _end(row: ApiKey) -> dt.datetime | None:
    """When the key ends by itself: its expiry, or the end of its grace time if that comes first."""
    ends = [
        end for end in (row.expires_at, row.revoked_at if not row.is_revoked else None) if end is not None
    ]
    return min(ends, default=None)

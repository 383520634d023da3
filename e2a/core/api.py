"""What every `/v1` view and serializer of ours shares."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any, ClassVar

from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from e2a.core.clock import rfc3339
from e2a.core.permissions import ScopePermission


class ClosedSerializer(serializers.Serializer[Any]):
    """A request body that refuses what it does not know: a misspelt option must not be silently ignored.

    Raises `unknown_field` for each extra key. NUL characters are refused by DRF's own validator.
    """

    def to_internal_value(self, data: Any) -> Any:
        if isinstance(data, Mapping):
            unknown = [str(key) for key in data if key not in self.fields]
            if unknown:
                raise serializers.ValidationError(
                    {
                        key: serializers.ErrorDetail("There is no such field.", code="unknown_field")
                        for key in unknown
                    }
                )
        return super().to_internal_value(data)


class StrictCharField(serializers.CharField):
    """Text only: DRF's own turns numbers and booleans into text. Lone surrogates are refused."""

    default_error_messages: ClassVar[Any] = {"surrogate": "This text is not valid Unicode."}

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("trim_whitespace", False)
        super().__init__(**kwargs)

    def to_internal_value(self, data: Any) -> str:
        if not isinstance(data, str):
            self.fail("invalid")
        try:
            data.encode()
        except UnicodeEncodeError:
            self.fail("surrogate")
        return str(super().to_internal_value(data))


class StrictIntegerField(serializers.IntegerField):
    """Whole JSON numbers only (`5.0` is one, says JSON Schema): neither `"5"`, `5.5` nor `true`."""

    def to_internal_value(self, data: Any) -> int:
        if isinstance(data, float) and data.is_integer() and abs(data) < 2**53:
            data = int(data)
        if isinstance(data, bool) or not isinstance(data, int):
            self.fail("invalid")
        return int(super().to_internal_value(data))


class StrictBooleanField(serializers.BooleanField):
    def to_internal_value(self, data: Any) -> bool:
        if not isinstance(data, bool):
            self.fail("invalid", input=data)
        return data


def time_text(moment: dt.datetime | None) -> str | None:
    """RFC 3339 with `Z`."""
    return rfc3339(moment)


class ApiView(APIView):
    """A `/v1` view: bearer only, problem+json, never cached.

    `accepts` says which kinds of credential it takes (`"account"` JWT, `"key"` API key); empty means none is needed.
    `scopes` gives the scope that an API key needs for each method.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"key", "account"})
    scopes: ClassVar[Mapping[str, str]] = {}
    permission_classes = [ScopePermission]

    def finalize_response(self, request: Any, response: Any, *args: Any, **kwargs: Any) -> Any:
        response = super().finalize_response(request, response, *args, **kwargs)
        response.headers.setdefault("Cache-Control", "no-store")
        return response


def validated(serializer_class: type[serializers.Serializer[Any]], request: Request) -> dict[str, Any]:
    """The request's body, checked. An empty body counts as `{}`. Raises DRF's `ValidationError`."""
    serializer = serializer_class(data=request.data, context={"request": request})
    serializer.is_valid(raise_exception=True)
    return dict(serializer.validated_data)


def created(body: dict[str, Any]) -> Response:
    return Response(body, status=201)

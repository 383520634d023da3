"""Bodies of `/v1/auth/*` and `/v1/me`."""

from __future__ import annotations

from typing import Any, ClassVar

from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from accounts.addresses import MAX_LENGTH, AddressError, address_clean
from accounts.principal import Principal
from accounts.services import SignedIn
from e2a.core.api import ClosedSerializer, StrictCharField, time_text


@extend_schema_field({"type": "string", "format": "email", "maxLength": MAX_LENGTH})
class AddressField(StrictCharField):
    """One mail address, in its accepted spelling."""

    default_error_messages: ClassVar[Any] = {"invalid_email": "{reason}"}

    def to_internal_value(self, data: Any) -> str:
        text = super().to_internal_value(data)
        try:
            return address_clean(text)
        except AddressError as error:
            self.fail("invalid_email", reason=str(error))


class LoginBody(ClosedSerializer):
    email = AddressField()


class LoginAnswer(serializers.Serializer[Any]):
    status = serializers.ChoiceField(choices=["sent"])
    login_id = serializers.CharField(help_text="Send it with the code to bind the code to this request.")


class VerifyBody(ClosedSerializer):
    email = AddressField()
    code = StrictCharField(max_length=64)
    login_id = StrictCharField(max_length=40, required=False, allow_null=True, default=None)


class RefreshBody(ClosedSerializer):
    refresh_token = StrictCharField(max_length=200)


class TokenAnswer(serializers.Serializer[Any]):
    token = serializers.CharField(help_text="Account token for `Authorization: Bearer`, good for 15 minutes.")
    user_id = serializers.CharField()
    email = serializers.EmailField()
    expires_at = serializers.DateTimeField(help_text="End of `token`.")
    refresh_token = serializers.CharField(help_text="Good for 30 days and for one use.")


class LimitsAnswer(serializers.Serializer[Any]):
    max_live_sandboxes = serializers.IntegerField()
    max_tasks_queued = serializers.IntegerField()


class TenantAnswer(serializers.Serializer[Any]):
    tenant_id = serializers.CharField()
    name = serializers.CharField()
    plan_tier = serializers.CharField()
    limits = LimitsAnswer()


class MeAnswer(serializers.Serializer[Any]):
    user_id = serializers.CharField()
    email = serializers.EmailField()
    tenant = TenantAnswer()


def tokens_shown(signed_in: SignedIn) -> dict[str, Any]:
    """A `TokenAnswer`."""
    return {
        "token": signed_in.token,
        "user_id": signed_in.user.public_id,
        "email": signed_in.user.email,
        "expires_at": time_text(signed_in.expires_at),
        "refresh_token": signed_in.refresh_token,
    }


def me_shown(principal: Principal) -> dict[str, Any]:
    """A `MeAnswer`."""
    tenant = principal.tenant
    return {
        "user_id": principal.user.public_id,
        "email": principal.user.email,
        "tenant": {
            "tenant_id": tenant.public_id,
            "name": tenant.name,
            "plan_tier": tenant.plan_tier,
            "limits": {
                "max_live_sandboxes": tenant.max_live_sandboxes,
                "max_tasks_queued": tenant.max_tasks_queued,
            },
        },
    }

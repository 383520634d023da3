"""`/v1/auth/*` and `/v1/me` (CONTRACT 2)."""

from __future__ import annotations

from typing import ClassVar

from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from accounts import login, services
from accounts.audit import caller_of
from accounts.principal import principal_of
from accounts.serializers import (
    LoginAnswer,
    LoginBody,
    MeAnswer,
    RefreshBody,
    TokenAnswer,
    VerifyBody,
    me_shown,
    tokens_shown,
)
from e2a.core.api import ApiView, validated


class OpenView(ApiView):
    """Needs no credential, and does not look at one."""

    authentication_classes = ()
    accepts: ClassVar[frozenset[str]] = frozenset()


class LoginView(OpenView):
    @extend_schema(operation_id="auth_login", tags=["auth"], request=LoginBody, responses={200: LoginAnswer})
    def post(self, request: Request) -> Response:
        """Have a sign-in code mailed. The answer is the same whether the address is known or not."""
        body = validated(LoginBody, request)
        login_id = login.login_start(email=body["email"], caller=caller_of(request._request))
        return Response({"status": "sent", "login_id": login_id})


class VerifyView(OpenView):
    @extend_schema(
        operation_id="auth_verify_otp", tags=["auth"], request=VerifyBody, responses={200: TokenAnswer}
    )
    def post(self, request: Request) -> Response:
        """Trade a code for tokens. 401 `invalid_code` for wrong, used, expired and locked codes alike."""
        body = validated(VerifyBody, request)
        signed_in = login.login_verify(
            email=body["email"],
            code=body["code"],
            login_id=body["login_id"],
            caller=caller_of(request._request),
        )
        return Response(tokens_shown(signed_in))


class RefreshView(OpenView):
    @extend_schema(
        operation_id="auth_refresh", tags=["auth"], request=RefreshBody, responses={200: TokenAnswer}
    )
    def post(self, request: Request) -> Response:
        """Trade a refresh token for a new pair. Using one twice ends the whole sign-in."""
        body = validated(RefreshBody, request)
        signed_in = services.tokens_refresh(
            refresh_token=body["refresh_token"], caller=caller_of(request._request)
        )
        return Response(tokens_shown(signed_in))


class LogoutView(ApiView):
    accepts = frozenset({"account"})

    @extend_schema(operation_id="auth_logout", tags=["auth"], request=None, responses={204: None})
    def post(self, request: Request) -> Response:
        """End this sign-in: its account token and its refresh tokens are refused from now on."""
        services.logout(principal=principal_of(request), caller=caller_of(request._request))
        return Response(status=204)


class MeView(ApiView):
    @extend_schema(operation_id="me", tags=["auth"], responses={200: MeAnswer})
    def get(self, request: Request) -> Response:
        """Who this credential belongs to, and the limits of the tenant."""
        return Response(me_shown(principal_of(request)))

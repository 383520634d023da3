"""How the OpenAPI document shows `BearerAuthentication`.

Apart from it, because DRF loads that module while `rest_framework.views` is only half there, and
drf-spectacular needs the whole of it.
"""

from __future__ import annotations

from typing import Any

from drf_spectacular.extensions import OpenApiAuthenticationExtension


class BearerScheme(OpenApiAuthenticationExtension):  # type: ignore[no-untyped-call]  # its __init_subclass__
    target_class = "keys.authentication.BearerAuthentication"
    name = "bearer"

    def get_security_definition(self, auto_schema: Any) -> dict[str, str]:
        return {
            "type": "http",
            "scheme": "bearer",
            "description": "An API key (`e2a_live_…`) or an account token of `POST /v1/auth/verify-otp`.",
        }

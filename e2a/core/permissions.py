"""Whether a credential fits a view. Apart from `api`, since DRF imports it while it makes its own `APIView`."""

from __future__ import annotations

from typing import Any

from rest_framework.permissions import BasePermission
from rest_framework.request import Request

from e2a.core.errors import Forbidden, Unauthenticated


class ScopePermission(BasePermission):
    """The credential's class and scopes fit the view: `accepts` and `scopes` of `ApiView`.

    A view of somebody else's (the OpenAPI document) says by itself who may read it.
    """

    def has_permission(self, request: Request, view: Any) -> bool:
        if not view.accepts:
            return True
        principal: Any = request.auth
        if principal is None or principal.kind not in view.accepts:
            raise Unauthenticated("A valid bearer token is needed.")
        wanted = view.scopes.get(request.method or "")
        if wanted is not None and not principal.has_scope(wanted):
            raise Forbidden(f"This key has no scope {wanted}.", code="missing_scope")
        return True

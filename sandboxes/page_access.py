"""Who sees the dashboard's pages of sandboxes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

from django.contrib.auth.decorators import login_required
from django.http import Http404, HttpRequest, HttpResponse

from accounts.models import Tenant, User
from e2a.core.errors import NotFound, ValidationFailed

View = Callable[..., HttpResponse]


def for_people(view: View) -> View:
    """For signed-in people; a missing or foreign sandbox is a missing page."""

    @functools.wraps(view)
    def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        try:
            return view(request, *args, **kwargs)
        except (NotFound, ValidationFailed) as error:
            raise Http404(error.detail) from error

    return cast(View, login_required(guarded))


def user_of(request: HttpRequest) -> User:
    return cast(User, request.user)


def tenant_of(request: HttpRequest) -> Tenant:
    return user_of(request).tenant

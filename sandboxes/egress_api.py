"""Where a sandbox may connect to, and what became of it when it tried."""

from __future__ import annotations

import datetime as dt
from typing import Any

from django.conf import settings
from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from e2a.core.api import time_text, validated
from sandboxes import serializers as shapes
from sandboxes.api import TAGS, SandboxApiView
from sandboxes.configuration import guest_client
from sandboxes.egress.rules import EgressRules
from sandboxes.egress.service import egress_seen
from sandboxes.models import CONTAINED_STATES, Sandbox
from sandboxes.services import sandbox_egress_change

_SECONDS = 2.0


class EgressView(SandboxApiView):
    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_egress",
        summary="Show where it may connect to, and what it tried",
        responses={200: shapes.EgressShownSerializer},
    )
    def get(self, request: Request, sandbox_id: str) -> Response:
        """Connections by target and verdict, newest first, at most 500; also once it is gone."""
        return Response(_shown(self.sandbox(request)))

    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_egress_set",
        summary="Change where it may connect to",
        request=shapes.EgressSerializer,
        responses={200: shapes.EgressShownSerializer},
    )
    def put(self, request: Request, sandbox_id: str) -> Response:
        """Replaces its own rules; its template's stay. At once: what is open and not allowed any more is cut."""
        body = validated(shapes.EgressSerializer, request)
        rules = EgressRules.parse(body, allow_private=settings.E2A.egress_allow_private)
        return Response(_shown(sandbox_egress_change(sandbox=self.sandbox(request), rules=rules)))


def _shown(sandbox: Sandbox) -> dict[str, Any]:
    lives = sandbox.state in CONTAINED_STATES and sandbox.node is not None
    entries, is_complete = egress_seen(
        sandbox, guest_client(sandbox, timeout_seconds=_SECONDS) if lives else None
    )
    own, template = EgressRules.stored(sandbox.egress), EgressRules.stored(sandbox.template.egress)
    return {
        **own.as_json(),
        **{f"template_{name}": rules for name, rules in template.as_json().items()},
        "entries": [
            entry | {name: _moment(entry[name]) for name in ("first_at", "last_at")} for entry in entries
        ],
        "is_complete": is_complete,
    }


def _moment(seconds: float) -> str | None:
    return time_text(dt.datetime.fromtimestamp(seconds, dt.UTC))

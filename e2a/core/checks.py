"""System checks: settings that make no sense are refused at start, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.conf import settings
from django.core import checks


@checks.register()
def environment_is_sane(app_configs: Sequence[Any] | None, **kwargs: Any) -> list[checks.CheckMessage]:
    """What `e2a.settings.environment` found wrong: e2a.E001 missing secret, E002 weak key, E003–E007 bad values."""
    return [checks.Error(message, id=check_id) for check_id, message in settings.E2A.problems]

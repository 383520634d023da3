"""The Celery application. Queues: `control`, `turns` and `archives` (worker), `provision` and `node.<name>` (node)."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery
from celery.signals import beat_init

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "e2a.settings")

app = Celery("e2a")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()

app.conf.beat_schedule = {
    "turns-sweep": {"task": "sessions_app.tasks.turns_sweep", "schedule": 5.0, "options": {"expires": 5}},
    "sessions-reap": {"task": "sessions_app.tasks.sessions_reap", "schedule": 5.0, "options": {"expires": 5}},
    "sandboxes-reap": {"task": "sandboxes.tasks.sandboxes_reap", "schedule": 5.0, "options": {"expires": 5}},
    "sandboxes-unstick": {
        "task": "sandboxes.tasks.sandboxes_unstick",
        "schedule": 10.0,
        "options": {"expires": 10},
    },
    "jobs-settle": {"task": "sandboxes.tasks.jobs_settle", "schedule": 10.0, "options": {"expires": 10}},
    "snapshots-sweep": {
        "task": "sandboxes.tasks.snapshots_sweep",
        "schedule": 10.0,
        "options": {"expires": 10},
    },
    "workspaces-autosave": {
        "task": "sandboxes.tasks.workspaces_autosave",
        "schedule": 60.0,
        "options": {"expires": 60},
    },
    "storage-tidy": {"task": "sandboxes.tasks.storage_tidy", "schedule": 3600.0, "options": {"expires": 600}},
    "beat-pulse": {"task": "e2a.core.tasks.pulse", "schedule": 10.0, "options": {"expires": 10}},
    "login-codes-sweep": {
        "task": "accounts.tasks.login_codes_sweep",
        "schedule": 5.0,
        "options": {"expires": 5},
    },
    "ended-keys-tell": {"task": "keys.tasks.ended_keys_tell", "schedule": 5.0, "options": {"expires": 5}},
    "sandboxes-purge": {
        "task": "sandboxes.tasks.sandboxes_purge",
        "schedule": 3600.0,
        "options": {"expires": 600},
    },
    "tenants-erase": {
        "task": "sessions_app.tasks.tenants_erase",
        "schedule": 30.0,
        "options": {"expires": 30},
    },
    "purge-core": {"task": "e2a.core.tasks.purge", "schedule": 3600.0, "options": {"expires": 600}},
    "purge-accounts": {"task": "accounts.tasks.purge", "schedule": 3600.0, "options": {"expires": 600}},
    "purge-events": {
        "task": "sessions_app.tasks.events_purge",
        "schedule": 3600.0,
        "options": {"expires": 600},
    },
}


def _first_pulse(**_: Any) -> None:
    """A schedule begins with a pause; without this `manage.py doctor` would miss beat for the first 10 s."""
    app.send_task("e2a.core.tasks.pulse", expires=10)


beat_init.connect(_first_pulse)

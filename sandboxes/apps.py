from typing import Any

from django.apps import AppConfig
from django.db.models.signals import post_migrate


class SandboxesConfig(AppConfig):
    name = "sandboxes"
    verbose_name = "Sandboxes"

    def ready(self) -> None:
        from sandboxes import node_worker  # noqa: F401  (connects the node agent to the Celery worker's life)

        post_migrate.connect(_sync_templates, sender=self)


def _sync_templates(**kwargs: Any) -> None:
    """After each `migrate` (and each flush of a test database) the templates are there."""
    from sandboxes.catalogue import templates_sync

    templates_sync()

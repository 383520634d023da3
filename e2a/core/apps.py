from django.apps import AppConfig


class CoreConfig(AppConfig):
    name = "e2a.core"
    label = "core"
    verbose_name = "Core"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from e2a.core import checks  # noqa: F401  (registers the system checks)

from django.apps import AppConfig
from django.utils.module_loading import autodiscover_modules


class ProductConfig(AppConfig):
    """The composition: commands, URLs, processes. Last in INSTALLED_APPS, so every app is ready before it."""

    name = "e2a"
    label = "e2a"

    def ready(self) -> None:
        import e2a.celery  # noqa: F401  (makes our Celery application the current one, in every process)

        autodiscover_modules("tasks")  # `enqueue` looks tasks up by name; a typo must fail at once.

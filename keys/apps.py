from django.apps import AppConfig


class KeysConfig(AppConfig):
    name = "keys"
    verbose_name = "API keys"

    def ready(self) -> None:
        from keys import openapi  # noqa: F401  (registers the bearer scheme with drf-spectacular)

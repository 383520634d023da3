from django.apps import AppConfig
from django.contrib.admin import apps as admin_apps
from django.utils.module_loading import autodiscover_modules


class ProductConfig(AppConfig):
    """The composition: commands, URLs, processes. Last in INSTALLED_APPS, so every app is ready before it."""

    name = "e2a"
    label = "e2a"
    default = True

    def ready(self) -> None:
        import e2a.celery  # noqa: F401  (makes our Celery application the current one, in every process)

        autodiscover_modules("tasks")  # `enqueue` looks tasks up by name; a typo must fail at once.


class OperatorAdminConfig(admin_apps.AdminConfig):
    """Django's admin, with our site as the default one."""

    default = False
    default_site = "e2a.admin_site.OperatorSite"

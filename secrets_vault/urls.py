"""`/v1/tenants/me/secrets` and the dashboard's Secrets pages."""

from __future__ import annotations

from django.urls import URLPattern, path

from secrets_vault import api, views

api_urls: list[URLPattern] = [
    path("tenants/me/secrets", api.SecretsView.as_view(), name="api-secrets"),
    path("tenants/me/secrets/<str:name>", api.SecretView.as_view(), name="api-secret"),
    path(
        "tenants/me/secrets/<str:name>/versions", api.SecretVersionsView.as_view(), name="api-secret-versions"
    ),
    path(
        "tenants/me/secrets/<str:name>/rollback", api.SecretRollbackView.as_view(), name="api-secret-rollback"
    ),
]
page_urls: list[URLPattern] = [
    path("secrets", views.secrets, name="secrets"),
    path("secrets/<slug:name>", views.secret, name="secret"),
    path("secrets/<slug:name>/values", views.secret_value_set, name="secret-value-set"),
    path("secrets/<slug:name>/values/remove", views.secret_value_remove, name="secret-value-remove"),
    path("secrets/<slug:name>/rollback", views.secret_rollback, name="secret-rollback"),
    path("secrets/<slug:name>/delete", views.secret_delete, name="secret-delete"),
]

"""All HTTP paths: `/v1` for programs, pages for people, the admin for operators."""

from __future__ import annotations

from django.conf import settings
from django.contrib import admin
from django.urls import include, path
from drf_spectacular.views import SpectacularJSONAPIView, SpectacularSwaggerSplitView

import accounts.urls
import keys.urls
import sandboxes.urls
import secrets_vault.urls
import sessions_app.urls
from e2a import views

api = [
    *accounts.urls.api_urls,
    *keys.urls.api_urls,
    *secrets_vault.urls.api_urls,
    *sessions_app.urls.api_urls,
    *sandboxes.urls.api_urls,
    path("openapi.json", SpectacularJSONAPIView.as_view(), name="openapi"),
    path("docs", SpectacularSwaggerSplitView.as_view(url_name="openapi"), name="api-docs"),
]

urlpatterns = [
    path("v1/", include(api)),
    path("healthz", views.healthz, name="healthz"),
    path("readyz", views.readyz, name="readyz"),
    path("", views.home, name="home"),
    *accounts.urls.page_urls,
    *keys.urls.page_urls,
    *secrets_vault.urls.page_urls,
    *sessions_app.urls.page_urls,
    *sandboxes.urls.page_urls,
    path(f"{settings.E2A.admin_path}/", admin.site.urls),
]

handler400 = "e2a.core.problems.handler400"
handler403 = "e2a.core.problems.handler403"
handler404 = "e2a.core.problems.handler404"
handler500 = "e2a.core.problems.handler500"

"""Paths of API keys."""

from __future__ import annotations

from django.urls import URLPattern, path

from keys import api, views

api_urls: list[URLPattern] = [
    path("api-keys", api.KeysView.as_view(), name="api-keys-list"),
    path("api-keys/<str:key_id>", api.KeyView.as_view(), name="api-keys-detail"),
    path("api-keys/<str:key_id>/rotate", api.KeyRotateView.as_view(), name="api-keys-rotate"),
]

page_urls: list[URLPattern] = [
    path("api-keys", views.api_keys, name="api-keys"),
    path("api-keys/<str:key_id>/revoke", views.api_key_revoke, name="api-key-revoke"),
]

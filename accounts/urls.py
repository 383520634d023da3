"""Paths of accounts."""

from __future__ import annotations

from django.conf import settings
from django.urls import URLPattern, path

from accounts import api, views

api_urls: list[URLPattern] = [
    path("auth/login", api.LoginView.as_view(), name="auth-login"),
    path("auth/verify-otp", api.VerifyView.as_view(), name="auth-verify-otp"),
    path("auth/refresh", api.RefreshView.as_view(), name="auth-refresh"),
    path("auth/logout", api.LogoutView.as_view(), name="auth-logout"),
    path("me", api.MeView.as_view(), name="me"),
]

page_urls: list[URLPattern] = [
    path("sign-in", views.sign_in, name="sign-in"),
    path("sign-in/code", views.sign_in_code, name="sign-in-code"),
    path("sign-out", views.sign_out, name="sign-out"),
]
if not settings.E2A.production:
    page_urls.append(path("dev-mail", views.dev_mail, name="dev-mail"))

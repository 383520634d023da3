"""Paths of sessions: the API below `/v1/`, the pages below `/`."""

from __future__ import annotations

from typing import Any

from django.urls import path

from sessions_app import api, api_sandboxes, life_pages, views

api_urls: list[Any] = [
    path("sessions", api.SessionsView.as_view()),
    path("sessions/<str:session_id>", api.SessionView.as_view()),
    path("sessions/<str:session_id>/token", api.SessionTokenView.as_view()),
    path("sessions/<str:session_id>/tasks", api.TasksView.as_view()),
    path("sessions/<str:session_id>/tasks/<str:task_id>", api.TaskView.as_view()),
    path("sessions/<str:session_id>/tasks/<str:task_id>/cancel", api.TaskCancelView.as_view()),
    path("sessions/<str:session_id>/events", api.EventsView.as_view()),
    path("sandboxes", api_sandboxes.SandboxesWithTaskView.as_view()),
]

page_urls: list[Any] = [
    path("sessions", views.sessions_page, name="sessions"),
    path("sessions/new", views.session_new, name="session-new"),
    path("sessions/<str:session_id>", views.session_page, name="session"),
    path("sessions/<str:session_id>/token", views.session_page_token, name="session-page-token"),
    path("sessions/<str:session_id>/life", life_pages.session_life, name="session-life"),
    path("sessions/<str:session_id>/life/extend", life_pages.session_life_extend, name="session-life-extend"),
    path("sessions/<str:session_id>/life/pause", life_pages.session_life_pause, name="session-life-pause"),
    path("sessions/<str:session_id>/life/resume", life_pages.session_life_resume, name="session-life-resume"),
    path("sessions/<str:session_id>/end", views.session_page_end, name="session-page-end"),
]

"""Paths of the API (below `/v1/`) and of the dashboard."""

from __future__ import annotations

from django.urls import path

from sandboxes import (
    api,
    archive_api,
    desktop_views,
    egress_api,
    egress_pages,
    file_api,
    job_api,
    life_pages,
    pause_api,
    preview_api,
    preview_views,
    snapshot_api,
    snapshot_views,
    terminal_views,
    token_api,
    views,
)

api_urls = [
    path("templates", api.TemplatesView.as_view(), name="api-templates"),
    path("sandboxes", api.SandboxesView.as_view(), name="api-sandboxes"),
    path("sandboxes/<str:sandbox_id>", api.SandboxView.as_view(), name="api-sandbox"),
    path("sandboxes/<str:sandbox_id>/extend", api.ExtendView.as_view(), name="api-sandbox-extend"),
    path("sandboxes/<str:sandbox_id>/token", token_api.TokenView.as_view(), name="api-sandbox-token"),
    path(
        "sandboxes/<str:sandbox_id>/previews",
        preview_api.PreviewsView.as_view(),
        name="api-sandbox-previews",
    ),
    path(
        "sandboxes/<str:sandbox_id>/previews/<str:preview_id>",
        preview_api.PreviewView.as_view(),
        name="api-sandbox-preview",
    ),
    path("sandboxes/<str:sandbox_id>/pause", pause_api.PauseView.as_view(), name="api-sandbox-pause"),
    path("sandboxes/<str:sandbox_id>/resume", pause_api.ResumeView.as_view(), name="api-sandbox-resume"),
    path("sandboxes/<str:sandbox_id>/exec", api.ExecView.as_view(), name="api-sandbox-exec"),
    path("sandboxes/<str:sandbox_id>/logs", api.LogsView.as_view(), name="api-sandbox-logs"),
    path("sandboxes/<str:sandbox_id>/files", file_api.FilesView.as_view(), name="api-sandbox-files"),
    path(
        "sandboxes/<str:sandbox_id>/files/list",
        file_api.FileListView.as_view(),
        name="api-sandbox-files-list",
    ),
    path(
        "sandboxes/<str:sandbox_id>/files/stat",
        file_api.FileStatView.as_view(),
        name="api-sandbox-files-stat",
    ),
    path(
        "sandboxes/<str:sandbox_id>/files/watch",
        file_api.FileWatchView.as_view(),
        name="api-sandbox-files-watch",
    ),
    path(
        "sandboxes/<str:sandbox_id>/files/move",
        file_api.FileMoveView.as_view(),
        name="api-sandbox-files-move",
    ),
    path(
        "sandboxes/<str:sandbox_id>/files/mkdir",
        file_api.FileMkdirView.as_view(),
        name="api-sandbox-files-mkdir",
    ),
    path("sandboxes/<str:sandbox_id>/egress", egress_api.EgressView.as_view(), name="api-sandbox-egress"),
    path("sandboxes/<str:sandbox_id>/archive", archive_api.ArchiveView.as_view(), name="api-sandbox-archive"),
    path(
        "sandboxes/<str:sandbox_id>/snapshot",
        snapshot_api.SandboxSnapshotView.as_view(),
        name="api-sandbox-snapshot",
    ),
    path("snapshots", snapshot_api.SnapshotsView.as_view(), name="api-snapshots"),
    path("snapshots/<str:snapshot_id>", snapshot_api.SnapshotView.as_view(), name="api-snapshot"),
    path("workspaces", snapshot_api.WorkspacesView.as_view(), name="api-workspaces"),
    path("workspaces/<str:name>", snapshot_api.WorkspaceView.as_view(), name="api-workspace"),
    path("sandboxes/<str:sandbox_id>/jobs", job_api.JobsView.as_view(), name="api-sandbox-jobs"),
    path("sandboxes/<str:sandbox_id>/jobs/<str:job_id>", job_api.JobView.as_view(), name="api-sandbox-job"),
    path(
        "sandboxes/<str:sandbox_id>/jobs/<str:job_id>/output",
        job_api.JobOutputView.as_view(),
        name="api-sandbox-job-output",
    ),
    path(
        "sandboxes/<str:sandbox_id>/jobs/<str:job_id>/signal",
        job_api.JobSignalView.as_view(),
        name="api-sandbox-job-signal",
    ),
    path(
        "sandboxes/<str:sandbox_id>/jobs/<str:job_id>/stdin",
        job_api.JobStdinView.as_view(),
        name="api-sandbox-job-stdin",
    ),
]
page_urls = [
    path("sandboxes", views.sandboxes_page, name="sandboxes"),
    path("sandboxes/<str:sandbox_id>", views.sandbox_page, name="sandbox"),
    path("sandboxes/<str:sandbox_id>/snapshot", snapshot_views.snapshot_create_page, name="sandbox-snapshot"),
    path("snapshots", snapshot_views.snapshots_page, name="snapshots"),
    path("snapshots/<str:snapshot_id>/start", snapshot_views.snapshot_start_page, name="snapshot-start"),
    path("snapshots/<str:snapshot_id>/delete", snapshot_views.snapshot_delete_page, name="snapshot-delete"),
    path("workspaces/delete", snapshot_views.workspace_delete_page, name="workspace-delete"),
    path("sandboxes/<str:sandbox_id>/extend", life_pages.sandbox_extend_page, name="sandbox-extend"),
    path(
        "sandboxes/<str:sandbox_id>/egress/allow",
        egress_pages.sandbox_egress_allow_page,
        name="sandbox-egress-allow",
    ),
    path("sandboxes/<str:sandbox_id>/pause", life_pages.sandbox_pause_page, name="sandbox-pause"),
    path("sandboxes/<str:sandbox_id>/resume", life_pages.sandbox_resume_page, name="sandbox-resume"),
    path("sandboxes/<str:sandbox_id>/destroy", views.sandbox_destroy_page, name="sandbox-destroy"),
    path("sandboxes/<str:sandbox_id>/terminal", terminal_views.terminal_page, name="sandbox-terminal"),
    path("sandboxes/<str:sandbox_id>/desktop", desktop_views.desktop_page, name="sandbox-desktop"),
    path("sandboxes/<str:sandbox_id>/preview", preview_views.preview_open_page, name="sandbox-preview"),
    path("sandboxes/<str:sandbox_id>/token", terminal_views.sandbox_token_page, name="sandbox-token"),
]

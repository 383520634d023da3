"""`/v1/sandboxes/{id}/jobs`: background processes."""

from __future__ import annotations

from typing import Any

from django.http import StreamingHttpResponse
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.renderers import JSONRenderer
from rest_framework.request import Request
from rest_framework.response import Response

from e2a.core.api import created, time_text, validated
from e2a.core.errors import ValidationFailed
from e2a.core.idempotency import idempotent
from e2a.core.pagination import MAX_LIMIT, page
from sandboxes import job_serializers as shapes
from sandboxes import jobs
from sandboxes.api import TAGS, EventStreamRenderer, SandboxApiView
from sandboxes.execution import Command
from sandboxes.guest_answers import guest_answers
from sandboxes.job_output import JobStream, output_page
from sandboxes.models import Job
from sandboxes.pages import after_of
from sandboxes.streams import event_stream, stream_open, streamed

_LIMIT = OpenApiParameter(
    "limit", {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": 20}, OpenApiParameter.QUERY
)
_CURSOR = OpenApiParameter("cursor", str, OpenApiParameter.QUERY)
_AFTER = OpenApiParameter("after", {"type": "integer", "minimum": 0, "default": 0}, OpenApiParameter.QUERY)
_LAST_EVENT_ID = OpenApiParameter(
    "Last-Event-ID",
    {"type": "string", "pattern": "^[0-9]{1,18}$"},
    OpenApiParameter.HEADER,
    description="Of a stream that was cut: as `after`, and wins over it.",
)
_IDEMPOTENCY_KEY = OpenApiParameter(
    "Idempotency-Key", {"type": "string", "minLength": 1, "maxLength": 255}, OpenApiParameter.HEADER
)


def job_shown(job: Job) -> dict[str, Any]:
    return {
        "job_id": job.public_id,
        "state": str(job.state),
        "command": job.command,
        "created_at": time_text(job.created_at),
        "ended_at": time_text(job.ended_at),
        "exit_code": job.exit_code,
        "signal": job.signal or None,
        "timed_out": job.timed_out,
        "oom": job.oom,
        "reason": job.reason or None,
        "output_bytes": job.output_bytes,
    }


class JobsView(SandboxApiView):
    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_jobs_list",
        summary="List background processes",
        parameters=[_LIMIT, _CURSOR],
        responses={200: shapes.JobListSerializer},
    )
    def get(self, request: Request, sandbox_id: str) -> Response:
        """Newest first; those that ended too, also when the sandbox is gone."""
        sandbox = self.sandbox(request)
        rows, next_cursor = page(jobs.jobs_of(sandbox), request)
        jobs.jobs_refresh(sandbox, rows)
        return Response({"jobs": [job_shown(row) for row in rows], "next_cursor": next_cursor})

    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_jobs_create",
        summary="Start a background process",
        parameters=[_IDEMPOTENCY_KEY],
        request=shapes.JobCreateSerializer,
        responses={201: shapes.JobSerializer},
    )
    @idempotent()
    def post(self, request: Request, sandbox_id: str) -> Response:
        """It outlives its caller, and is ended with everything that it started: by `DELETE`, by its time, and
        with the sandbox. Of its output the last 1 MiB is kept."""
        body = validated(shapes.JobCreateSerializer, request)
        command = Command(
            command=body.get("command"),
            argv=tuple(body["argv"]) if "argv" in body else None,
            cwd=body.get("cwd"),
            env=body.get("env"),
            stdin=body.get("stdin"),
        )
        job = jobs.job_start(
            sandbox=self.sandbox(request),
            command=command,
            keep_stdin_open=body["keep_stdin_open"],
            timeout_seconds=body.get("timeout_seconds"),
        )
        return created(job_shown(job))


class JobView(SandboxApiView):
    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_jobs_get",
        summary="Show a background process",
        responses={200: shapes.JobSerializer},
    )
    def get(self, request: Request, sandbox_id: str, job_id: str) -> Response:
        """`unknown` when nobody recorded how it ended; `exit_code` is then null, never 0."""
        return Response(job_shown(jobs.job_get(self.sandbox(request), job_id)))

    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_jobs_delete",
        summary="Kill and forget a background process",
        responses={200: shapes.JobDeletedSerializer},
    )
    def delete(self, request: Request, sandbox_id: str, job_id: str) -> Response:
        """With everything that it started."""
        jobs.job_delete(self.sandbox(request), job_id)
        return Response({"job_id": job_id, "deleted": True})


class JobOutputView(SandboxApiView):
    renderer_classes = [JSONRenderer, EventStreamRenderer]

    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_jobs_output",
        summary="Read a background process's output",
        parameters=[_AFTER, _LAST_EVENT_ID],
        responses={
            (200, "application/json"): shapes.JobOutputSerializer,
            (200, "text/event-stream"): OpenApiTypes.STR,
        },
    )
    def get(self, request: Request, sandbox_id: str, job_id: str) -> Response | StreamingHttpResponse:
        """From the byte `after` on: what there is now, about 256 KiB a page; with `Accept: text/event-stream`
        as it comes, `stdout` and `stderr`, then one `exit`. Leaving the stream does not end the process."""
        after = _after(request)
        sandbox = self.sandbox(request)
        if not isinstance(request.accepted_renderer, EventStreamRenderer):
            _, output = jobs.job_output(sandbox, job_id, after=after, follow=False)
            with guest_answers(sandbox):
                return Response(output_page(output, after=after))

        def opened() -> JobStream:
            return JobStream(*jobs.job_output(sandbox, job_id, after=after, follow=True), after=after)

        stream = stream_open(opened)
        response = streamed(event_stream(stream), stream, content_type="text/event-stream")
        response["X-Accel-Buffering"] = "no"
        return response


def _after(request: Request) -> int:
    last = request.headers.get("Last-Event-ID")
    if last is None:
        return after_of(request._request)
    if not (last.isascii() and last.isdigit() and len(last) <= 18):
        raise ValidationFailed.of("Last-Event-ID", "invalid_after", "Last-Event-ID is a whole number from 0.")
    return int(last)


class JobSignalView(SandboxApiView):
    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_jobs_signal",
        summary="Signal a background process",
        request=shapes.JobSignalSerializer,
        responses={200: shapes.JobSerializer},
    )
    def post(self, request: Request, sandbox_id: str, job_id: str) -> Response:
        """Reaches everything that it started, also what called setsid."""
        body = validated(shapes.JobSignalSerializer, request)
        return Response(job_shown(jobs.job_signal(self.sandbox(request), job_id, signal=body["signal"])))


class JobStdinView(SandboxApiView):
    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_jobs_stdin",
        summary="Write to a background process's input",
        request=shapes.JobStdinSerializer,
        responses={200: shapes.JobStdinAnswerSerializer},
    )
    def post(self, request: Request, sandbox_id: str, job_id: str) -> Response:
        """For one that was started with `keep_stdin_open`. 409 `stdin_full` while 1 MiB waits to be read."""
        body = validated(shapes.JobStdinSerializer, request)
        jobs.job_stdin(self.sandbox(request), job_id, data=body["data"], close=body["close"])
        return Response({"job_id": job_id, "accepted_bytes": len(body["data"])})

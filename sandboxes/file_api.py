"""`/v1/sandboxes/{id}/files`: reading, writing and arranging files, streamed both ways.

Uploads are taken by `sandboxes.upload` before Django sees them; the PUT here is their description, and serves
where Django runs without our ASGI application.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast

from django.http import StreamingHttpResponse
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.negotiation import BaseContentNegotiation
from rest_framework.renderers import JSONRenderer
from rest_framework.request import Request
from rest_framework.response import Response

from e2a.core.api import created, validated
from e2a.core.errors import TooLarge, ValidationFailed
from e2a.core.openapi import SERVER_SENT_EVENT
from sandboxes import presenting
from sandboxes import serializers as shapes
from sandboxes.api import TAGS, EventStreamRenderer, SandboxApiView, attachment
from sandboxes.file_watching import change_events
from sandboxes.guest_answers import guest_answers
from sandboxes.guest_client import FileStream, GuestClient
from sandboxes.models import Sandbox
from sandboxes.paths import LONGEST_PATH_BYTES, MODE, cursor_name, name_cursor, path_check, path_shown
from sandboxes.services import sandbox_client, sandbox_used, sandbox_wait_running
from sandboxes.streams import byte_stream, stream_open, streamed
from sandboxes.upload import LARGEST_FILE_BYTES
from sandboxes.waiting import database_release

_PIECE_BYTES = 64 * 1024
PATH = OpenApiParameter(
    "path",
    {"type": "string", "minLength": 1, "maxLength": LONGEST_PATH_BYTES, "pattern": "^[^\\u0000]*$"},
    OpenApiParameter.QUERY,
    required=True,
    description="Relative to /workspace, or absolute.",
)
_MODE = OpenApiParameter("mode", {"type": "string", "pattern": "^0?[0-7]{3}$"}, OpenApiParameter.QUERY)

_CURSOR = OpenApiParameter("cursor", str, OpenApiParameter.QUERY)
_FLAGS = ("true", "false", "1", "0")
_RECURSIVE = OpenApiParameter(
    "recursive", {"type": "string", "enum": list(_FLAGS), "default": "false"}, OpenApiParameter.QUERY
)

_ONE_RANGE = re.compile(r"bytes=([0-9]{1,15}-[0-9]{0,15}|-[0-9]{1,15})")
_RANGE = OpenApiParameter(
    "Range",
    {"type": "string", "pattern": "^bytes=([0-9]{1,15}-[0-9]{0,15}|-[0-9]{1,15})$"},
    OpenApiParameter.HEADER,
)


class AnyAccept(BaseContentNegotiation):
    """A file is what it is, whatever `Accept` says."""

    def select_parser(self, request: Any, parsers: Any) -> Any:
        return parsers[0]

    def select_renderer(self, request: Any, renderers: Any, format_suffix: str | None = None) -> Any:
        return renderers[0], renderers[0].media_type


class FileApiView(SandboxApiView):
    """A view that asks the guest of a running sandbox."""

    def reached(self, request: Request) -> tuple[Sandbox, GuestClient]:
        """The sandbox, once it runs, and the way to its guest. Waits for one that is being made."""
        sandbox = self.sandbox(request)
        sandbox_wait_running(sandbox)
        sandbox_used(sandbox)
        return sandbox, sandbox_client(sandbox)

    def path(self, request: Request) -> str:
        return path_check(request.GET.get("path", ""))

    def recursive(self, request: Request) -> bool:
        value = request.GET.get("recursive", "false")
        if value not in _FLAGS:
            raise ValidationFailed.of("recursive", "invalid", "recursive is true or false.")
        return value in ("true", "1")


class FilesView(FileApiView):
    content_negotiation_class = AnyAccept

    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_file_read",
        summary="Read a file",
        parameters=[PATH, _RANGE],
        responses={
            (200, "application/octet-stream"): OpenApiTypes.BINARY,
            (206, "application/octet-stream"): OpenApiTypes.BINARY,
        },
    )
    def get(self, request: Request, sandbox_id: str) -> StreamingHttpResponse:
        """Streamed, as an attachment, unchanged: files are the tenant's own and not redacted. One range of the
        form `bytes=a-b`, `bytes=a-` or `bytes=-n` is served as 206; several, or another unit, are the whole file."""
        byte_range = request.headers.get("Range")
        if byte_range is not None and not _ONE_RANGE.fullmatch(byte_range):
            byte_range = None
        path = self.path(request)
        sandbox, client = self.reached(request)
        database_release()
        with guest_answers(sandbox):
            stream = stream_open(lambda: client.file_read(path, byte_range=byte_range))
        response = streamed(byte_stream(stream), stream, content_type="application/octet-stream")
        source = cast(FileStream, stream.source)
        if source.size is not None:
            response["Content-Length"] = str(source.size)
        response["Accept-Ranges"] = "bytes"
        if source.content_range is not None:
            response.status_code = 206
            response["Content-Range"] = source.content_range
        if source.mode is not None:
            response["X-E2A-Mode"] = f"{source.mode:04o}"
        response["Content-Disposition"] = attachment(path)
        response["Content-Security-Policy"] = "sandbox; default-src 'none'"
        return response

    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_file_write",
        summary="Write a file",
        parameters=[PATH, _MODE],
        request={"application/octet-stream": OpenApiTypes.BINARY},
        responses={200: shapes.FileWrittenSerializer},
    )
    def put(self, request: Request, sandbox_id: str) -> Response:
        """Replaces it whole, and at once; folders on the way are made. At most 512 MiB."""
        path = self.path(request)
        mode = request.GET.get("mode")
        if mode is not None and not MODE.fullmatch(mode):
            raise ValidationFailed.of("mode", "invalid_mode", "mode is three or four octal digits.")
        sandbox, client = self.reached(request)
        database_release()
        with guest_answers(sandbox):
            written = client.file_write(
                path, body_pieces(request), mode=None if mode is None else int(mode, 8)
            )
        return Response({"path": written.path, "size": written.size})

    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_file_delete",
        summary="Delete a file or an empty folder",
        parameters=[PATH, _RECURSIVE],
        responses={200: shapes.DeletedSerializer},
    )
    def delete(self, request: Request, sandbox_id: str) -> Response:
        """A symlink itself, not what it leads to. 404 when it is not there; a folder that is not empty is 409
        `not_empty`, unless `recursive`."""
        path, recursive = self.path(request), self.recursive(request)
        sandbox, client = self.reached(request)
        with guest_answers(sandbox):
            client.file_delete(path, recursive=recursive)
        return Response({"path": path, "deleted": True})


class FileListView(FileApiView):
    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_file_list",
        summary="List a folder",
        parameters=[PATH, _CURSOR],
        responses={200: shapes.FileListSerializer},
    )
    def get(self, request: Request, sandbox_id: str) -> Response:
        """By name, 10,000 entries a page."""
        path = self.path(request)
        cursor = request.GET.get("cursor")
        after = "" if cursor is None else cursor_name(cursor)
        sandbox, client = self.reached(request)
        with guest_answers(sandbox):
            listing = client.file_list(path, after=after)
        more = listing.truncated and listing.entries
        return Response(
            {
                "path": path,
                "entries": [presenting.file_shown(entry) for entry in listing],
                "next_cursor": name_cursor(listing.entries[-1].name) if more else None,
            }
        )


class FileStatView(FileApiView):
    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_file_stat",
        summary="Show what is at a path",
        parameters=[PATH],
        responses={200: shapes.FileStatSerializer},
    )
    def get(self, request: Request, sandbox_id: str) -> Response:
        """A symlink is itself, not what it leads to; `target` is what it says."""
        path = self.path(request)
        sandbox, client = self.reached(request)
        with guest_answers(sandbox):
            info = client.file_stat(path)
        target = None if info.target is None else path_shown(info.target)
        return Response(presenting.file_shown(info) | {"target": target})


class FileWatchView(FileApiView):
    renderer_classes = [EventStreamRenderer, JSONRenderer]

    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_file_watch",
        summary="Watch a folder",
        parameters=[PATH, _RECURSIVE],
        responses={(200, "text/event-stream"): SERVER_SENT_EVENT},
    )
    def get(self, request: Request, sandbox_id: str) -> StreamingHttpResponse:
        """Server-sent events, from `ready` on: `created`, `modified`, `deleted`, `moved` with `path`; `overflow` when
        some were lost (list the folder anew); `end` with a `reason` as the last one. At most 8 watches a sandbox
        (409 `too_many_watches`) and 4,096 folders each (409 `too_many_folders`). It does not keep the sandbox
        from idling."""
        path, recursive = self.path(request), self.recursive(request)
        sandbox, client = self.reached(request)
        database_release()
        with guest_answers(sandbox):
            stream = stream_open(lambda: client.file_watch(path, recursive=recursive))
        response = streamed(change_events(sandbox, stream), stream, content_type="text/event-stream")
        response["X-Accel-Buffering"] = "no"
        return response


class FileMoveView(FileApiView):
    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_file_move",
        summary="Move or rename",
        request=shapes.MoveSerializer,
        responses={200: shapes.PathSerializer},
    )
    def post(self, request: Request, sandbox_id: str) -> Response:
        """Replaces a file that is at `to`; folders on the way are made."""
        body = validated(shapes.MoveSerializer, request)
        source, destination = path_check(body["from"]), path_check(body["to"])
        sandbox, client = self.reached(request)
        with guest_answers(sandbox):
            client.file_move(source, destination)
        return Response({"path": destination})


class FileMkdirView(FileApiView):
    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_file_mkdir",
        summary="Make a folder",
        request=shapes.MkdirSerializer,
        responses={201: shapes.PathSerializer},
    )
    def post(self, request: Request, sandbox_id: str) -> Response:
        """With the folders on the way; fine when it is there."""
        path = path_check(validated(shapes.MkdirSerializer, request)["path"])
        sandbox, client = self.reached(request)
        with guest_answers(sandbox):
            client.file_mkdir(path)
        return created({"path": path})


def body_pieces(request: Request) -> Iterator[bytes]:
    """The body in pieces, past DRF's parsers. Raises `TooLarge` where it goes over the limit."""
    size = 0
    while piece := request._request.read(_PIECE_BYTES):
        size += len(piece)
        if size > LARGEST_FILE_BYTES:
            raise TooLarge(f"A file has at most {LARGEST_FILE_BYTES} bytes.")
        yield piece

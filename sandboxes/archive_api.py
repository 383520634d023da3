"""`/v1/sandboxes/{id}/archive`: a folder as a tar, out and in, streamed.

As with files, uploads are taken by `sandboxes.upload` before Django sees them; the PUT here is their
description, and serves where Django runs without our ASGI application.
"""

from __future__ import annotations

from django.http import StreamingHttpResponse
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from sandboxes import serializers as shapes
from sandboxes.api import TAGS, attachment
from sandboxes.file_api import PATH, AnyAccept, FileApiView, body_pieces
from sandboxes.guest_answers import guest_answers
from sandboxes.streams import byte_stream, stream_open, streamed
from sandboxes.waiting import database_release

TAR = "application/x-tar"


class ArchiveView(FileApiView):
    content_negotiation_class = AnyAccept

    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_archive_read",
        summary="Read a folder as a tar",
        parameters=[PATH],
        responses={(200, TAR): OpenApiTypes.BINARY},
    )
    def get(self, request: Request, sandbox_id: str) -> StreamingHttpResponse:
        """Files, folders and symlinks below it (or one file), unchanged; names are relative to it. At most
        512 MiB of files. One that cannot be read to its end breaks off, it never looks whole."""
        path = self.path(request)
        sandbox, client = self.reached(request)
        database_release()
        with guest_answers(sandbox):
            stream = stream_open(lambda: client.archive_read(path))
        response = streamed(byte_stream(stream), stream, content_type=TAR)
        response["Content-Disposition"] = attachment(path.strip("./") + ".tar")
        response["Content-Security-Policy"] = "sandbox; default-src 'none'"
        return response

    @extend_schema(
        tags=TAGS,
        operation_id="sandboxes_archive_write",
        summary="Unpack a tar into a folder",
        parameters=[PATH],
        request={TAR: OpenApiTypes.BINARY},
        responses={200: shapes.ArchiveWrittenSerializer},
    )
    def put(self, request: Request, sandbox_id: str) -> Response:
        """Plain or compressed by gzip, bzip2 or xz, at most 512 MiB either way. Files are the sandbox user's, nothing
        is made outside the folder, and what was unpacked before an error stays."""
        path = self.path(request)
        sandbox, client = self.reached(request)
        database_release()
        with guest_answers(sandbox):
            unpacked = client.archive_write(path, body_pieces(request))
        return Response({"path": unpacked.path, "files": unpacked.files, "size": unpacked.size})

"""A bucket of an S3-compatible store. Multipart uploads make objects appear whole; parts never are one.

The only module that imports boto3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from e2a.core.clock import now, seconds
from sandboxes.storage.base import PIECE_BYTES, StorageError, StorageObject, StoragePlace

PART_BYTES = 16 * 1024 * 1024
"""Of a multipart upload, and what one write holds in memory. 10,000 of them are allowed: 156 GiB."""
_FAULTS = (BotoCoreError, ClientError, Boto3Error)


class S3Storage:
    """Objects below `prefix` of one bucket. One client, which threads may share."""

    def __init__(self, place: StoragePlace) -> None:
        self._bucket = place.bucket
        self._prefix = f"{place.prefix}/" if place.prefix else ""
        self._client: Any = boto3.session.Session().client(
            "s3",
            endpoint_url=place.endpoint or None,
            region_name=place.region or None,
            aws_access_key_id=place.access_key or None,
            aws_secret_access_key=place.secret_key or None,
            config=Config(
                connect_timeout=5,
                read_timeout=60,
                retries={"max_attempts": 4, "mode": "standard"},
                max_pool_connections=32,
                # Compatible stores do not all know the newer checksums; ours are checked by e2a itself.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                s3={"addressing_style": "path"} if place.endpoint else {},
            ),
        )

    def write(self, key: str, pieces: Iterable[bytes]) -> int:
        name = self._name(key)
        parts = _parts(pieces)
        first = next(parts, b"")
        second = next(parts, None)
        if second is None:
            with self._translated(key):
                self._client.put_object(Bucket=self._bucket, Key=name, Body=first)
            return len(first)
        with self._translated(key):
            upload = self._client.create_multipart_upload(Bucket=self._bucket, Key=name)["UploadId"]
        try:
            return self._multipart(key, upload, [first, second], parts)
        except BaseException:
            with contextlib.suppress(*_FAULTS):  # Else the sweep does it.
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=name, UploadId=upload)
            raise

    def _multipart(self, key: str, upload: str, begun: list[bytes], parts: Iterator[bytes]) -> int:
        where = {"Bucket": self._bucket, "Key": self._name(key), "UploadId": upload}
        done: list[dict[str, Any]] = []
        size = 0

        def send(part: bytes) -> None:
            nonlocal size
            number = len(done) + 1
            with self._translated(key):
                answer = self._client.upload_part(**where, PartNumber=number, Body=part)
            done.append({"ETag": answer["ETag"], "PartNumber": number})
            size += len(part)

        while begun:
            send(begun.pop(0))
        for part in parts:
            send(part)
        with self._translated(key):
            self._client.complete_multipart_upload(**where, MultipartUpload={"Parts": done})
        return size

    def read(self, key: str) -> Iterator[bytes]:
        with self._translated(key):
            body = self._client.get_object(Bucket=self._bucket, Key=self._name(key))["Body"]

        def pieces() -> Iterator[bytes]:
            with contextlib.closing(body), self._translated(key):
                yield from body.iter_chunks(PIECE_BYTES)

        return pieces()

    def delete(self, key: str) -> None:
        with self._translated(key):
            self._client.delete_object(Bucket=self._bucket, Key=self._name(key))
            for upload in self._uploads(self._name(key)):
                if upload["Key"] == self._name(key):
                    self._abort(upload)

    def objects(self) -> Iterator[StorageObject]:
        with self._translated("*"):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix
            )
            for page in pages:
                for found in page.get("Contents", ()):
                    key = found["Key"].removeprefix(self._prefix)
                    yield StorageObject(key, found["Size"], found["LastModified"])

    def leftovers_remove(self, *, older_than_seconds: float) -> int:
        before = now() - seconds(older_than_seconds)
        count = 0
        with self._translated("*"):
            for upload in self._uploads(self._prefix):
                if upload["Initiated"] <= before:
                    self._abort(upload)
                    count += 1
        return count

    def _uploads(self, prefix: str) -> Iterator[dict[str, Any]]:
        pages = self._client.get_paginator("list_multipart_uploads").paginate(
            Bucket=self._bucket, Prefix=prefix
        )
        for page in pages:
            yield from page.get("Uploads", ())

    def _abort(self, upload: dict[str, Any]) -> None:
        self._client.abort_multipart_upload(
            Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"]
        )

    def _name(self, key: str) -> str:
        return self._prefix + key

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            raise StorageError(f"{self._bucket}/{self._name(key)}: {code}") from error
        except (BotoCoreError, Boto3Error) as error:
            # Their texts name addresses, never keys.
            raise StorageError(f"{self._bucket}/{self._name(key)}: {type(error).__name__}") from error


def _parts(pieces: Iterable[bytes]) -> Iterator[bytes]:
    kept = bytearray()
    for piece in pieces:
        kept += piece
        while len(kept) >= PART_BYTES:
            yield bytes(kept[:PART_BYTES])
            del kept[:PART_BYTES]
    if kept:
        yield bytes(kept)
